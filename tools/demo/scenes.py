"""Scenes: a few objects on a jittered grid, their geometry, and their pixels.

A scene is symbolic (which object stands in which cell) plus a jitter in pixels. Rendering paints integer
masks into an array, so that no font, no antialiasing and no drawing library decides a pixel: the same seed
gives the same image on every machine.

Every possible layout belongs to exactly one split, by a digest of its content. A held-out scene therefore
cannot turn up among the training scenes of *any* seed, not even those the bundled teacher was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 36, 36),
    "green": (36, 152, 56),
    "blue": (40, 76, 216),
    "yellow": (228, 200, 28),
    "purple": (148, 44, 168),
    "black": (28, 28, 28),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, int] = {"small": 3, "big": 5}  # radius in pixels: 7 and 11 pixels wide in a cell of 12
CELL = 12
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "val", "eval")

T = TypeVar("T")


class Draws:
    """Random draws made of one primitive, `Generator.integers`, from PCG64 seeded by a tuple of integers.

    NumPy does not promise that `choice` or `shuffle` give the same stream in every version; building them
    here on the one routine keeps the world's bytes independent of the NumPy that is installed.
    """

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def below(self, n: int) -> int:
        """An integer in 0 .. n-1."""
        return int(self._generator.integers(0, n, dtype=np.int64))

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """`k` different items, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]

    def coin(self) -> bool:
        return bool(self.below(2))


@dataclass(frozen=True, order=True)
class Thing:
    """One object: its cell (counted from the top left), what it looks like, its offset inside the cell."""

    row: int
    column: int
    colour: str
    shape: str
    size: str
    dy: int = 0
    dx: int = 0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """`grid` x `grid` cells with a few things in them; no two things share colour *and* shape."""

    things: tuple[Thing, ...]
    grid: int = 4
    noise_seed: tuple[int, ...] = (0,)

    @property
    def identity(self) -> str:
        """Hex digest of what is where. Jitter and noise do not count: a shifted copy is the same scene."""
        content = [f"{t.row},{t.column},{t.colour},{t.shape},{t.size}" for t in sorted(self.things)]
        return hashlib.sha256(f"{self.grid}|{'|'.join(content)}".encode()).hexdigest()

    @property
    def split(self) -> str:
        """`eval` for one layout in ten, `val` for one in ten, else `train`."""
        return {0: "eval", 1: "val"}.get(int(self.identity[:8], 16) % 10, "train")

    def named(self, name: str) -> Thing | None:
        return next((t for t in self.things if t.name == name), None)


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Whether `a` stands in `relation` to `b`, by their cells; in the same column nothing is left or right."""
    return {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[relation]


def opposite(relation: str) -> str:
    return {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]


def draw_scene(*seed: int, n_objects: int = 3, grid: int = 4) -> Scene:
    """The scene of this seed: `n_objects` things in different cells, no two with the same colour and shape."""
    draws = Draws(*seed)
    cells = draws.sample(range(grid * grid), n_objects)
    if n_objects <= min(len(COLOURS), len(SHAPES)):  # told apart by either: binding is asked for, not forced
        looks = list(zip(draws.sample(tuple(COLOURS), n_objects), draws.sample(SHAPES, n_objects), strict=True))
    else:
        looks = draws.sample([(c, s) for c in COLOURS for s in SHAPES], n_objects)
    things = []
    for cell, (colour, shape) in zip(cells, looks, strict=True):
        size = draws.pick(tuple(SIZES))
        slack = CELL - (2 * SIZES[size] + 1) + 1
        things.append(Thing(cell // grid, cell % grid, colour, shape, size, draws.below(slack), draws.below(slack)))
    return Scene(tuple(things), grid, seed)


def draw_scenes(split: str, *seed: int, n_objects: int = 3, grid: int = 4) -> Iterator[Scene]:
    """Endless different scenes of one split."""
    seen: set[str] = set()
    index = 0
    while True:
        scene = draw_scene(*seed, index, n_objects=n_objects, grid=grid)
        index += 1
        if scene.split == split and scene.identity not in seen:
            seen.add(scene.identity)
            yield scene


def mask(shape: str, radius: int) -> np.ndarray:
    """Boolean mask (2 radius + 1, 2 radius + 1) of a shape, from integer comparisons only."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    if shape == "circle":
        return x * x + y * y <= radius * radius + radius // 2
    if shape == "square":
        return np.ones_like(x, dtype=bool)
    if shape == "triangle":
        return 2 * abs(x) <= y + radius + 1
    if shape == "cross":
        arm = radius // 3
        return (abs(x) <= arm) | (abs(y) <= arm)
    raise ValueError(f"no such shape: {shape}")


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 12 pixels a cell: flat shapes on a light ground, with a little noise."""
    side = CELL * scene.grid
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*scene.noise_seed, 1))))
    pixels = np.full((side, side, 3), 226, dtype=np.int64)
    for thing in scene.things:
        radius = SIZES[thing.size]
        top, left = thing.row * CELL + thing.dy, thing.column * CELL + thing.dx
        window = pixels[top : top + 2 * radius + 1, left : left + 2 * radius + 1]
        shade = np.array(COLOURS[thing.colour]) + generator.integers(-16, 17, size=3, dtype=np.int64)
        window[mask(thing.shape, radius)] = shade
    pixels += generator.integers(-6, 7, size=pixels.shape, dtype=np.int64)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
