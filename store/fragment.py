"""Names and numbers of a fragment's format, shared by its writer and its reader."""

from __future__ import annotations

import re

GROUPS = "fragments"  # the Zarr group of all fragments
DIGEST = re.compile(r"[0-9a-f]{64}")

MAX_METADATA = 2**26  # of a fragment's zarr.json
MAX_TABLE = 2**30  # of one array of its table, uncompressed
MAX_PAYLOAD = 2**31 - 1
SMALLEST_BUCKET = 256


def path_of(shard_digest: str) -> str:
    return f"{GROUPS}/{shard_digest}"


def bucket_of(size: int) -> int:
    """The padded length of a payload: the next of 256, 384, 512, 768, ... (2^n and 3 * 2^n).

    Payloads of one bucket share an array. The padding costs next to nothing compressed, and decoding writes at most
    half a payload of zeros more.
    """
    bucket = SMALLEST_BUCKET
    while bucket < size:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def array_name(signal: str, bucket: int) -> str:
    return f"{signal}_{bucket}"


def chunk_path(array: str, dimensions: int) -> str:
    """The one object of an array."""
    return f"{array}/c" + "/0" * dimensions
