"""A step that is not finite changes nothing, whether the device or the host keeps it from that."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from engine.health import NonFiniteError
from engine.optim import decides_on_device
from engine.stalls import start_reading
from engine.step import Trainer, train_step
from tests.engine.training_cases import local_part, make_trainer, whole_parameters
from tests.parity.cases import Case
from tests.ranks import RankPool

POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss and gradients": lambda nll: nll * math.nan,
    "loss": lambda nll: nll + math.nan,
    "gradients": lambda nll: nll + (nll * 0).sqrt(),  # infinite slope, times zero
}


@dataclass(frozen=True)
class Outcome:
    """What a step that is not finite, and the one after it, did."""

    unchanged: bool
    updated: bool
    num_skipped: int
    next_changed: bool
    next_updated: bool
    updates_counted: set[float]
    """By the optimizer, after three steps, one of them skipped."""


def state_of(trainer: Trainer) -> list[Tensor]:
    """Return copies of all weights, and of this rank's part of the optimizer's state."""
    slots = [slot for one in trainer.optimizer.state.values() for slot in one.values()]
    return [*whole_parameters(trainer).values(), *(local_part(slot).clone() for slot in slots)]


def nonfinite_step(
    rank: int, world_size: int, case: Case, action: str, poison: str, by_host: bool = False
) -> Outcome:
    trainer = make_trainer(case, local_batch_size=4 // case.world_size, action=action)
    assert decides_on_device(trainer.optimizer, trainer.device)
    if by_host:
        for group in trainer.optimizer.param_groups:
            group["fused"] = False
    train_step(trainer, 1)
    before = state_of(trainer)
    numbers = count()
    inner = trainer.objective.sums

    def poisoned(logps_BT: Tensor, batch, sequence_sum):
        sums = inner(logps_BT, batch, sequence_sum)
        return {"nll": POISONS[poison](sums["nll"])} if next(numbers) == 1 else sums

    trainer.objective.sums = poisoned  # pyright: ignore[reportAttributeAccessIssue]
    report = train_step(trainer, 2)
    after = state_of(trainer)
    again = train_step(trainer, 3)
    return Outcome(
        unchanged=all(map(torch.equal, before, after)),
        updated=report.updated,
        num_skipped=trainer.nonfinite.num_skipped_steps,
        next_changed=not any(map(torch.equal, after, state_of(trainer))),
        next_updated=again.updated,
        updates_counted={slots["step"].item() for slots in trainer.optimizer.state.values()},
    )


@pytest.mark.parametrize("by_host", [False, True], ids=["by the device", "by the host"])
@pytest.mark.parametrize(
    ("case", "poison"),
    [
        (Case(shard=2), "loss and gradients"),
        (Case(shard=2), "loss"),
        (Case(tp=2), "gradients"),
    ],
    ids=str,
)
def test_a_skipped_step_changes_no_weight_and_no_moment_and_the_next_one_trains(
    ranks: RankPool, case: Case, poison: str, by_host: bool
) -> None:
    for outcome in ranks(case.world_size, nonfinite_step, case, "skip", poison, by_host):
        assert outcome == Outcome(
            unchanged=True,
            updated=False,
            num_skipped=1,
            next_changed=True,
            next_updated=True,
            updates_counted={2.0},
        )


def test_a_step_that_is_not_finite_stops_the_run_and_names_the_step_and_the_gradients(
    ranks: RankPool,
) -> None:
    told = r"step 2 is not finite: loss [\d.]+, grad_norm nan; rank 0: gradients of model\."
    with pytest.raises(Exception, match=told) as caught:
        ranks(2, nonfinite_step, Case(shard=2), "stop", "gradients")
    assert NonFiniteError.__name__ in repr(caught.value) + str(caught.value)


def had_updated_when_the_host_read(rank: int, world_size: int, by_host: bool) -> list[bool]:
    """Take a step; say, whenever the host waited for numbers, whether the update was queued."""
    trainer = make_trainer(Case(), local_batch_size=8)
    for group in trainer.optimizer.param_groups:
        group["fused"] = not by_host
    found: list[bool] = []

    def noted(values: Tensor) -> Callable[[], list[float]]:
        read = start_reading(values)
        return lambda: found.append(bool(trainer.optimizer.state)) or read()

    with patch("engine.step.start_reading", noted):
        train_step(trainer, 1)
    return found


@pytest.mark.parametrize("by_host", [False, True], ids=["by the device", "by the host"])
def test_the_update_is_queued_before_the_host_reads_unless_the_host_decides(
    ranks: RankPool, by_host: bool
) -> None:
    assert ranks(1, had_updated_when_the_host_read, by_host) == [[not by_host]]
