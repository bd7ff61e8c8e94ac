"""A sample: one image-text conversation, as both sides see it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Turn:
    """One message. `parts` keeps the order of text and images: a str is text, None is the next image."""

    role: str  # "system" | "user" | "assistant"
    parts: tuple[str | None, ...]


@dataclass(frozen=True)
class Sample:
    """One conversation: key, turns, and as many images as there are image marks in the turns (0..n)."""

    key: str
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...] = ()
    shard: str = ""

    @property
    def where(self) -> str:
        return f"shard {self.shard}, key {self.key}" if self.shard else f"key {self.key}"
