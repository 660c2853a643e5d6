"""Every layout from the one plan gives the loss and the gradients of one fp32 process."""

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import models.layers.rope
from tests.parity.cases import (
    BF16_ARITHMETIC,
    FP32_REORDERED_SUM,
    LAYOUTS,
    Case,
    build_case,
    compare,
    pairwise,
    run_case,
    train,
)
from tests.ranks import RankFailure, RankPool

SPLIT = [case for case in LAYOUTS if case.world_size > 1]


def check(ranks: RankPool, case: Case, tolerance: float = FP32_REORDERED_SUM) -> None:
    for result in ranks(case.world_size, run_case, case, timeout_seconds=280):
        result.check(tolerance)


def with_(cases: list[Case], **changes: Any) -> list[Case]:
    return [dataclasses.replace(case, **changes) for case in cases]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_each_layout_gives_single_process_gradients(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


CHECKPOINTED = [
    Case(replicate=2),
    Case(tp=2, sequence=False),
    Case(shard=2, tp=2, sequence=False),
    Case(replicate=2, tp=2),
]
"""In the others tests/parallelisms/test_activation_checkpoint.py finds the bits without it."""


@pytest.mark.parametrize("mode", ["full", "op", "2"])
@pytest.mark.parametrize("layout", CHECKPOINTED, ids=str)
def test_checkpointing_in_each_layout(ranks: RankPool, layout: Case, mode: str) -> None:
    check(ranks, dataclasses.replace(layout, checkpointing=mode, chunks=True))


@pytest.mark.parametrize("case", with_(SPLIT, tied=True, vocab=61), ids=str)
def test_tied_embeddings_with_an_odd_vocabulary_in_each_layout(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_each_pair_of_features_together(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


EIGHT_RANKS = [
    Case(replicate=2, shard=2, tp=2, checkpointing="op", tied=True, vocab=61),
    Case(shard=2, tp=4, chunks=True, checkpointing="full"),
    Case(shard=4, tp=2, sequence=False, loss_parallel=False, bias=True),
    Case(replicate=2, tp=4, offload=True, reshard="never", checkpointing="2"),
    Case(shard=8, tied=True, vocab=61),
    Case(replicate=8, vocab=61),
]


@pytest.mark.parametrize("case", EIGHT_RANKS, ids=str)
def test_eight_ranks(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


AOT_EAGER = [
    Case(shard=2, backend="aot_eager", checkpointing="2", tied=True),
    Case(tp=2, backend="aot_eager", vocab=61, chunks=True),
    Case(tp=2, sequence=False, backend="aot_eager", checkpointing="full", bias=True, tied=True),
    Case(tp=2, backend="aot_eager", checkpointing="budget", loss_parallel=False, neftune=True),
    Case(shard=2, backend="aot_eager", checkpointing="budget", packed=False),
]
"""FSDP with tensor parallelism is compiled in tests/parallelisms/test_traps.py."""


@pytest.mark.parametrize("case", AOT_EAGER, ids=str)
def test_compiled_blocks_give_the_same_gradients(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


BF16 = [
    Case(bfloat16=True),
    Case(shard=2, bfloat16=True),
    Case(tp=2, bfloat16=True, neftune=True),
    Case(replicate=2, tp=2, bfloat16=True, checkpointing="full", chunks=True),
]


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_compute_stays_near_fp32(ranks: RankPool, case: Case) -> None:
    check(ranks, case, BF16_ARITHMETIC)


def seen_dtypes(rank: int, world_size: int, case: Case) -> set[tuple[torch.dtype, ...]]:
    model, dims = build_case(case)
    seen = set()
    rotate = models.layers.rope.rotate

    def spy(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        seen.add((x.dtype, *(part.dtype for part in rotary)))
        return rotate(x, rotary)

    with patch("models.layers.rope.rotate", spy):
        train(model, dims, case)
    masters = {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None}
    assert masters == {(torch.float32, torch.float32)}, masters
    return seen


@pytest.mark.parametrize("case", BF16, ids=str)
def test_angles_reach_a_bf16_block_in_fp32(ranks: RankPool, case: Case) -> None:
    expected = {(torch.bfloat16, torch.float32, torch.float32)}
    assert ranks(case.world_size, seen_dtypes, case) == [expected] * case.world_size


# The check itself; more faults are planted in tests/engine/test_verify.py.


def with_a_missing_gradient(rank: int, world_size: int, zero: bool) -> None:
    case = Case(shard=2)
    model, dims = build_case(case)
    loss = train(model, dims, case)
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.grad = torch.zeros_like(weight) if zero else None
    compare(model, loss, case)


@pytest.mark.parametrize("zero", [True, False])
def test_the_check_fails_on_a_missing_or_zero_gradient(ranks: RankPool, zero: bool) -> None:
    with pytest.raises(RankFailure, match=r"layers\.1\.mlp\.up_proj\.weight (is zero|has no)"):
        ranks(2, with_a_missing_gradient, zero)
