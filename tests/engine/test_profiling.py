import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import profiling
from engine.profiling import Profiler, ProfilingConfig


def train(folder: Path, config: ProfilingConfig, steps: range, *, rank: int = 0) -> None:
    weight = torch.ones(8, 8)
    with Profiler(
        config, folder, rank=rank, device_type="cpu", start_step=steps.start - 1
    ) as profiler:
        for _ in steps:
            weight = (weight @ weight) / 8
            profiler.after_step()


def traces(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))


def events(path: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}


def test_a_trace_with_the_step_s_work_is_written_at_each_scheduled_step(tmp_path: Path):
    config = ProfilingConfig(enable_profiling=True, profile_freq=5, profiler_warmup=2)
    train(tmp_path, config, range(1, 13))
    assert traces(tmp_path) == [
        "profile_traces/step-10/rank-0.json",
        "profile_traces/step-5/rank-0.json",
    ]
    assert "aten::mm" in events(tmp_path / "profile_traces/step-5/rank-0.json")


def test_a_resumed_run_keeps_the_schedule_of_the_step_numbers(tmp_path: Path):
    config = ProfilingConfig(enable_profiling=True, profile_freq=5, profiler_warmup=1)
    train(tmp_path, config, range(8, 17), rank=3)
    assert traces(tmp_path) == [
        "profile_traces/step-10/rank-3.json",
        "profile_traces/step-15/rank-3.json",
    ]


def test_off_means_that_no_profiler_exists_and_no_file_appears(tmp_path: Path, monkeypatch):
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("nothing is profiled")

    monkeypatch.setattr(profiling, "profile", forbidden)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", forbidden)
    train(tmp_path, ProfilingConfig(), range(1, 13))
    assert not list(tmp_path.iterdir())


def test_profiler_flop_counter_and_compile_work_together(tmp_path: Path):
    config = ProfilingConfig(enable_profiling=True, profile_freq=2, profiler_warmup=1)
    model = torch.nn.Linear(8, 8, bias=False)
    model.compile(backend="aot_eager")
    flops: list[int] = []
    with Profiler(config, tmp_path, rank=0, device_type="cpu") as profiler:
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                model(torch.ones(4, 8)).sum().backward()
            flops.append(counter.get_total_flops())
            profiler.after_step()
    assert flops[-1] >= 2 * 2 * 4 * 8 * 8
    assert (tmp_path / "profile_traces/step-2/rank-0.json").stat().st_size > 0


def test_a_memory_snapshot_on_cpu_is_said_once_to_record_nothing(tmp_path: Path, caplog):
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)
    with caplog.at_level(logging.WARNING, logger="tessera"):
        train(tmp_path, config, range(1, 7))
    assert len(caplog.records) == 1
    assert "profiling.enable_memory_snapshot = true records CUDA allocations only" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_memory_snapshot_on_cuda_can_be_loaded(tmp_path: Path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)
    with Profiler(config, tmp_path, rank=0, device_type="cuda") as profiler:
        for _ in range(4):
            torch.ones(1024, device="cuda").sum().item()
            profiler.after_step()
    for step in (2, 4):
        with (tmp_path / f"memory_snapshot/step-{step}/rank-0.pickle").open("rb") as file:
            assert pickle.load(file)["device_traces"]


class FakeMemory:
    """Stands for CUDA's allocation history on a machine without CUDA."""

    def __init__(self) -> None:
        self.recording: list[dict[str, object]] = []

    def record(self, **options: object) -> None:
        self.recording.append(options)


def test_running_out_of_memory_leaves_a_snapshot_and_stops_recording(tmp_path, monkeypatch):
    memory = FakeMemory()
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", memory.record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=10)
    with (
        pytest.raises(torch.OutOfMemoryError),
        Profiler(config, tmp_path, rank=0, device_type="cuda") as profiler,
    ):
        profiler.after_step()
        raise torch.OutOfMemoryError("CUDA out of memory")
    snapshot = tmp_path / "memory_snapshot/step-2-out-of-memory/rank-0.pickle"
    with snapshot.open("rb") as file:
        assert pickle.load(file) == {"segments": []}
    assert memory.recording[-1] == {"enabled": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile_freq": 0}, r"profiling\.profile_freq = 0"),
        ({"profile_freq": 3}, r"profiling\.profile_freq = 3 is below the 4 steps"),
        ({"profiler_active": 0}, r"profiling\.profiler_active = 0"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_only_where_it_would_take_effect(settings, message):
    with pytest.raises(ValueError, match=message):
        ProfilingConfig(enable_profiling=True, **settings)
    ProfilingConfig(**settings)
