import pytest

from compodistill.errors import UsageError
from compodistill.groups import layer_groups, understanding_layers


@pytest.mark.parametrize(
    ("n_layers", "first", "last"),
    [(40, 12, 27), (24, 7, 16), (30, 9, 20), (10, 3, 6), (8, 2, 5), (4, 1, 2), (1, 0, 0)],
)
def test_understanding_layers_are_the_middle_thirty_to_seventy_percent(n_layers, first, last):
    layers = understanding_layers(n_layers)
    assert (layers[0], layers[-1]) == (first, last)


@pytest.mark.parametrize(("m", "k"), [(16, 10), (4, 2), (4, 4), (4, 1), (12, 7)])
def test_windows_slide_by_one_and_use_every_teacher_layer(m, k):
    groups = layer_groups(range(5, 5 + m), k)
    assert len(groups) == k
    assert {last - first + 1 for first, last in groups} == {m - k + 1}
    assert [first for first, _ in groups] == list(range(5, 5 + k))
    assert groups[-1][1] == 5 + m - 1


def test_student_deeper_than_teacher_is_refused():
    with pytest.raises(UsageError, match="cannot be matched"):
        layer_groups(range(4), 5)
