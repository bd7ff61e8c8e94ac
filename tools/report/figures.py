"""Figures of the report as PNG bytes: training curves for light and dark pages, attention over images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from compodistill.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]

SIDE = 320  # pixels of an overlay's longer side; small pictures are magnified, so that pixels stay pixels
# Okabe and Ito's colours, told apart by colour-blind readers too; the second set stands out on a dark page.
THEMES = {
    "light": {"text": "#333333", "grid": "#dddddd", "lines": ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#777777")},
    "dark": {"text": "#cccccc", "grid": "#3a3f47", "lines": ("#56b4e9", "#ffa64d", "#3fd6a5", "#e39ad1", "#aaaaaa")},
}
STYLES = ("-", "--", "-.", ":")


def require_matplotlib() -> None:
    """Raises `UsageError` with the remedy if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("the report needs matplotlib", remedy="pip install 'compodistill[report]'") from error


def curves_png(curves: Mapping[str, Points], stages: Mapping[str, float], *, label: str, theme: str) -> bytes:
    """Lines over training steps, one for each arm; `stages` names the steps at which stages begin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = THEMES[theme]
    figure = Figure(figsize=(5.4, 3.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_subplot()
    for i, (name, points) in enumerate(curves.items()):
        steps, values = [p[0] for p in points], [p[1] for p in points]
        line = colors["lines"][i % len(colors["lines"])]
        axes.plot(steps, values, label=name, color=line, linestyle=STYLES[i % len(STYLES)], linewidth=1.7)
    axes.margins(x=0.01)
    for name, start in stages.items():
        axes.axvline(start, color=colors["grid"], linewidth=1, zorder=0)
        axes.annotate(
            name, (start, 1), xycoords=("data", "axes fraction"), xytext=(4, 3), textcoords="offset points",
            color=colors["text"], fontsize=8.5,
        )  # fmt: skip
    axes.set_xlabel("training step", color=colors["text"])
    axes.set_ylabel(label, color=colors["text"])
    axes.tick_params(colors=colors["text"], labelsize=9)
    axes.grid(axis="y", color=colors["grid"], linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colors["grid"])
    axes.legend(frameon=False, labelcolor=colors["text"], handlelength=2.6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def image_png(image: Image.Image) -> bytes:
    """The image as it is, magnified to the overlays' size."""
    return _png(_magnified(image))


def overlay_png(image: Image.Image, attention_HW: np.ndarray) -> bytes:
    """The image with a heat map over it: each cell is one visual token, the brightest the map's own maximum."""
    from matplotlib import colormaps

    attention_HW = np.asarray(attention_HW, dtype=np.float64)
    if attention_HW.ndim != 2 or not np.isfinite(attention_HW).all() or (attention_HW < 0).any():
        raise ValueError("attention must be a finite, non-negative array (H, W)")
    grey = _magnified(image.convert("L")).point([30 + value // 2 for value in range(256)])  # dim: the heat must speak
    base = grey.convert("RGB")
    weight_HW = attention_HW / max(attention_HW.max(), np.finfo(np.float64).tiny)
    heat = Image.fromarray((colormaps["inferno"](weight_HW)[..., :3] * 255).astype(np.uint8)).resize(base.size, 0)
    alpha = Image.fromarray((255 * (0.6 + 0.3 * weight_HW)).astype(np.uint8)).resize(base.size, 0)
    return _png(Image.composite(heat, base, alpha))


def heat_gradient() -> str:
    """The heat map's colours as a CSS gradient, for the legend."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    stops: list[Any] = [to_hex(colormaps["inferno"](i / 6)) for i in range(7)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def _magnified(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
