"""Objectives on answers give the loss and gradients of one fp32 process, however ranks share work.

Rows hold two pairs, one or none. The reference of dpo and kto is a model on the same plan, or of
adapters the model itself without them, which one process compares with a second model.
"""

from unittest.mock import patch

import pytest

from parallelisms.collectives import SequenceSum
from tests.parity.cases import FP32_REORDERED_SUM, Case, Comparison, run_case
from tests.ranks import RankPool

CASES = [
    Case(objective="dpo", shard=2, accumulate=2),
    Case(objective="dpo", replicate=2, checkpointing="op"),
    Case(objective="dpo", tp=2),
    Case(objective="dpo", cp=2),
    Case(objective="dpo", cp=2, context="ring", accumulate=2),
    Case(objective="dpo", cp=2, context="ulysses", checkpointing="op"),
    Case(objective="dpo", shard=2, backend="aot_eager"),
    Case(objective="orpo", shard=2, checkpointing="op"),
    Case(objective="orpo", tp=2, sequence=False, accumulate=2),
    Case(objective="orpo", cp=2, context="ring"),
    Case(objective="simpo", shard=2, accumulate=2),
    Case(objective="simpo", cp=2, context="ulysses"),
    Case(objective="kto", shard=2, accumulate=4),
    Case(objective="kto", tp=2, loss_parallel=False),
    Case(objective="kto", cp=2, context="ring"),
    Case(objective="dpo", cp=2, shard=2, accumulate=2),
    Case(objective="dpo", adapter="lora", shard=2, accumulate=2, backend="aot_eager"),
    Case(objective="kto", adapter="dora", tp=2),
    Case(objective="dpo", adapter="lora", cp=2, context="ring"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_objective_gives_single_process_gradients(ranks: RankPool, case: Case) -> None:
    for result in ranks(case.world_size, run_case, case, timeout_seconds=280):
        result.check(FP32_REORDERED_SUM)


def run_with_parts_of_sums(rank: int, world_size: int, case: Case) -> Comparison:
    with patch.object(SequenceSum, "__call__", lambda self, value_B: value_B):
        return run_case(rank, world_size, case)


def test_a_sum_that_is_not_whole_before_the_nonlinearity_is_noticed(ranks: RankPool) -> None:
    for result in ranks(2, run_with_parts_of_sums, Case(objective="dpo", cp=2)):
        assert not result.is_within(1e-2)
