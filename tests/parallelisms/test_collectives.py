"""Sums over axes, and cuts into shards."""

import pytest
import torch

from parallelisms import ParallelConfig, ParallelDims
from parallelisms.collectives import shard_range, sum_over
from tests.ranks import RankPool


@pytest.mark.parametrize(("size", "shards"), [(8, 2), (7, 2), (7, 4), (3, 8), (61, 4), (1, 1)])
def test_shards_are_cut_as_torch_chunk_cuts(size: int, shards: int) -> None:
    whole = torch.arange(size)
    parts = [whole[shard_range(size, shards, i)] for i in range(shards)]
    expected = [*whole.chunk(shards), *[whole[:0]] * shards][:shards]
    assert [p.tolist() for p in parts] == [e.tolist() for e in expected]


def axis_sums(rank: int, world_size: int) -> list[float]:
    config = ParallelConfig(data_parallel_replicate_degree=2, tensor_parallel_degree=2)
    dims = ParallelDims.of(config, world_size).build("cpu")
    mine = torch.tensor(10.0**rank)
    return [sum_over(dims, axis, mine).item() for axis in ("tp", "batch", "loss")]


def test_a_sum_runs_over_the_named_axis_alone(ranks: RankPool) -> None:
    found = ranks(4, axis_sums)
    assert found[0] == [11.0, 101.0, 101.0]
    assert found[3] == [1100.0, 1010.0, 1010.0]
