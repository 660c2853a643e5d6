"""Values: each rank writes exactly its part, and the parts are the same bits in every layout."""

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from models.decoder import DecoderLM
from models.initialise import initial_values
from parallelisms import ParallelConfig, ParallelDims
from parallelisms.materialise import fill, local_slices, tied_names
from parallelisms.shared_fill import fill_shared
from tests.parity.cases import LAYOUTS, Case, build_case, model_config
from tests.ranks import RankPool

UNEVEN = [
    *(dataclasses.replace(case, vocab=61) for case in LAYOUTS),
    Case(replicate=2, shard=2, tp=2, vocab=61, bias=True),
    Case(shard=3, vocab=61),
    Case(shard=8, vocab=17),
    Case(shard=2, tp=2, vocab=61, tied=True),
]
"""Odd vocabularies, and norms of 32 channels over 3 or 8 ranks."""


def counted(shape: torch.Size | tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def fill_and_gather(rank: int, world_size: int, case: Case) -> None:
    model, _ = build_case(case)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    drawn = set()

    def draw(name: str, slices: tuple[slice, ...]) -> Tensor:
        drawn.add(name)
        return counted(shapes[name])[slices]

    fill(model, draw)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), counted(shapes[name])), name
        local = counted(shapes[name])[local_slices(parameter)]
        assert torch.equal(parameter.to_local(), local), name
    if case.shard < 8:
        assert drawn == set(shapes)
    share_and_gather(model, shapes)


def share_and_gather(model: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Fill it again, each element of a matrix drawn by one rank of all."""
    for parameter in model.parameters():
        parameter.detach().zero_()
    drawn = {name: torch.zeros(shape) for name, shape in shapes.items()}

    def draw(name: str, slices: tuple[slice, ...]) -> Tensor:
        drawn[name][slices] += 1.0
        return counted(shapes[name])[slices]

    with patch("parallelisms.shared_fill.BYTES_AT_ONCE", 1100):  # 8 rows of 32 and a rest
        fill_shared(model, draw, skip={"model.norm.weight"}, share_replicas=True)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        expected = counted(shapes[name]) * (name != "model.norm.weight")
        assert torch.equal(parameter.full_tensor(), expected), name
        assert torch.equal(parameter.to_local(), expected[local_slices(parameter)]), name
    times = torch.cat([t.flatten() for t in drawn.values() if t.ndim > 1])
    dist.all_reduce(times)
    assert torch.equal(times, torch.ones_like(times))


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_each_rank_fills_exactly_its_part(ranks: RankPool, case: Case) -> None:
    ranks(case.world_size, fill_and_gather, case)


def initial_parts(rank: int, world_size: int, case: Case) -> None:
    torch.manual_seed(rank)  # the global generator must not matter
    before = torch.get_rng_state()
    config = model_config(case)
    model, _ = build_case(case)
    fill(model, initial_values(model, config, seed=11))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(123)
    alone = DecoderLM(config)
    fill(alone, initial_values(alone, config, seed=11))
    for name, expected in alone.named_parameters():
        parameter = model.get_parameter(name)
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), expected), name
    embedding = alone.get_parameter("model.embed_tokens.weight")
    halves = embedding[: case.vocab // 2 * 2].chunk(2)
    assert not torch.equal(*halves), "shards are not copies of each other"


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_initial_values_are_the_same_bits_in_every_layout(ranks: RankPool, case: Case) -> None:
    ranks(case.world_size, initial_parts, case)


def slices_of(rank: int, world_size: int) -> list[Any]:
    dims = ParallelDims.of(ParallelConfig(tensor_parallel_degree=2), world_size).build("cpu")
    whole = counted((7, 6))
    tp = distribute_tensor(whole, dims.mesh("tp"), (Shard(1),))
    dp = distribute_tensor(whole, dims.mesh("fsdp"), (Shard(0),))
    both = distribute_tensor(whole, dims.mesh("tp"), (Replicate(),))
    assert torch.equal(tp.to_local(), whole[local_slices(tp)])
    assert torch.equal(dp.to_local(), whole[local_slices(dp)])
    assert local_slices(both) == local_slices(whole) == (slice(0, 7), slice(0, 6))
    return [local_slices(dp)[0], local_slices(tp)[1]]


def test_slices_follow_the_mesh_of_each_tensor(ranks: RankPool) -> None:
    rows = [slice(0, 4), slice(0, 4), slice(4, 7), slice(4, 7)]
    columns = [slice(0, 3), slice(3, 6)] * 2
    assert ranks(4, slices_of) == [[r, c] for r, c in zip(rows, columns, strict=True)]


def ties_through_the_stages(rank: int, world_size: int, case: Case) -> bool:
    model, _ = build_case(case)
    pair = ("model.embed_tokens.weight", "lm_head.weight")
    assert tied_names(model) == [pair]
    optimizer = torch.optim.AdamW(model.parameters())
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(dict(model.named_parameters()))
    return model.get_parameter(pair[0]) is model.get_parameter(pair[1])


@pytest.mark.parametrize("case", [c for c in LAYOUTS if c.world_size <= 2], ids=str)
def test_tied_weights_are_one_object_after_materialising(ranks: RankPool, case: Case) -> None:
    tied = dataclasses.replace(case, tied=True)
    assert ranks(case.world_size, ties_through_the_stages, tied) == [True] * case.world_size


def fill_with_a_bad_disk(rank: int, world_size: int) -> str:
    model, _ = build_case(Case(tp=2))

    def draw(name: str, slices: tuple[slice, ...]) -> Tensor:
        if rank == 1 and name.endswith("up_proj.weight"):
            raise OSError("bad sector")
        return torch.zeros([part.stop - part.start for part in slices])

    try:
        fill_shared(model, draw)
    except OSError as error:
        return str(error)
    return ""


def test_a_rank_that_cannot_read_leaves_no_other_waiting(ranks: RankPool) -> None:
    assert ranks(2, fill_with_a_bad_disk) == ["", "bad sector"]
