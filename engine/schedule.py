"""The learning rate over the run: a pure factor of the step number, so nothing to checkpoint."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class LRSchedulerConfig:
    """Section `lr_scheduler`: linear warm-up, then constant, then decay.

    A constant rate is `decay_ratio = 0.0`; a cosine is `decay_type = "cosine"` with no
    `decay_ratio`.
    """

    warmup_steps: int = 200
    """Optimizer steps of linear growth; the last of them has the full rate."""

    total_steps: int | None = None
    """Optimizer steps that the curve spans; none: training.steps. Later steps keep its end."""

    decay_ratio: float | None = None
    """Share of the steps that decay, at the end; none: decay from the end of warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Curve of the decay: a line, one minus a square root, or half a cosine."""

    min_lr_factor: float = 0.0
    """Fraction of the peak rate that the decay ends at."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(
                f"lr_scheduler.warmup_steps = {self.warmup_steps} is negative; "
                "give a number of steps, or 0 for no warm-up"
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(
                f"lr_scheduler.total_steps = {self.total_steps} spans no step; "
                "give at least 1, or leave it out to span training.steps"
            )
        for key, value in (
            ("decay_ratio", self.decay_ratio),
            ("min_lr_factor", self.min_lr_factor),
        ):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"lr_scheduler.{key} = {value} is no fraction; "
                    "give a number from 0 to 1, such as 0.1"
                )


def phases(config: LRSchedulerConfig, training_steps: int) -> tuple[int, int, int]:
    """Return how many steps warm up, how many decay, and how many there are in all.

    Warm-up is cut to the run, then decay to what warm-up leaves.
    """
    total_steps = training_steps if config.total_steps is None else config.total_steps
    warmup_steps = min(config.warmup_steps, total_steps)
    if config.decay_ratio is None:
        return warmup_steps, total_steps - warmup_steps, total_steps
    decay_steps = round(total_steps * config.decay_ratio)
    return warmup_steps, min(decay_steps, total_steps - warmup_steps), total_steps


def lr_factor(step: int, config: LRSchedulerConfig, training_steps: int) -> float:
    """Return what multiplies the peak learning rate in optimizer step `step`, counted from 1.

    The decay would reach its end one step after the last, so that no step is wasted at a rate
    of zero: with n decaying steps, the k-th of them has progress (k - 1) / n.
    Source: the curve of torchtitan 0.2.2, `components/lr_scheduler.py`, where steps count from 0.
    """
    warmup_steps, decay_steps, total_steps = phases(config, training_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    decayed_steps = min(step - (total_steps + 1 - decay_steps), decay_steps)
    if decayed_steps <= 0:
        return 1.0
    progress = decayed_steps / decay_steps
    if config.decay_type == "linear":
        curve = 1.0 - progress
    elif config.decay_type == "sqrt":
        curve = 1.0 - math.sqrt(progress)
    else:
        curve = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_factor + (1.0 - config.min_lr_factor) * curve


def shortening(config: LRSchedulerConfig, training_steps: int) -> str | None:
    """Return the sentence to log when warm-up and decay do not fit into the run, else none."""
    warmup_steps, decay_steps, total_steps = phases(config, training_steps)
    wanted_decay = round(total_steps * (config.decay_ratio or 0.0))
    if warmup_steps == config.warmup_steps and decay_steps >= wanted_decay:
        return None
    return (
        f"lr_scheduler: {config.warmup_steps} warm-up and {wanted_decay} decay steps do not fit "
        f"into {total_steps} steps; using {warmup_steps} and {decay_steps}"
    )


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Give every parameter group its own initial rate times `factor`."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
