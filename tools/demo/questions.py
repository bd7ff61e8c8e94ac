"""Questions about a scene, each with short options and the right one.

Recognition asks what is there, one object at a time. Composition asks how words bind, after SugarCrepe:
the wrong caption has the same words in another order (`swap_*`) or one word replaced (`replace_*`), so that
knowing which objects are there is not enough. Every composition question has two options that are right
equally often, whatever the words: chance is 50% for whoever does not look.

Localisation (where is it, what stands beside it) is the curriculum that makes relations learnable by degrees;
it is asked in training conversations only.

A maker takes (scene, draws, want) and returns a question whose right answer is the first option if `want`
and the second if not, or None where the scene has no such question. Makers with more than two options
ignore `want`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compodistill.tools.demo.scenes import (
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZES,
    Draws,
    Scene,
    Thing,
    opposite,
    related,
)

YES_NO = ("yes", "no")
CHOICE = ("A", "B")


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    options: tuple[str, ...]
    answer: str


Maker = Callable[[Scene, Draws, bool], Question | None]


def caption_holds(scene: Scene, first: str, relation: str | None, second: str) -> bool:
    """Whether a caption is true: both named things are there and, if a relation is given, stand in it."""
    a, b = scene.named(first), scene.named(second)
    return a is not None and b is not None and (relation is None or related(a, relation, b))


def caption(first: str, relation: str | None, second: str) -> str:
    if relation is None:
        return f"there is a {first} and a {second}"
    return f"the {first} is {relation} the {second}"


# recognition


def exists(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """Absent names lack their colour or their shape in the whole scene: binding is left to composition."""
    present = [t.name for t in scene.things]
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    absent = [f"{c} {s}" for c in COLOURS for s in SHAPES if c not in colours or s not in shapes]
    pool = present if want else absent
    if not pool:
        return None
    return Question("exists", f"is there a {draws.pick(pool)}?", YES_NO, YES_NO[0 if want else 1])


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    values = [getattr(t, attribute) for t in scene.things]
    return [t for t in scene.things if values.count(getattr(t, attribute)) == 1]


def colour(scene: Scene, draws: Draws, want: bool) -> Question | None:
    if not (things := _unique(scene, "shape")):
        return None
    thing = draws.pick(things)
    return Question("colour", f"what colour is the {thing.shape}?", tuple(COLOURS), thing.colour)


def shape(scene: Scene, draws: Draws, want: bool) -> Question | None:
    if not (things := _unique(scene, "colour")):
        return None
    thing = draws.pick(things)
    return Question("shape", f"what shape is the {thing.colour} thing?", SHAPES, thing.shape)


def size(scene: Scene, draws: Draws, want: bool) -> Question | None:
    options = tuple(SIZES)
    things = [t for t in scene.things if t.size == options[0 if want else 1]]
    if not things:
        return None
    thing = draws.pick(things)
    return Question("size", f"is the {thing.name} {options[0]} or {options[1]}?", options, thing.size)


def count(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """The number is drawn first among those the scene has, so that zero does not swamp the rest."""
    answers: dict[int, list[str]] = {}
    for shape_ in SHAPES:
        answers.setdefault(sum(t.shape == shape_ for t in scene.things), []).append(f"{shape_}s")
    for colour_ in COLOURS:
        answers.setdefault(sum(t.colour == colour_ for t in scene.things), []).append(f"{colour_} things")
    number = draws.pick(sorted(answers))
    text = f"how many {draws.pick(answers[number])} are there?"
    return Question("count", text, NUMBERS[: len(scene.things) + 1], NUMBERS[number])


# composition


def _ordered_pairs(scene: Scene) -> list[tuple[Thing, Thing]]:
    return [(a, b) for a in scene.things for b in scene.things if a is not b]


def _true_relation(a: Thing, b: Thing, draws: Draws) -> str:
    return draws.pick([r for r in RELATIONS if related(a, r, b)])


Words = tuple[str, str | None, str]


def _ask(kind: str, draws: Draws, want: bool, right: Words, wrong: Words, choose: bool) -> Question:
    """Either choose between the two captions, or judge one of them."""
    if choose:
        first, second = (right, wrong) if want else (wrong, right)
        text = f"which is true? (A) {caption(*first)}. (B) {caption(*second)}."
        return Question(kind, text, CHOICE, CHOICE[0 if want else 1])
    text = f"is it true? {caption(*(right if want else wrong))}."
    return Question(kind, text, YES_NO, YES_NO[0 if want else 1])


def swap_attribute(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """Two things exchange their colours: red circle, blue square -> blue circle, red square."""
    pairs = [(a, b) for a, b in _ordered_pairs(scene) if a.colour != b.colour and a.shape != b.shape]
    with_relation, choose = draws.coin(), draws.coin()
    if not pairs:
        return None
    a, b = draws.pick(pairs)
    relation = _true_relation(a, b, draws) if with_relation else None
    wrong = (f"{b.colour} {a.shape}", relation, f"{a.colour} {b.shape}")
    if caption_holds(scene, *wrong):
        return None
    return _ask("swap_attribute", draws, want, (a.name, relation, b.name), wrong, choose)


def swap_object(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """Two things exchange their places in the caption."""
    choose = draws.coin()
    if len(scene.things) < 2:
        return None
    a, b = draws.pick(_ordered_pairs(scene))
    relation = _true_relation(a, b, draws)
    return _ask("swap_object", draws, want, (a.name, relation, b.name), (b.name, relation, a.name), choose)


def replace_relation(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """The relation gives way to another one that does not hold."""
    choose = draws.coin()
    if len(scene.things) < 2:
        return None
    a, b = draws.pick(_ordered_pairs(scene))
    relation = _true_relation(a, b, draws)
    other = draws.pick([r for r in RELATIONS if not related(a, r, b)])
    return _ask("replace_relation", draws, want, (a.name, relation, b.name), (a.name, other, b.name), choose)


def replace_attribute(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """One thing's colour or shape gives way to another that the scene has elsewhere.

    With a colour or shape that is nowhere in the picture the question would be recognition: the new name is
    made of parts that are all there, in a combination that is not. Neither the old nor the new value is that
    of the caption's other thing: otherwise repeated words would betray the wrong caption to a blind reader.
    """
    choose, with_relation, first_changes = draws.coin(), draws.coin(), draws.coin()
    if len(scene.things) < 2:
        return None
    a, b = draws.pick(_ordered_pairs(scene))
    changed, other = (a, b) if first_changes else (b, a)
    names = []
    if changed.colour != other.colour:
        names += [f"{c} {changed.shape}" for c in sorted({t.colour for t in scene.things} - {other.colour})]
    if changed.shape != other.shape:
        names += [f"{changed.colour} {s}" for s in sorted({t.shape for t in scene.things} - {other.shape})]
    names = [n for n in names if scene.named(n) is None]
    if not names:
        return None
    new = draws.pick(names)
    relation = _true_relation(a, b, draws) if with_relation else None
    wrong = (new, relation, b.name) if first_changes else (a.name, relation, new)
    return _ask("replace_attribute", draws, want, (a.name, relation, b.name), wrong, choose)


def relation_yes_no(scene: Scene, draws: Draws, want: bool) -> Question | None:
    if len(scene.things) < 2:
        return None
    a, b = draws.pick(_ordered_pairs(scene))
    relation = _true_relation(a, b, draws)
    if not want:
        a, b, relation = (b, a, relation) if draws.coin() else (a, b, opposite(relation))
    text = f"is the {a.name} {relation} the {b.name}?"
    return Question("relation_yes_no", text, YES_NO, YES_NO[0 if want else 1])


# localisation: training only


def where(scene: Scene, draws: Draws, want: bool) -> Question | None:
    line = draws.pick(("row", "column"))
    thing = draws.pick(scene.things)
    text = f"which {line} is the {thing.name} in?"
    return Question("where", text, NUMBERS[1 : scene.grid + 1], NUMBERS[1 + getattr(thing, line)])


def side(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """Which half of the picture a thing stands in."""
    thing = draws.pick(scene.things)
    line, names = draws.pick((("row", ("top", "bottom")), ("column", ("left", "right"))))
    at_second = 2 * getattr(thing, line) >= scene.grid
    text = f"is the {thing.name} at the {names[0]} or the {names[1]}?"
    return Question("side", text, names, names[int(at_second)])


def beside(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """What is left of it: asked where the answer is one thing or nothing."""
    pairs = [(t, r) for t in scene.things for r in RELATIONS]
    answers = {p: [o.name for o in scene.things if related(o, p[1], p[0])] for p in pairs}
    pairs = [p for p in pairs if len(answers[p]) <= 1]
    if not pairs:
        return None
    thing, relation = draws.pick(pairs)
    names = (*(t.name for t in scene.things if t is not thing), "nothing")
    text = f"what is {relation} the {thing.name}?"
    return Question("beside", text, names, (answers[thing, relation] or ["nothing"])[0])


def at(scene: Scene, draws: Draws, want: bool) -> Question | None:
    """What a cell holds; empty cells are asked for one time in four."""
    thing = draws.pick(scene.things)
    row, column, name = thing.row, thing.column, thing.name
    if draws.below(4) == 0:
        taken = {(t.row, t.column) for t in scene.things}
        cells = [(r, c) for r in range(scene.grid) for c in range(scene.grid) if (r, c) not in taken]
        (row, column), name = draws.pick(cells), "nothing"
    names = (*(t.name for t in scene.things), "nothing")
    text = f"what is in row {NUMBERS[row + 1]} column {NUMBERS[column + 1]}?"
    return Question("at", text, names, name)


RECOGNITION: dict[str, Maker] = {m.__name__: m for m in (exists, colour, shape, size, count)}
COMPOSITION: dict[str, Maker] = {
    m.__name__: m for m in (swap_attribute, swap_object, replace_relation, replace_attribute, relation_yes_no)
}
LOCALISATION: dict[str, Maker] = {m.__name__: m for m in (where, side, at, beside)}


def without_picture(draws: Draws) -> Question:
    """A question words alone answer: what follows from a relation that is given."""
    first, second = draws.sample([f"{c} {s}" for c in COLOURS for s in SHAPES], 2)
    relation, want = draws.pick(RELATIONS), draws.coin()
    asked = opposite(relation) if want else relation
    text = f"say {caption(first, relation, second)}. is the {second} {asked} the {first}?"
    return Question("without_picture", text, YES_NO, YES_NO[0 if want else 1])
