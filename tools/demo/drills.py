"""Drills: terse questions that only the teacher's training asks.

A full question spends twenty words to supervise one; a drill spends three to supervise three ("red circle?":
"small two three"). Finding a named thing in the picture, and comparing two of them, is all that composition
needs, and with drills it is learnt in minutes.
"""

from __future__ import annotations

from compodistill.tools.demo.questions import Maker, Question
from compodistill.tools.demo.scenes import NUMBERS, Draws, Scene


def locate(scene: Scene, draws: Draws, want: bool) -> Question:
    """Size, row and column of a named thing."""
    thing = draws.pick(scene.things)
    answer = f"{thing.size} {NUMBERS[thing.row + 1]} {NUMBERS[thing.column + 1]}"
    return Question("locate", f"the {thing.name}?", (answer,), answer)


def name(scene: Scene, draws: Draws, want: bool) -> Question:
    """The thing in a cell."""
    thing = draws.pick(scene.things)
    text = f"{NUMBERS[thing.row + 1]} {NUMBERS[thing.column + 1]}?"
    return Question("name", text, (thing.name,), thing.name)


def compare(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """How one named thing stands to another, across and down."""
    if len(scene.things) < 2:
        return None
    a, b = draws.sample(scene.things, 2)
    across = "nothing" if a.column == b.column else "left" if a.column < b.column else "right"
    down = "nothing" if a.row == b.row else "above" if a.row < b.row else "below"
    return Question("compare", f"the {a.name} the {b.name}?", (f"{across} {down}",), f"{across} {down}")


def both(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """Where two named things are, each asked as in `compare`: the step between finding and comparing."""
    if len(scene.things) < 2:
        return None
    a, b = draws.sample(scene.things, 2)
    answer = " ".join(NUMBERS[n + 1] for n in (a.row, b.row, a.column, b.column))
    return Question("both", f"the {a.name} the {b.name} where?", (answer,), answer)


DRILLS: dict[str, dict[str, Maker]] = {
    "finding": {"locate": locate, "name": name},
    "comparing": {"compare": compare, "both": both},
}
