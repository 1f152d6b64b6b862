"""Sets of layers: children, survivors and mutants."""

from actors.maths.subsets import extend_set, mutate_set, select_best, select_earliest, start_stream


def test_children_have_one_layer_more():
    assert extend_set((2, 4), [5, 2, 0]) == [(2, 4, 5), (0, 2, 4)]
    assert extend_set((), [1]) == [(1,)]


def test_of_equals_the_first_set_or_the_first_given_goes_on():
    sets, losses = [(3,), (1,), (2,), (0,)], [0.5, 0.5, 0.1, float("inf")]
    assert select_best(losses, sets, 2) == [(2,), (1,)]
    assert select_earliest(losses, sets, 2) == [(2,), (3,)]
    assert select_best(losses, sets, 9) == [(2,), (1,), (3,), (0,)]
    assert select_earliest(losses, sets, 9) == [(2,), (3,), (1,), (0,)]


def test_mutants_swap_layers_and_never_repeat():
    random = start_stream(0)
    found = mutate_set(random, (1, 4), [0, 1, 2, 3, 4, 5], 8)
    assert len(found) == len(set(found)) == 8 and (1, 4) not in found
    assert all(len(removed) == 2 and list(removed) == sorted(removed) for removed in found)
    assert mutate_set(random, (0, 1), [0, 1], 4) == []
    assert len(mutate_set(random, (0,), [0, 1, 2], 9)) == 2, "there are only two others"


def test_generations_draw_from_one_stream():
    """The second draws on; the same seed draws the same two."""
    one, same = ([mutate_set(stream, (0, 1, 2), range(9), 6) for _ in range(2)] for stream in map(start_stream, (5, 5)))
    assert one == same and one[0] != one[1]
