"""A step that is not finite changes nothing, whether the device or the host keeps it from that."""

import math
from itertools import count

import pytest
import torch
from torch import Tensor

from engine.health import NonFiniteError
from engine.optim import decides_on_device
from engine.step import train_step
from tests.engine.training_cases import local_part, make_trainer, whole_parameters
from tests.parity.cases import Case
from tests.ranks import RankPool


def nonfinite_step(
    rank: int, world_size: int, case: Case, action: str, by_host: bool = False
) -> tuple[bool, int, bool]:
    """Take a step, one with a NaN in a weight's path, and another; return what changed."""
    trainer = make_trainer(case, local_batch_size=4 // case.world_size, action=action)
    assert decides_on_device(trainer.optimizer, trainer.device)
    if by_host:
        for group in trainer.optimizer.param_groups:
            group["fused"] = False
    train_step(trainer, 1)
    before = whole_parameters(trainer)
    names = ("exp_avg", "exp_avg_sq", "step")
    states = {k: [v[n].clone() for n in names] for k, v in trainer.optimizer.state.items()}
    numbers = count()
    inner = trainer.objective.sums

    def poisoned(logps_BT: Tensor, batch, sequence_sum):
        sums = inner(logps_BT, batch, sequence_sum)
        return {"nll": sums["nll"] * math.nan} if next(numbers) == 1 else sums

    trainer.objective.sums = poisoned  # pyright: ignore[reportAttributeAccessIssue]
    report = train_step(trainer, 2)
    after = whole_parameters(trainer)
    same = all(torch.equal(before[name], after[name]) for name in before) and all(
        torch.equal(local_part(was), local_part(v[name]))
        for k, v in trainer.optimizer.state.items()
        for name, was in zip(names, states[k], strict=True)
    )
    again = train_step(trainer, 3)
    return same and not report.updated, trainer.nonfinite.num_skipped_steps, again.updated


@pytest.mark.parametrize("by_host", [False, True], ids=["by the device", "by the host"])
@pytest.mark.parametrize("case", [Case(shard=2), Case(tp=2)], ids=str)
def test_a_skipped_step_changes_no_weight_and_no_moment_and_the_next_one_trains(
    ranks: RankPool, case: Case, by_host: bool
) -> None:
    for unchanged, num_skipped, trained_again in ranks(
        case.world_size, nonfinite_step, case, "skip", by_host
    ):
        assert unchanged and num_skipped == 1 and trained_again


def test_a_step_that_is_not_finite_stops_the_run_and_names_the_step(ranks: RankPool) -> None:
    with pytest.raises(Exception, match="step 2 is not finite") as caught:
        ranks(2, nonfinite_step, Case(shard=2), "stop")
    assert NonFiniteError.__name__ in repr(caught.value) + str(caught.value)
