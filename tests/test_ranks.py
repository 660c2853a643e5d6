"""The rank pool itself: results, tracebacks, dead and hung workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parity.cases import Case, run_case
from tests.ranks import RankFailure, RankPool


def rank_sum(rank: int, world_size: int, extra: int) -> int:
    total = torch.tensor(rank + extra)
    dist.all_reduce(total)
    return int(total)


def returns_a_tensor(rank: int, world_size: int) -> torch.Tensor:
    return torch.full((2,), float(rank))


NO_BACKWARD = """
import torch
import torch.autograd.graph as graph
def refuse(*given, **named): raise AssertionError("autograd started")
graph._engine_run_backward = torch.autograd._engine_run_backward = refuse
import tests.preloaded
"""


def test_what_ranks_are_forked_from_has_started_no_autograd() -> None:
    """Where torch sees GPUs, the threads of autograd would make every backward of a rank fail."""
    command = [sys.executable, "-c", NO_BACKWARD]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)


def raises_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("a planted mistake")
    dist.barrier()


def dies_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def crashes_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


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


def test_a_crashed_worker_leaves_its_stack(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"exit code -11\n(.|\n)*in crashes_on_rank_one"):
        ranks(2, crashes_on_rank_one)


def test_a_hung_worker_fails_its_test_in_time_and_the_pool_goes_on(ranks: RankPool) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1: no answer in 1\.5 seconds"):
        ranks(2, hangs_on_rank_one, timeout_seconds=1.5)
    assert time.monotonic() - started < 20
    assert ranks(2, rank_sum, 0) == [1, 1]


def live_groups(rank: int, world_size: int) -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are named in /proc")
def test_process_groups_end_with_the_call_that_made_them(ranks: RankPool) -> None:
    if (alive := ranks(2, live_groups)) == [0, 0]:
        pytest.skip("gloo of this torch does not name its threads")
    assert alive == [1, 1]
    for case in (Case(tp=2), Case(replicate=2, backend="aot_eager")):
        ranks(2, run_case, case)
        assert ranks(2, live_groups) == [1, 1]
