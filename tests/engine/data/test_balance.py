"""Which rows of a step each rank gets."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.batches import log_balance
from engine.data.balance import deal_evenly, dearest_over_mean
from engine.data.loader import Dealing
from engine.data.rows import DummyRows, RowSource


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


def test_the_dearest_rank_of_each_microbatch_is_what_others_wait_for():
    # 9 + 8 where each rank has 8 + 4.5 in the mean.
    assert dearest_over_mean([9, 7, 8, 1], [[[0], [2]], [[1], [3]]]) == 17 / 12.5
    assert dearest_over_mean([5, 5, 5], [[[0, 1]], [[2, 3]]]) == 10 / 7.5, "one place is a filler"


def test_a_run_says_how_evenly_its_ranks_attend(
    rows_of: Callable[..., RowSource], jsonl: Path, caplog: pytest.LogCaptureFixture
):
    dealing = Dealing.of(local_batch_size=2, global_batch_size=16, batch_degree=4)
    alone = Dealing.of(local_batch_size=2, global_batch_size=16, batch_degree=1)
    packed = rows_of("jsonl", jsonl, seq_len=256)
    same = DummyRows(seq_len=64, vocab_size=64, num_tokens=1 << 20, seed=0)
    with caplog.at_level("INFO", "tessera"):
        caplog.clear()
        log_balance(packed, alone)
        log_balance(same, dealing)
        log_balance(rows_of("jsonl", jsonl, seq_len=256, packing="none"), dealing)
        assert "to attend to" not in caplog.text, "nothing to tell apart, or nobody to wait for"
        log_balance(packed, dealing)
    found = re.search(r"has ([\d.]+) times the mean \(([\d.]+) if .* first 32 ", caplog.text)
    assert found is not None
    assert 1 <= float(found[1]) < float(found[2])
