"""The norm over gradients that lie on different meshes, and clipping by it."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallelisms import ParallelConfig, ParallelDims
from tests.engine.training_cases import clip_gradients
from tests.parity.cases import LAYOUTS, Case, build_case, reference, reference_case, train
from tests.ranks import RankPool


def mixed_norm(rank: int, world_size: int, max_norm: float) -> tuple[float, list[torch.Tensor]]:
    dims = ParallelDims.of(ParallelConfig(tensor_parallel_degree=2), world_size).build("cpu")
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(5, 6, generator=generator) for _ in range(5)]
    tp, fsdp, root = dims.mesh("tp"), dims.mesh("fsdp"), dims.root
    assert root is not None
    values = [
        distribute_tensor(whole[0], tp, (Shard(1),)),
        distribute_tensor(whole[1], fsdp, (Shard(0),)),
        distribute_tensor(whole[2], tp, (Replicate(),)),
        distribute_tensor(whole[3], root["dp_shard", "tp"], (Shard(0), Shard(1))),
        whole[4].clone(),
    ]
    parameters = [nn.Parameter(torch.zeros_like(v)) for v in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value
    norm = clip_gradients([*parameters, nn.Parameter(torch.ones(3))], max_norm)
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    return norm.item(), [g for g in grads if g is not None]


@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
def test_the_norm_over_mixed_meshes_is_that_of_the_whole_gradients(
    ranks: RankPool, max_norm: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(5, 6, generator=generator) for _ in range(5)]
    expected = math.sqrt(sum(g.square().sum().item() for g in whole))
    scale = min(1.0, max_norm / expected)
    for norm, gradients in ranks(4, mixed_norm, max_norm):
        assert norm == pytest.approx(expected, rel=1e-6)
        for found, gradient in zip(gradients, whole, strict=True):
            torch.testing.assert_close(found, gradient * scale, rtol=1e-5, atol=1e-7)


def clip_a_model(rank: int, world_size: int, case: Case) -> tuple[float, float]:
    model, dims = build_case(case)
    train(model, dims, case)
    norm = clip_gradients(model.parameters(), 0.1).item()
    return norm, clip_gradients(model.parameters(), math.inf).item()


CLIPPED = [
    *LAYOUTS,
    Case(shard=2, tp=2, tied=True, vocab=61),
    Case(replicate=2, shard=2, tp=2, bias=True),
    Case(shard=8, vocab=17),
    Case(shard=2, offload=True),
]


@pytest.mark.parametrize("case", CLIPPED, ids=str)
def test_clipping_equals_that_of_one_process(ranks: RankPool, case: Case) -> None:
    gradients = reference(reference_case(case))[1]
    expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    for norm, clipped in ranks(case.world_size, clip_a_model, case):
        assert norm == pytest.approx(expected, rel=2e-6)
        assert clipped == pytest.approx(0.1, rel=1e-4)


def test_reference_gradients_do_not_depend_on_the_layout() -> None:
    case = Case(shard=2, tp=2)
    assert reference_case(case) == reference_case(dataclasses.replace(case, replicate=2))
