"""The rank pool itself: results, tracebacks, dead and hung workers."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, RankPool


def rank_sum(rank: int, world_size: int, extra: int) -> int:
    total = torch.tensor(rank + extra)
    dist.all_reduce(total)
    return int(total)


def returns_a_tensor(rank: int, world_size: int) -> torch.Tensor:
    return torch.full((2,), float(rank))


def raises_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("a planted mistake")
    dist.barrier()


def dies_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hangs_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_rank_runs_in_its_own_group(ranks: RankPool, world_size: int) -> None:
    expected = world_size * (world_size - 1) // 2 + 3 * world_size
    assert ranks(world_size, rank_sum, 3) == [expected] * world_size


def test_results_come_back_by_rank(ranks: RankPool) -> None:
    assert [r.tolist() for r in ranks(2, returns_a_tensor)] == [[0.0, 0.0], [1.0, 1.0]]


def test_an_exception_comes_back_as_the_child_traceback_and_the_pool_goes_on(
    ranks: RankPool,
) -> None:
    with pytest.raises(RankFailure, match=r"rank 1: (.|\n)*raises_on_rank_one(.|\n)*planted"):
        ranks(2, raises_on_rank_one)
    assert ranks(2, rank_sum, 0) == [1, 1]


def test_a_dead_worker_fails_its_test_and_the_pool_goes_on(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1: the worker died with exit code 7"):
        ranks(2, dies_on_rank_one)
    assert ranks(2, rank_sum, 0) == [1, 1]


def test_a_hung_worker_fails_its_test_in_time_and_the_pool_goes_on(ranks: RankPool) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1: no answer in 1\.5 seconds"):
        ranks(2, hangs_on_rank_one, timeout_seconds=1.5)
    assert time.monotonic() - started < 20
    assert ranks(2, rank_sum, 0) == [1, 1]


def crash_until(rank: int, world_size: int, marker: Path, times: int) -> int:
    before = int(marker.read_text()) if marker.exists() else 0
    if rank == 1 and before < times:
        marker.write_text(str(before + 1))
        os.abort()
    return before


def test_a_crash_in_native_code_is_tried_once_more_with_a_warning(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="crashed in native code"):
        assert rank_pool(2, crash_until, tmp_path / "once", 1)[1] == 1


def test_a_crash_in_native_code_that_comes_back_is_a_failure(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    with (
        pytest.warns(UserWarning, match="crashed in native code"),
        pytest.raises(RankFailure, match="exit code -6"),
    ):
        rank_pool(2, crash_until, tmp_path / "always", 9)
