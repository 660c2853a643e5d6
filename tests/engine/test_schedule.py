import math

import pytest
import torch
from torch import nn

from engine.optim import OptimizerConfig, build_optimizer
from engine.schedule import LRSchedulerConfig, lr_factor, set_learning_rate, shortening


def curve(config: LRSchedulerConfig, steps: int) -> list[float]:
    return [lr_factor(step, config, steps) for step in range(1, steps + 1)]


def torchtitan_factor(current_step: int, steps: int, config: LRSchedulerConfig) -> float:
    """The curve as torchtitan 0.2.2 states it: steps from 0, a virtual last step."""
    warmup = min(config.warmup_steps, steps)
    decay = steps - warmup
    if config.decay_ratio is not None:
        decay = min(round(steps * config.decay_ratio), decay)
    stable = steps + 1 - warmup - decay
    if current_step < warmup:
        return (current_step + 1) / warmup
    if current_step < warmup + stable:
        return 1.0
    progress = (current_step + 1 - warmup - stable) / decay
    shape = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * shape


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("decay_ratio", [None, 0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 60])
@pytest.mark.parametrize("min_lr_factor", [0.0, 0.1])
def test_every_curve_is_torchtitans(decay_type, decay_ratio, warmup_steps, min_lr_factor):
    config = LRSchedulerConfig(
        warmup_steps=warmup_steps,
        decay_ratio=decay_ratio,
        decay_type=decay_type,
        min_lr_factor=min_lr_factor,
    )
    for steps in (1, 7, 50):
        expected = [torchtitan_factor(step, steps, config) for step in range(steps)]
        assert curve(config, steps) == expected


def test_linear_decay_has_its_closed_form_at_start_warmup_end_middle_and_end():
    config = LRSchedulerConfig(warmup_steps=20)
    assert lr_factor(1, config, 100) == 1 / 20
    assert lr_factor(10, config, 100) == 0.5
    assert lr_factor(20, config, 100) == 1.0
    assert lr_factor(21, config, 100) == 1.0  # progress 0 of 80
    assert lr_factor(61, config, 100) == 0.5  # progress 40 of 80
    assert lr_factor(100, config, 100) == pytest.approx(1 / 80)  # progress 79 of 80


def test_cosine_is_half_way_in_the_middle_of_the_decay():
    config = LRSchedulerConfig(warmup_steps=0, decay_type="cosine", min_lr_factor=0.2)
    assert lr_factor(1, config, 100) == 1.0
    assert lr_factor(51, config, 100) == pytest.approx(0.6)
    assert lr_factor(100, config, 100) == pytest.approx(
        0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.99))
    )


def test_warmup_stable_decay_holds_the_full_rate_until_the_last_share():
    config = LRSchedulerConfig(warmup_steps=10, decay_ratio=0.2, decay_type="sqrt")
    factors = curve(config, 100)
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == pytest.approx(1 - math.sqrt(10 / 20))
    assert factors[-1] == pytest.approx(1 - math.sqrt(19 / 20))


def test_no_share_that_decays_is_a_constant_rate():
    config = LRSchedulerConfig(warmup_steps=2, decay_ratio=0.0)
    assert curve(config, 6) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_no_step_trains_at_a_rate_of_zero():
    for decay_type in ("linear", "sqrt", "cosine"):
        config = LRSchedulerConfig(warmup_steps=3, decay_type=decay_type)
        assert min(curve(config, 30)) > 0


def test_total_steps_set_the_curve_apart_from_the_length_of_the_run():
    config = LRSchedulerConfig(warmup_steps=5, total_steps=50, min_lr_factor=0.1)
    alone = LRSchedulerConfig(warmup_steps=5, min_lr_factor=0.1)
    assert curve(config, 20) == curve(alone, 50)[:20]
    beyond = curve(config, 80)
    assert beyond[:50] == curve(alone, 50)
    assert beyond[50:] == [pytest.approx(0.1)] * 30


def test_warmup_and_decay_that_do_not_fit_are_shortened_and_said():
    assert shortening(LRSchedulerConfig(warmup_steps=5), 10) is None
    assert shortening(LRSchedulerConfig(warmup_steps=5, decay_ratio=0.5), 10) is None
    assert shortening(LRSchedulerConfig(warmup_steps=200), 10) == (
        "lr_scheduler: 200 warm-up and 0 decay steps do not fit into 10 steps; using 10 and 0"
    )
    assert shortening(LRSchedulerConfig(warmup_steps=8, decay_ratio=0.5), 10) == (
        "lr_scheduler: 8 warm-up and 5 decay steps do not fit into 10 steps; using 8 and 2"
    )


@pytest.mark.parametrize("as_tensor", [False, True])
def test_each_group_keeps_its_own_peak_rate(as_tensor: bool):
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    optimizer = build_optimizer([("w", parameters[0]), ("b", parameters[1])], OptimizerConfig())
    optimizer.param_groups[0]["initial_lr"] = 0.4
    optimizer.param_groups[1]["initial_lr"] = 0.8
    if as_tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer, factor)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * factor, 0.8 * factor])


@pytest.mark.parametrize(
    ("key", "value"),
    [("warmup_steps", -1), ("total_steps", 0), ("decay_ratio", 1.5), ("min_lr_factor", -0.1)],
)
def test_a_setting_that_cannot_work_is_refused_by_name_and_value(key: str, value: float):
    with pytest.raises(ValueError, match=rf"lr_scheduler\.{key} = {value}"):
        LRSchedulerConfig(**{key: value})  # type: ignore[arg-type]
