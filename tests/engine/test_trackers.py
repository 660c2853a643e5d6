import importlib
import json
import logging
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import trackers
from engine.metrics import MetricsConfig
from engine.trackers import build_trackers, format_duration, format_row, progress_line

ROW = {
    "step": 20,
    "loss": 2.34567,
    "grad_norm": 0.8765,
    "lr": 0.0008,
    "tokens_per_second_per_device": 12345.6,
    "mfu": 0.4567,
    "peak_memory_gib": 3.21,
    "seconds_left": 200.0,
}


def rows_of(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(folder: Path, steps: range, *, resume_step: int = 0, **config: bool) -> None:
    opened = build_trackers(
        MetricsConfig(**config),  # type: ignore[arg-type]
        folder,
        rank=0,
        total_steps=100,
        resume_step=resume_step,
    )
    for step in steps:
        opened.write(step, {"step": step, "loss": 10.0 / step, "mfu": None})
    opened.close()


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path):
    opened = build_trackers(MetricsConfig(), tmp_path, rank=0, total_steps=2)
    opened.write(1, {"loss": 2.0, "mfu": None, "perplexity": math.inf, "grad_norm": math.nan})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.0, "mfu": None, "perplexity": None, "grad_norm": None}
    ]
    opened.close()


def test_a_resumed_run_goes_on_with_no_gap_and_no_repeat(tmp_path: Path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 11), resume_step=4)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_starts_over_keeps_no_row(tmp_path: Path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(1, 3))
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_row_cut_by_a_kill_is_dropped(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    write_steps(tmp_path, range(4, 6), resume_step=3)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_rows_after_the_resumed_step_go_by_a_rename(tmp_path: Path, monkeypatch):
    write_steps(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trackers.keep_rows_until(tmp_path / "metrics.jsonl", 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_shows_one_step_axis_across_a_resume(tmp_path: Path):
    write_steps(tmp_path, range(1, 8), enable_tensorboard=True)
    write_steps(tmp_path, range(5, 11), resume_step=4, enable_tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, 11))
    assert [event.value for event in scalars] == pytest.approx([10 / s for s in range(1, 11)])


def test_nothing_but_the_json_lines_is_written_by_default(tmp_path: Path):
    write_steps(tmp_path, range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing_unless_asked_to(tmp_path: Path):
    quiet = build_trackers(MetricsConfig(), tmp_path, rank=1, total_steps=9)
    quiet.write(1, ROW)
    quiet.advance(2)
    quiet.close()
    assert not list(tmp_path.iterdir())

    config = MetricsConfig(save_for_all_ranks=True, enable_tensorboard=True)
    for rank in (0, 1):
        opened = build_trackers(config, tmp_path, rank=rank, total_steps=9)
        opened.write(1, ROW)
        opened.close()
    assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "metrics-rank-1.jsonl").exists()
    assert list((tmp_path / "tb").glob("events*"))
    assert list((tmp_path / "tb" / "rank-1").glob("events*"))


class FakeWandb:
    """Records what `wandb.init` and the run were given."""

    def __init__(self) -> None:
        self.inits: list[dict[str, object]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.num_finished = 0

    def init(self, **options: object) -> SimpleNamespace:
        self.inits.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.num_finished += 1


def test_weights_and_biases_is_offline_and_a_resume_keeps_its_id(tmp_path: Path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for resume_step in (0, 1):
        opened = build_trackers(
            MetricsConfig(enable_wandb=True),
            tmp_path,
            rank=0,
            total_steps=9,
            resume_step=resume_step,
            settings={"optimizer": {"lr": 0.1}},
        )
        opened.write(resume_step + 1, {"loss": 2.0, "mfu": None})
        opened.close()
    assert [options["mode"] for options in fake.inits] == ["offline", "offline"]
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert fake.inits[0]["config"] == {"optimizer": {"lr": 0.1}}
    assert fake.rows == [(1, {"loss": 2.0}), (2, {"loss": 2.0})]
    assert fake.num_finished == 2


@pytest.mark.skipif(find_spec("wandb") is None, reason="the package wandb is not installed")
def test_the_real_weights_and_biases_keeps_the_rows_in_an_offline_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):  # else in the user's home
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb-own"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened = build_trackers(
        MetricsConfig(enable_wandb=True),
        tmp_path / "run",
        rank=0,
        total_steps=9,
        settings={"optimizer.lr": 0.125},
    )
    try:
        opened.write(3, {"loss": 2.0625, "mfu": None})
    finally:
        opened.close()
        importlib.import_module("wandb").teardown()  # ends its service process
    assert not [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]
    run_id = (tmp_path / "run" / "wandb-id").read_text()
    [file] = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    content = file.read_bytes()
    assert content.startswith(b":W&B")  # the header of a complete file, which `wandb sync` sends
    for name, value in ((b"loss", b"2.0625"), (b"_step", b"3"), (b"optimizer.lr", b"0.125")):
        assert re.search(re.escape(name) + b"..." + re.escape(value), content, re.DOTALL), name
    assert b"mfu" not in content


def test_an_absent_wandb_is_refused_with_the_remedy(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"metrics\.enable_wandb = true.*pip install wandb"):
        build_trackers(MetricsConfig(enable_wandb=True), tmp_path, rank=0, total_steps=9)


def test_the_log_line_has_its_keys_in_one_order_and_leaves_out_what_is_unknown():
    assert format_row(20, 400, ROW) == (
        "step 20/400 | loss 2.3457 | grad_norm 0.876 | lr 0.0008 | tokens/s/device 12,346 | "
        "mfu 45.7% | memory_gib 3.2 | left 3m20s"
    )
    assert format_row(20, 400, {"loss": 2.0, "mfu": None, "validation_loss": 2.5}) == (
        "step 20/400 | loss 2.0000 | validation_loss 2.5000"
    )


def test_the_live_line_moves_with_every_step_and_keeps_the_latest_numbers(
    tmp_path: Path, monkeypatch, caplog
):
    monkeypatch.setenv("COLUMNS", "200")
    shown: list[str] = []
    opened = build_trackers(MetricsConfig(), tmp_path, rank=0, total_steps=400, show=shown.append)
    with caplog.at_level(logging.INFO, logger="tessera"):
        opened.write(20, ROW)
    opened.advance(21)
    opened.close()
    assert "20/400" in shown[0] and "3m20s left" in shown[0]
    assert "21/400" in shown[1] and "loss 2.346" in shown[1]
    assert shown[-1] == ""
    assert len(caplog.records) == 1


def test_the_live_line_never_wraps(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown: list[str] = []
    opened = build_trackers(MetricsConfig(), tmp_path, rank=0, total_steps=9, show=shown.append)
    opened.write(1, ROW)
    opened.close()
    assert max(len(text) for text in shown) == 39


def test_the_bar_is_empty_at_the_start_and_full_at_the_end():
    assert progress_line(0, 10, "").startswith("─" * 20)
    assert progress_line(10, 10, "").startswith("━" * 20)


def test_durations_read_as_people_say_them():
    assert [format_duration(s) for s in (0.4, 59, 61, 3725, 90000)] == [
        "0s",
        "59s",
        "1m01s",
        "1h02m",
        "1d01h",
    ]
