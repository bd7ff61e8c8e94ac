"""Images from untrusted bytes: three formats, bounded size, one orientation, RGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from compodistill.errors import DataError

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name of the format -> our suffix
MAX_PIXELS = 64 * 2**20  # below Pillow's own bomb limit, so that ours is the one that speaks


def image_suffix(data: bytes, *, where: str) -> str:
    """The suffix (`jpg`, `png`, `webp`) of an encoded image by its content, whatever its file is called."""
    with _open(data, where) as image:
        return EXTENSIONS[image.format or ""]


def decode_image(data: bytes, *, where: str) -> Image.Image:
    """Decodes an image to RGB, upright (EXIF orientation applied); of an animation, the first frame.

    Raises:
        DataError: not JPEG, PNG or WebP, damaged, or larger than `MAX_PIXELS`.
    """
    with _open(data, where) as image:
        try:
            image.load()
            rgb = _deep_to_8_bit(image).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise a dozen kinds on damaged input
            raise DataError(f"the image cannot be decoded: {error}", where=where) from error
        try:
            ImageOps.exif_transpose(rgb, in_place=True)
        except Exception:  # a damaged EXIF block says nothing about the orientation; the pixels are sound
            return rgb
        return rgb


def _open(data: bytes, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), where) from error
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            "the bytes are no JPEG, PNG or WebP image", where=where, remedy="convert it to one of them, or leave it out"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"{image.width} x {image.height}", where)
    return image


def _too_large(size: str, where: str) -> DataError:
    return DataError(
        f"the image has more than {MAX_PIXELS:,} pixels ({size})", where=where, remedy="scale it down before sharding"
    )


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by its high byte: Pillow's own conversion clips everything above 255 to white."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    deep_HW = np.asarray(image).astype(np.uint32)
    return Image.fromarray((deep_HW >> 8).clip(0, 255).astype(np.uint8))
