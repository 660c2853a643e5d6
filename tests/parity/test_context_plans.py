"""Ranks that share the tokens of a row give the loss and gradients of one fp32 process."""

import dataclasses
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch._dynamo.utils
import torch.nn.attention.varlen
from torch import Tensor

import models.attention.sdpa
import models.attention.varlen
from engine.verify.subject import TINY
from models.decoder import DECODER_PLAN
from tests.models.document_kernels import cpu_varlen
from tests.parity.cases import (
    BF16_ARITHMETIC,
    FP32_REORDERED_SUM,
    Case,
    Comparison,
    build_case,
    compare,
    run_case,
    train,
)
from tests.ranks import RankFailure, RankPool

MODES = ("allgather", "ring", "ulysses")


def check(ranks: RankPool, case: Case, tolerance: float = FP32_REORDERED_SUM) -> None:
    for result in ranks(case.world_size, run_case, case, timeout_seconds=280):
        result.check(tolerance)


ALONE = [
    *(Case(cp=n, context=m, packed=p) for m, n, p in product(MODES, (2, 4), (True, False))),
    Case(cp=2, balanced=False),
    Case(cp=4, context="ring", balanced=False, packed=False),
]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_each_mode_gives_single_process_gradients(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


LAYOUTS = [
    Case(cp=2, tp=2),
    Case(cp=2, tp=2, sequence=False),
    Case(cp=2, shard=2),
    Case(cp=2, replicate=2),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_mode_in_each_layout(ranks: RankPool, layout: Case, mode: str) -> None:
    check(ranks, dataclasses.replace(layout, context=mode, packed=layout.tp > 1))


@pytest.mark.parametrize("checkpointing", ["full", "op"])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_in_each_mode(ranks: RankPool, mode: str, checkpointing: str) -> None:
    check(ranks, Case(cp=2, tp=2, context=mode, checkpointing=checkpointing, tied=True, vocab=61))


SWITCHES = [
    Case(cp=2, shard=2, context="ulysses", tied=True, accumulate=2, reshard="never"),
    Case(cp=2, tp=2, context="ring", loss_parallel=False, bias=True, chunks=True),
    Case(cp=2, replicate=2, accumulate=2, offload=True, attention="eager"),
]


@pytest.mark.parametrize("case", SWITCHES, ids=str)
def test_other_switches(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


EIGHT_RANKS = [
    Case(cp=2, tp=2, shard=2, checkpointing="op"),
    Case(cp=2, tp=2, shard=2, context="ring", checkpointing="full"),
    Case(cp=2, tp=2, replicate=2, context="ulysses", tied=True, vocab=61),
    Case(cp=2, shard=2, replicate=2, packed=False),
    Case(cp=8, context="ulysses"),  # twice as many ranks as key/value heads
]


@pytest.mark.parametrize("case", EIGHT_RANKS, ids=str)
def test_eight_ranks(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


AOT_EAGER = [
    Case(cp=2, checkpointing="op", backend="aot_eager"),
    Case(cp=2, context="ulysses", checkpointing="op", packed=False, backend="aot_eager"),
    Case(cp=2, tp=2, context="ring", backend="aot_eager"),
]


@pytest.mark.parametrize("case", AOT_EAGER, ids=str)
def test_compiled_blocks_give_the_same_gradients(ranks: RankPool, case: Case) -> None:
    check(ranks, case)


RING = [Case(cp=2, context="ring", checkpointing="op", packed=False, backend="aot_eager")]


@pytest.mark.parametrize("case", RING, ids=str)
def test_a_compiled_ring_with_checkpointing_gives_the_same_gradients(
    ranks: RankPool, case: Case
) -> None:
    check(ranks, case)


def graphs_of_many_blocks(rank: int, world_size: int, case: Case) -> int:
    """Return how many graphs a model of more blocks than the compiler would make anew needs."""
    blocks = torch._dynamo.config.recompile_limit + 1
    subject = dataclasses.replace(TINY, config=dataclasses.replace(TINY.config, num_layers=blocks))
    torch._dynamo.utils.counters.clear()
    model, dims = build_case(case, subject=subject)
    train(model, dims, case, subject)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", MODES)
def test_all_blocks_share_one_compiled_graph(ranks: RankPool, mode: str) -> None:
    block_and_loss = 2
    case = Case(cp=2, context=mode, backend="aot_eager")
    assert ranks(2, graphs_of_many_blocks, case) == [block_and_loss] * 2


def attended_pieces(rank: int, world_size: int, case: Case) -> int:
    """Return how often a step attends to a piece of the keys, forward or recomputed."""
    attend = models.attention.sdpa.attend_with_lse
    with patch.object(models.attention.sdpa, "attend_with_lse", side_effect=attend) as calls:
        model, dims = build_case(case)
        train(model, dims, case)
        return calls.call_count


@pytest.mark.parametrize(("checkpointing", "passes"), [("none", 1), ("op", 1), ("full", 2)])
def test_checkpointing_by_operation_goes_round_the_ring_once(
    ranks: RankPool, checkpointing: str, passes: int
) -> None:
    blocks, pieces = 3, 2
    counts = ranks(2, attended_pieces, Case(cp=2, context="ring", checkpointing=checkpointing))
    assert counts == [passes * blocks * pieces] * 2


def document_by_document(rank: int, world_size: int, case: Case) -> Comparison:
    """Run a backend for GPUs, with a loop over documents instead of its kernel."""
    with (
        patch.object(torch.nn.attention.varlen, "varlen_attn", cpu_varlen),
        patch.object(models.attention.varlen, "unsupported_reason", lambda **facts: None),
    ):
        return run_case(rank, world_size, case)


WHOLE_ROWS = [
    Case(cp=2, shard=2, context="ulysses", attention="varlen", accumulate=2),
    Case(cp=2, tp=2, context="ulysses", attention="varlen"),
]


@pytest.mark.parametrize("case", WHOLE_ROWS, ids=str)
def test_document_by_document_attention_gets_whole_rows_under_ulysses(
    ranks: RankPool, case: Case
) -> None:
    for result in ranks(case.world_size, document_by_document, case):
        result.check()


def test_bf16_compute_stays_near_fp32(ranks: RankPool) -> None:
    check(ranks, Case(cp=2, shard=2, context="ulysses", bfloat16=True), BF16_ARITHMETIC)


# The check itself: faults that nothing but the numbers would show.


def without_one_hook(rank: int, world_size: int, mode: str) -> Comparison:
    """Leave the attention of the middle block to this rank's tokens."""
    case = Case(cp=2, context=mode, packed=False)
    plan = dataclasses.replace(DECODER_PLAN, attention=("model.layers.[02].self_attn.core",))
    model, dims = build_case(case, plan=plan)
    return compare(model, train(model, dims, case), case)


def test_attention_that_sees_one_ranks_tokens_only_is_caught(ranks: RankPool) -> None:
    result = ranks(2, without_one_hook, "ulysses")[0]
    assert result.worst_error > 0.05
    with pytest.raises(AssertionError):
        result.check()
    for mode in ("allgather", "ring"):  # the mask is not one of this rank's tokens
        with pytest.raises(RankFailure):
            ranks(2, without_one_hook, mode)


def without_the_sum(rank: int, world_size: int) -> Comparison:
    """Keep of the gradients of keys and values only what this rank's queries add."""

    def own_part(x: Tensor, dim: int, group: Any) -> Tensor:
        return x.chunk(world_size, dim)[rank].contiguous()

    case = Case(cp=2)
    with patch("parallelisms.collectives._reduce_scatter", own_part):
        model, dims = build_case(case)
        return compare(model, train(model, dims, case), case)


def with_tokens_dealt_otherwise(rank: int, world_size: int) -> Comparison:
    """Deal the tokens in another order than the masks are made for."""
    case = Case(cp=2)
    model, dims = build_case(case)
    loss = train(model, dataclasses.replace(dims, balanced=False), case)
    return compare(model, loss, case)


def test_a_gradient_that_is_not_added_over_ranks_is_caught(ranks: RankPool) -> None:
    result = ranks(2, without_the_sum)[0]
    assert abs(result.loss - result.reference_loss) <= FP32_REORDERED_SUM * result.loss
    assert result.worst_error > 0.05


def test_tokens_in_another_order_than_that_of_the_masks_are_caught(ranks: RankPool) -> None:
    assert ranks(2, with_tokens_dealt_otherwise)[0].worst_error > 0.05
