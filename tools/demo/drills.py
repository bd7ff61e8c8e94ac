"""Drills: terse questions that only the teacher's training asks.

A full question spends twenty words to supervise one; a drill spends four to supervise three ("the red circle?":
"small two three"). Finding a named thing in the picture and comparing two of them is all that composition needs.
A conversation of drills asks about each thing, or pair of things, once: where an answer can be had from the words
of another question, that is what a model learns first, and for long the only thing it learns.
"""

from __future__ import annotations

from itertools import combinations

from compodistill.tools.demo.questions import Question
from compodistill.tools.demo.scenes import NUMBERS, Draws, Scene, Thing


def drill(kind: str, text: str, answer: str) -> Question:
    return Question(kind, text, (answer,), answer)


def locate(thing: Thing) -> Question:
    """Size, row and column of a named thing."""
    row, column = NUMBERS[thing.row + 1], NUMBERS[thing.column + 1]
    return drill("locate", f"the {thing.name}?", f"{thing.size} {row} {column}")


def name(thing: Thing) -> Question:
    """The thing in a cell."""
    return drill("name", f"{NUMBERS[thing.row + 1]} {NUMBERS[thing.column + 1]}?", thing.name)


def look(thing: Thing, by_colour: bool) -> Question:
    """What goes with a colour, or with a shape."""
    if by_colour:
        return drill("look", f"the {thing.colour}?", thing.shape)
    return drill("look", f"the {thing.shape}?", thing.colour)


def compare(a: Thing, b: Thing) -> Question:
    """How one named thing stands to another, across and down."""
    across = "nothing" if a.column == b.column else "left" if a.column < b.column else "right"
    down = "nothing" if a.row == b.row else "above" if a.row < b.row else "below"
    return drill("compare", f"the {a.name} the {b.name}?", f"{across} {down}")


def both(a: Thing, b: Thing) -> Question:
    """Where two named things are: the step between finding and comparing."""
    answer = " ".join(NUMBERS[n + 1] for n in (a.row, b.row, a.column, b.column))
    return drill("both", f"the {a.name} the {b.name} where?", answer)


def finding(scene: Scene, draws: Draws) -> list[Question]:
    """Each thing once, by its name, by its place, or by its colour or shape."""
    things = draws.sample(scene.things, len(scene.things))
    ways = [draws.below(3) for _ in things]
    return [(locate(t), name(t), look(t, draws.coin()))[way] for t, way in zip(things, ways, strict=True)]


def comparing(scene: Scene, draws: Draws) -> list[Question]:
    """Each pair once, in either order; at times only where the first two are, so that nothing is given away."""
    pairs = [draws.sample(pair, 2) for pair in combinations(scene.things, 2)]
    pairs = draws.sample(pairs, len(pairs))
    if draws.below(3) == 0:
        return [both(*pairs[0])]
    return [compare(*pair) for pair in pairs]
