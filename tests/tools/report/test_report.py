from __future__ import annotations

import base64
import builtins
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compodistill.errors import UsageError
from compodistill.tools.report import Scene, render_report
from compodistill.tools.report.figures import overlay_png

VOID = {"meta", "img", "source", "br", "link", "hr", "input"}
ROWS: list[dict[str, Any]] = [
    {"model": "teacher", "recognition": 0.987654321, "composition": ("90 %", 0.9), "bytes per sample": None},
    {"model": "<b>sft</b>", "recognition": 0.1, "composition": 0.25, "bytes per sample": 12345},
]


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on a tag closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.values: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if "data-value" in found:
            self.values.append(found["data-value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def scene(seed: int = 0, shape: tuple[int, int] = (6, 6)) -> Scene:
    random = np.random.default_rng(seed)
    students = {name: random.random(shape) for name in ("sft", "compodistill")}
    return Scene(
        Image.new("RGB", (48, 48), "teal"), "Is the circle left of the square?", random.random(shape), students
    )


@pytest.fixture
def html(tmp_path: Path) -> str:
    curves = {"sft": [(0, 3.0), (50, 2.0)], "compodistill": [(0, 3.5), (50, 1.5)]}
    path = tmp_path / "deep" / "report.html"
    render_report(
        path, "A <title>", ROWS, curves, [scene(0), scene(1)], {"seed": 0, "note": "x & y"}, note="A miniature."
    )
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]  # no temporary file stays
    return path.read_text()


def test_the_page_is_well_formed_and_fits_a_phone(html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert page.all("html")[0]["lang"] == "en"


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    assert "http://" not in html
    assert "https://" not in html
    page = Page(html)
    assert not page.all("link")
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert "default-src 'none'" in html  # the browser holds us to it


def test_every_image_is_there_decodes_and_has_a_text(html: str) -> None:
    page = Page(html)
    images = page.all("img")
    assert len(images) == 1 + 2 * (1 + 1 + 2)  # curves; for each scene image, teacher, two students
    for image in images:
        assert image["alt"]
        Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).verify()
    (dark,) = page.all("source")
    assert dark["srcset"] != images[0]["src"]


def test_the_table_carries_exactly_the_values_given(html: str) -> None:
    assert Page(html).values == ["teacher", "0.987654321", "0.9", "", "<b>sft</b>", "0.1", "0.25", "12345"]
    assert "90 %" in html
    assert "0.988" in html
    assert "12,345" in html


def test_text_from_outside_is_escaped(html: str) -> None:
    assert "<b>sft</b>" not in html
    assert "&lt;b&gt;sft&lt;/b&gt;" in html
    assert "A &lt;title&gt;" in html


def test_sections_without_content_are_left_out(tmp_path: Path) -> None:
    render_report(tmp_path / "r.html", "t", ROWS, {}, [], {})
    html = (tmp_path / "r.html").read_text()
    assert not Page(html).all("img")
    assert "<h2>Training" not in html
    assert "Where they look" not in html


def test_equal_input_gives_an_equal_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        render_report(tmp_path / name, "t", ROWS, {"x": [(0, 1.0), (1, 2.0)]}, [scene()], {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_cosine_shown_is_that_of_the_maps(tmp_path: Path) -> None:
    teacher = np.array([[1.0, 0.0], [0.0, 0.0]])
    students = {"same": teacher * 7, "apart": teacher[::-1], "halfway": teacher + teacher[::-1]}
    render_report(tmp_path / "r.html", "t", [], {}, [Scene(Image.new("RGB", (4, 4)), "q", teacher, students)], {})
    assert re.findall(r"cosine ([\d.]+)", (tmp_path / "r.html").read_text()) == ["1.000", "0.000", "0.707"]


def test_the_brightest_square_is_the_one_most_attended(tmp_path: Path) -> None:
    attention = np.zeros((4, 8))
    attention[1, 6] = 0.02  # scaled to the map's own maximum
    overlay = Image.open(io.BytesIO(overlay_png(Image.new("RGB", (80, 40), "gray"), attention))).convert("L")
    pixels = np.asarray(overlay).astype(float)
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert overlay.size == (320, 160)
    assert (row * 4 // 160, column * 8 // 320) == (1, 6)


@pytest.mark.parametrize("bad", [np.zeros(4), np.array([[np.nan]]), np.array([[-1.0]])])
def test_attention_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="attention"):
        overlay_png(Image.new("RGB", (4, 4)), bad)


def test_a_map_of_zeros_is_drawn_dark_not_divided_by_zero() -> None:
    overlay = Image.open(io.BytesIO(overlay_png(Image.new("RGB", (4, 4)), np.zeros((2, 2)))))
    assert np.asarray(overlay.convert("L")).max() < 80


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"compodistill\[report\]"):
        render_report(tmp_path / "r.html", "t", ROWS, {}, [], {})
    assert not (tmp_path / "r.html").exists()
