"""Which teacher layers a student layer is matched with (CompoDistill, arXiv 2510.12184, section 4)."""

from __future__ import annotations

from compodistill.errors import UsageError


def understanding_layers(n_layers: int) -> range:
    """The decoder layers in the middle 30-70%: 0-based, from floor(.3 L) up to (not including) ceil(.7 L).

    40 layers -> 12..27, 24 -> 7..16, 30 -> 9..20, 8 -> 2..5, 4 -> 1..2.

    Raises:
        UsageError: fewer than one layer.
    """
    if n_layers < 1:
        raise UsageError(f"a decoder of {n_layers} layers has no understanding layers")
    return range(3 * n_layers // 10, -(-7 * n_layers // 10))  # integers: .3 and .7 are not exact in binary


def layer_groups(teacher_layers: range, n_student: int) -> list[tuple[int, int]]:
    """The sliding windows of teacher layers, one for each of the student's understanding layers.

    With m teacher and k student layers, student layer j is matched with the mean of the n = m - k + 1
    consecutive teacher layers j .. j + n - 1; every teacher layer is used (group layer matching, section 4.1).

    Returns:
        `n_student` pairs (first, last) of absolute teacher layer indices, both included.

    Raises:
        UsageError: the student has more understanding layers than the teacher, or none.
    """
    m = len(teacher_layers)
    if not 1 <= n_student <= m:
        raise UsageError(
            f"a student with {n_student} understanding layers cannot be matched with a teacher's {m}",
            remedy="choose a student that is not deeper than the teacher",
        )
    window = m - n_student + 1
    return [(teacher_layers[j], teacher_layers[j + window - 1]) for j in range(n_student)]
