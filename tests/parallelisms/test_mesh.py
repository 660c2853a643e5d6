"""Degrees: inferred, checked before anything is built, and turned into meshes."""

from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallelisms import ParallelConfig, ParallelDims
from tests.ranks import RankPool


def config(
    replicate: int = 1, shard: int = -1, tp: int = 1, cp: int = 1, **others: Any
) -> ParallelConfig:
    return ParallelConfig(
        context_parallel_degree=cp,
        **others,
        data_parallel_replicate_degree=replicate,
        data_parallel_shard_degree=shard,
        tensor_parallel_degree=tp,
    )


@pytest.mark.parametrize(
    ("replicate", "shard", "tp", "world_size", "inferred"),
    [(1, -1, 1, 1, 1), (1, -1, 1, 6, 6), (2, -1, 2, 16, 4), (4, -1, 2, 8, 1), (2, 3, 1, 6, 3)],
)
def test_the_shard_degree_takes_what_is_left(
    replicate: int, shard: int, tp: int, world_size: int, inferred: int
) -> None:
    dims = ParallelDims.of(config(replicate, shard, tp), world_size)
    assert (dims.dp_replicate, dims.dp_shard, dims.tp) == (replicate, inferred, tp)
    assert dims.world_size == world_size
    assert dims.batch_degree == replicate * inferred


@pytest.mark.parametrize(
    ("replicate", "shard", "tp", "world_size", "words"),
    [
        (1, -1, 3, 8, ["tensor_parallel_degree = 3", "8 ranks"]),
        (1, 2, 2, 8, ["data_parallel_shard_degree = 2", "is 4", "8 ranks", "-1 to infer"]),
        (2, 8, 1, 8, ["data_parallel_replicate_degree = 2", "is 16"]),
        (16, -1, 1, 8, ["data_parallel_replicate_degree = 16", "multiple of 16"]),
    ],
)
def test_degrees_that_do_not_multiply_to_the_world_are_refused(
    replicate: int, shard: int, tp: int, world_size: int, words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        ParallelDims.of(config(replicate, shard, tp), world_size)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor_parallel_degree", 0),
        ("tensor_parallel_degree", -1),
        ("data_parallel_replicate_degree", -1),
        ("data_parallel_shard_degree", 0),
        ("data_parallel_shard_degree", -2),
        ("context_parallel_degree", 0),
        ("pipeline_parallel_degree", 2),
        ("expert_parallel_degree", 4),
        ("expert_tensor_parallel_degree", 2),
    ],
)
def test_a_degree_that_cannot_be_is_refused_by_name(key: str, value: int) -> None:
    options: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=rf"parallelism\.{key} = {value}"):
        ParallelConfig(**options)


def layout(rank: int, world_size: int, replicate: int, shard: int, tp: int) -> tuple[Any, ...]:
    dims = ParallelDims.of(config(replicate, shard, tp), world_size).build("cpu")
    return (
        dims.batch_rank,
        dims.mesh("tp").get_local_rank(),
        dims.mesh("tp").size(),
        dims.mesh("batch").size(),
        dims.mesh("loss").size(),
        dims.mesh("fsdp").mesh_dim_names,
    )


def test_ranks_of_one_tensor_parallel_group_read_the_same_rows(ranks: RankPool) -> None:
    found = ranks(8, layout, 2, 2, 2)
    assert [f[0] for f in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [f[1] for f in found] == [0, 1] * 4
    assert found[0][2:] == (2, 4, 4, ("dp_replicate", "dp_shard"))


@pytest.mark.parametrize(
    ("replicate", "shard", "names"),
    [(1, 2, ("dp_shard",)), (2, 1, ("dp_replicate", "dp_shard"))],
)
def test_parameters_are_replicated_only_when_asked(
    ranks: RankPool, replicate: int, shard: int, names: tuple[str, ...]
) -> None:
    assert ranks(2, layout, replicate, shard, 1)[0][-1] == names


@pytest.mark.parametrize(
    ("cp", "words"),
    [
        (3, ["parallelism.context_parallel_degree = 3", "is 3", "8 ranks"]),
        (1, ["parallelism.data_parallel_replicate_degree = 3", "is 3", "8 ranks"]),
    ],
)
def test_the_context_degree_is_named_where_there_is_one(cp: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        ParallelDims.of(config(1 if cp > 1 else 3, -1, 1, cp), 8)
    assert all(word in str(error.value) for word in words), error.value
    assert ("context_parallel_degree" in str(error.value)) == (cp > 1)


def test_ranks_that_share_a_row_read_the_same_ones_and_shard_parameters() -> None:
    dims = ParallelDims.of(config(2, -1, 2, 4), 32)
    assert (dims.dp_shard, dims.batch_degree, dims.fsdp_degree) == (2, 4, 8)
    assert dims.world_size == 32
    assert dims.describe() == "dp_replicate 2 x dp_shard 2 x cp 4 x tp 2"
    assert ParallelDims.of(config(2, 2, 2), 8).describe() == "dp_replicate 2 x dp_shard 2 x tp 2"


def members(rank: int, world_size: int, replicate: int, shard: int, tp: int) -> dict[str, Any]:
    dims = ParallelDims.of(config(replicate, shard, tp, 2), world_size).build("cpu")
    axes = ("batch", "cp", "tp", "loss")
    found = {axis: dist.get_process_group_ranks(dims.mesh(axis).get_group()) for axis in axes}
    fsdp = dims.mesh("fsdp")
    shape = dict(zip(fsdp.mesh_dim_names or (), fsdp.shape, strict=True))
    return {**found, "fsdp": fsdp.mesh.flatten().tolist(), "shape": shape, "row": dims.batch_rank}


def test_the_axes_of_context_parallelism_join_the_right_ranks(ranks: RankPool) -> None:
    found = ranks(8, members, 1, 2, 2)  # rank = (dp_shard, cp, tp)
    assert [f["row"] for f in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found[5]["tp"] == [4, 5]
    assert found[5]["cp"] == [5, 7]
    assert found[5]["batch"] == [1, 5]
    assert found[5]["loss"] == found[5]["fsdp"] == [1, 3, 5, 7]
    assert found[5]["shape"] == {"dp_shard_cp": 4}


def test_a_replicated_layout_shards_over_the_ranks_that_share_a_row(ranks: RankPool) -> None:
    found = ranks(4, members, 2, 1, 1)  # rank = (dp_replicate, cp)
    assert [f["row"] for f in found] == [0, 0, 1, 1]
    assert [f["cp"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert found[3]["batch"] == [1, 3]
    assert found[3]["shape"] == {"dp_replicate": 2, "dp_shard_cp": 2}
    assert found[3]["loss"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "multiple"),
    [
        ({}, 1),
        ({"tp": 4}, 4),
        ({"tp": 4, "sequence_parallel": False}, 1),
        ({"cp": 2}, 4),
        ({"cp": 4, "tp": 2}, 16),
        ({"cp": 4, "tp": 2, "sequence_parallel": False}, 8),
    ],
)
def test_rows_are_padded_so_that_all_ranks_share_them_evenly(
    options: dict[str, Any], multiple: int
) -> None:
    assert config(**options).token_multiple == multiple


@pytest.mark.parametrize(
    ("options", "balanced"),
    [
        ({"cp": 2}, True),
        ({"cp": 2, "context_parallel_mode": "ring"}, True),
        ({"cp": 2, "context_parallel_load_balancer": None}, False),
        ({"cp": 2, "context_parallel_mode": "ulysses"}, False),
        ({}, False),
    ],
)
def test_tokens_are_dealt_head_and_tail_where_it_helps(
    options: dict[str, Any], balanced: bool
) -> None:
    assert ParallelDims.of(config(**options), 2).balanced == balanced


def on_a_fake_group(rank: int, world_size: int, cp: int) -> tuple[int, ...]:
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1024)
    dims = ParallelDims.of(config(4, -1, 8, cp), 1024).build("cpu")
    return dims.dp_shard, dims.batch_rank, dims.mesh("batch").size(), dims.mesh("fsdp").size()


def test_meshes_are_built_for_a_thousand_ranks_on_a_fake_group(ranks: RankPool) -> None:
    assert ranks(1, on_a_fake_group, 1) == [(32, 0, 128, 128)]
    assert ranks(1, on_a_fake_group, 4) == [(8, 0, 32, 128)]
