"""The time left that a real run shows, against the clock."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from engine.data import sources
from engine.data.batch import Row
from engine.data.sources import DummyRows
from engine.loop import fit
from engine.metrics import TimeLeft
from engine.trackers import format_duration
from tests.engine.tiny_run import tiny_config, tiny_folder

STEPS = 200
STEP_SECONDS = 0.03  # several times what the tiny model computes in a step
SLOWEST_STEP_SECONDS = 0.2
START_SECONDS = 0.7
WITHIN = 0.1


class PacedRows(DummyRows):
    """Dummy rows that fall due one after the other by the clock, the first one late.

    Taken for the length of a step, what the first one waits for would double the estimate. A
    moment in which other processes hold the CPU is caught up with before the next row is due; on
    a machine where steps take longer from the start (they are timed in those that the estimate
    leaves out), rows are further apart.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.asked: list[float] = []

    def row(self, index: int) -> Row:
        self.asked.append(time.monotonic())
        if index == 0:
            time.sleep(START_SECONDS)
        if index > TimeLeft.WARMUP_STEPS:
            first, second, start = self.asked[1 : TimeLeft.WARMUP_STEPS + 1]
            pace = max(STEP_SECONDS, 2 * min(second - first, start - second))
            pace = min(pace, SLOWEST_STEP_SECONDS)
            due = start + (index - TimeLeft.WARMUP_STEPS) * pace
            time.sleep(max(0.0, due - time.monotonic()))
        return super().row(index)


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


def test_a_tenth_of_a_real_run_predicts_the_rest_within_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder(tmp_path / "hf")
    monkeypatch.setattr(sources, "DummyRows", PacedRows)
    lines = Lines()
    logger = logging.getLogger("tessera")
    logger.addHandler(lines)
    try:
        fit(tiny_config(tmp_path, f"--training.steps={STEPS}", "--metrics.log_freq=20"))
    finally:
        logger.removeHandler(lines)
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, written)}
    shown_at, text = lines.steps[STEPS // 10]
    predicted = rows[STEPS // 10]["seconds_left"]
    assert text.endswith(f"left {format_duration(predicted)}")
    assert predicted == pytest.approx(lines.steps[STEPS][0] - shown_at, rel=WITHIN)
    assert rows[STEPS]["seconds_left"] == 0.0
