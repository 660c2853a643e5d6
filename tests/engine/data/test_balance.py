"""Which rows of a step each rank gets."""

import random

import pytest

from engine.data.balance import deal_evenly


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_every_place_is_dealt_once_and_every_rank_has_as_many(
    ranks: int, size: int, microbatches: int
):
    total = ranks * size * microbatches
    draw = random.Random(total)
    for num_rows in range(max(1, total - 3), total + 1):
        costs = [draw.randrange(1000) for _ in range(num_rows)]
        dealt = deal_evenly(costs, microbatches=microbatches, ranks=ranks, size=size)
        assert len(dealt) == ranks
        assert all(len(mine) == microbatches for mine in dealt)
        assert {len(places) for mine in dealt for places in mine} == {size}
        places = [place for mine in dealt for share in mine for place in share]
        assert sorted(places) == list(range(total)), "with fillers behind the rows"


def test_rows_of_like_cost_meet_and_the_dearest_come_first():
    dealt = deal_evenly([1, 9, 5, 2, 8, 6], microbatches=3, ranks=2, size=1)
    assert dealt == [[[1], [5], [3]], [[4], [2], [0]]]


def test_within_a_microbatch_the_dear_go_with_the_cheap():
    (first,), (second,) = deal_evenly([10, 7, 5, 2], microbatches=1, ranks=2, size=2)
    assert (first, second) == ([0, 3], [1, 2])
    (first,), (second,) = deal_evenly([7, 7, 7], microbatches=1, ranks=2, size=2)
    assert (first, second) == ([0, 1], [2, 3]), "all the same: neighbours, and the filler last"


def test_fillers_go_where_there_is_most_to_do():
    (first,), (second,) = deal_evenly([100, 10, 10], microbatches=1, ranks=2, size=2)
    assert (first, second) == ([0, 3], [1, 2])
