import json
import math

import psutil
import pytest
import torch

from engine.metrics import (
    GIB,
    PEAK_FLOPS,
    Meter,
    MetricsConfig,
    StepCosts,
    TimeLeft,
    device_peak_flops,
    peak_flops,
)

REQUIRED_KEYS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second_per_device",
    "mfu",
    "peak_memory_gib",
    "step_seconds",
}


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_meter(clock: Clock, *, peak: float | None = 1e6, **options: float) -> Meter:
    return Meter(
        device=torch.device("cpu"),
        num_devices=4,
        costs=StepCosts(
            flops_per_token=1000.0,
            linear_flops_per_token=600.0,
            attention_flops=lambda squared: 3.0 * squared,
        ),
        peak_device_flops=peak,
        total_steps=100,
        clock=clock,
        **options,  # type: ignore[arg-type]
    )


def run_step(meter: Meter, clock: Clock, step: int, seconds: float) -> None:
    with meter.loading():
        clock.now += seconds * 0.1
    clock.now += seconds * 0.9
    meter.finish_step(step, tokens=800, trained_tokens=700, squared_document_tokens=20_000, rows=8)


def test_a_row_has_the_documented_keys_and_values():
    clock = Clock()
    meter = make_meter(clock, start_step=8, tokens_so_far=5000, trained_tokens_so_far=4000)
    run_step(meter, clock, 9, 1.0)
    with meter.apart("saving"):
        clock.now += 50.0
    run_step(meter, clock, 10, 3.0)
    row = meter.report(10, loss=2.0, grad_norm=0.5, lr=1e-3, extra={"validation_loss": 2.5})
    assert row.keys() >= REQUIRED_KEYS
    assert row == {
        "step": 10,
        "loss": 2.0,
        "perplexity": pytest.approx(math.exp(2.0)),
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 5000 + 1600,
        "trained_tokens": 4000 + 1400,
        "rows": 16,
        "tokens_per_second_per_device": pytest.approx(1600 / 4.0 / 4),
        "mfu": pytest.approx(1600 * 1000 / 4.0 / 4 / 1e6),
        "mfu_documents": pytest.approx((1600 * 600 + 3 * 40_000) / 4.0 / 4 / 1e6),
        "peak_memory_gib": row["peak_memory_gib"],
        "peak_allocated_gib": None,
        "step_seconds": pytest.approx(2.0),
        "data_seconds": pytest.approx(0.2),
        "saving_seconds": pytest.approx(50.0),
        "goodput": 0.0,
        "seconds_left": pytest.approx(53.0 * 90),
        "validation_loss": 2.5,
    }


def test_a_report_starts_a_new_window_and_totals_go_on():
    clock = Clock()
    meter = make_meter(clock)
    run_step(meter, clock, 1, 10.0)
    meter.report(1, loss=1.0, grad_norm=1.0, lr=1.0)
    run_step(meter, clock, 2, 2.0)
    row = meter.report(2, loss=1.0, grad_norm=1.0, lr=1.0)
    assert row["step_seconds"] == pytest.approx(2.0)
    assert row["tokens_per_second_per_device"] == pytest.approx(800 / 2.0 / 4)
    assert (row["tokens"], row["trained_tokens"], row["rows"]) == (1600, 1400, 8)


def test_utilisation_of_an_unknown_device_is_unknown_and_not_zero():
    clock = Clock()
    meter = make_meter(clock, peak=None)
    run_step(meter, clock, 1, 1.0)
    row = meter.report(1, loss=1.0, grad_norm=1.0, lr=1.0)
    assert row["mfu"] is None
    assert row["mfu_documents"] is None
    assert json.loads(json.dumps(row))["mfu"] is None


def test_a_huge_loss_does_not_break_the_perplexity():
    clock = Clock()
    meter = make_meter(clock)
    run_step(meter, clock, 1, 1.0)
    assert meter.report(1, loss=1e4, grad_norm=1.0, lr=1.0)["perplexity"] == math.inf


def test_memory_on_cpu_is_what_the_process_holds():
    clock = Clock()
    meter = make_meter(clock)
    run_step(meter, clock, 1, 1.0)
    reported = meter.report(1, loss=1.0, grad_norm=1.0, lr=1.0)["peak_memory_gib"]
    assert reported == pytest.approx(psutil.Process().memory_info().rss / GIB, rel=0.2)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("", None),
    ],
)
def test_peak_flops_are_found_by_the_words_of_the_device_name(name: str, flops: float | None):
    assert peak_flops(name) == flops


def test_every_row_of_the_peak_table_can_be_reached():
    for words, flops in PEAK_FLOPS:
        assert peak_flops("NVIDIA " + " ".join(words)) == flops


def test_a_cpu_has_no_peak():
    assert device_peak_flops(torch.device("cpu")) is None


def durations(compile_seconds: float, *, validate_every: int) -> list[float]:
    """Two hundred steps of about half a second: compilation first, then a slow drift and pauses."""
    steps = [0.5 + 0.05 * math.sin(step) for step in range(1, 201)]
    steps[0] += compile_seconds
    steps[1] += compile_seconds / 3
    return [
        seconds + (1.0 if step % validate_every == 0 else 0.0)
        for step, seconds in enumerate(steps, start=1)
    ]


@pytest.mark.parametrize("compile_seconds", [0.0, 30.0])
@pytest.mark.parametrize("start_step", [0, 1000])
def test_a_tenth_of_the_run_predicts_its_length_within_a_tenth(compile_seconds, start_step):
    clock = Clock()
    estimator = TimeLeft(start_step + 200, start_step=start_step, clock=clock)
    begin, predicted = clock.now, None
    for step, seconds in enumerate(durations(compile_seconds, validate_every=10), start=1):
        clock.now += seconds
        estimator.finish_step(start_step + step)
        if step == 20:
            predicted = clock.now - begin + (estimator.seconds() or 0.0)
    assert predicted == pytest.approx(clock.now - begin, rel=0.1)


def test_time_left_is_unknown_after_one_step_and_nothing_after_the_last():
    clock = Clock()
    estimator = TimeLeft(5, clock=clock)
    assert estimator.seconds() is None
    estimator.finish_step(1)
    assert estimator.seconds() is None
    clock.now += 2.0
    estimator.finish_step(2)
    assert estimator.seconds() == pytest.approx(6.0)
    for step in (3, 4, 5):
        clock.now += 1.0
        estimator.finish_step(step)
    assert estimator.seconds() == 0.0


def test_rows_are_due_at_the_first_and_last_step_and_every_so_many():
    config = MetricsConfig(log_freq=10)
    due = [step for step in range(1, 26) if config.is_due(step, last_step=25)]
    assert due == [1, 10, 20, 25]


def test_a_row_every_zero_steps_is_refused():
    with pytest.raises(ValueError, match=r"metrics\.log_freq = 0"):
        MetricsConfig(log_freq=0)
