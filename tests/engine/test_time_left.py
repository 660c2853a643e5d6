"""The time left that a real run shows, against the clock."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from engine.data import sources
from engine.data.batch import Row
from engine.data.rows import DummyRows
from engine.loop import fit
from engine.metrics import TimeLeft
from engine.trackers import format_duration
from tests.engine.tiny_run import tiny_config, tiny_folder

STEPS = 200
SHOWN = STEPS // 10
STEP_SECONDS = 0.025  # several times what the tiny model computes in a step
SLOWEST_STEP_SECONDS = 0.2
START_SECONDS = 0.7
WITHIN = 0.1
TRIES = 3


class PacedRows(DummyRows):
    """Dummy rows that fall due one after the other by the clock, the first one late.

    Taken for the length of a step, what the first one waits for would spoil the estimate. A moment
    in which other processes hold the CPU is caught up with before the next row is due; on a
    machine where steps take longer from the start (they are timed in those that the estimate
    leaves out), rows are further apart.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.asked: list[float] = []
        self.pace = 0.0

    def row(self, index: int) -> Row:
        self.asked.append(time.monotonic())
        if index == 0:
            time.sleep(START_SECONDS)
        if index == TimeLeft.WARMUP_STEPS:
            first, second, third = self.asked[1:]
            self.pace = max(STEP_SECONDS, 2 * min(second - first, third - second))
            self.pace = min(self.pace, SLOWEST_STEP_SECONDS)
        if index >= TimeLeft.WARMUP_STEPS:
            time.sleep(max(0.0, self.due(index + 1) - time.monotonic()))
        return super().row(index)

    def due(self, step: int) -> float:
        """When the row of `step` is handed out."""
        return self.asked[TimeLeft.WARMUP_STEPS] + (step - TimeLeft.WARMUP_STEPS) * self.pace

    def are_on_time(self, ended_at: float) -> bool:
        """Whether the clock ruled: late steps move neither rate nor length by more than 5 %."""
        shown_late = self.asked[SHOWN] - self.due(SHOWN)
        counted = SHOWN - TimeLeft.WARMUP_STEPS
        is_even = shown_late < 0.05 * counted * self.pace
        return is_even and ended_at - self.due(STEPS) < 0.05 * (STEPS - SHOWN) * self.pace


class Lines(logging.Handler):
    """The console's line of each step, with the time at which it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, tuple[float, str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("step "):
            number = int(text.removeprefix("step ").partition("/")[0])
            self.steps[number] = (time.monotonic(), text)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PacedRows, Lines]:
    folder.mkdir()
    tiny_folder(folder / "hf")
    made: list[PacedRows] = []

    def open_rows(**sizes: Any) -> PacedRows:
        made.append(PacedRows(**sizes))
        return made[0]

    monkeypatch.setattr(sources, "DummyRows", open_rows)
    lines = Lines()
    logger = logging.getLogger("tessera")
    logger.addHandler(lines)
    try:
        fit(tiny_config(folder, f"--training.steps={STEPS}", f"--metrics.log_freq={SHOWN}"))
    finally:
        logger.removeHandler(lines)
    return made[0], lines


def test_a_tenth_of_a_real_run_predicts_the_rest_within_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in range(TRIES):
        folder = tmp_path / str(attempt)
        paced, lines = run(folder, monkeypatch)
        ended_at, _ = lines.steps[STEPS]
        if paced.are_on_time(ended_at):
            break
    else:
        pytest.skip(f"the machine is too busy: {TRIES} runs could not keep to the clock")
    written = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, written)}
    shown_at, text = lines.steps[SHOWN]
    predicted = rows[SHOWN]["seconds_left"]
    assert text.endswith(f"left {format_duration(predicted)}")
    assert predicted == pytest.approx(ended_at - shown_at, rel=WITHIN)
    assert rows[STEPS]["seconds_left"] == 0.0
