"""Profiler traces and memory snapshots on a step schedule, into the run folder's `profile/`."""

import logging
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

log = logging.getLogger("tessera")

MAX_SNAPSHOT_EVENTS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilingConfig:
    """Section `profiling`: when traces and memory snapshots are taken."""

    enable_profiling: bool = False
    """Write a trace for each rank every `profile_freq` steps."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside `profile/` of the run folder."""

    profile_freq: int = 10
    """Optimizer steps from one trace or snapshot to the next."""

    profiler_active: int = 1
    """Steps that one trace holds."""

    profiler_warmup: int = 3
    """Steps that the profiler runs before each trace, discarded."""

    enable_memory_snapshot: bool = False
    """Write the history of CUDA allocations every `profile_freq` steps, and on out of memory."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the snapshots, inside `profile/` of the run folder."""

    def __post_init__(self) -> None:
        if not (self.enable_profiling or self.enable_memory_snapshot):
            return
        if self.profile_freq < 1:
            raise ValueError(
                f"profiling.profile_freq = {self.profile_freq} is no number of steps; "
                "give 1 or more"
            )
        needed = self.profiler_warmup + self.profiler_active
        if self.enable_profiling and (self.profiler_active < 1 or self.profiler_warmup < 0):
            raise ValueError(
                f"profiling.profiler_active = {self.profiler_active} and "
                f"profiling.profiler_warmup = {self.profiler_warmup} record nothing; "
                "give at least 1 and 0 steps"
            )
        if self.enable_profiling and self.profile_freq < needed:
            raise ValueError(
                f"profiling.profile_freq = {self.profile_freq} is below the {needed} steps of "
                "profiling.profiler_warmup + profiling.profiler_active; raise it, or lower those"
            )


class Profiler:
    """Records what the configuration asks for; a context manager around the training loop.

    With everything off it holds nothing, and `after_step` returns at once.
    """

    def __init__(
        self,
        config: ProfilingConfig,
        folder: Path,
        *,
        rank: int,
        device_type: str,
        start_step: int = 0,
    ) -> None:
        self._config = config
        self._folder = folder
        self._rank = rank
        self._step = start_step
        self._trace = (
            _trace_recorder(config, start_step, self._write_trace, device_type)
            if config.enable_profiling
            else None
        )
        self._takes_snapshots = config.enable_memory_snapshot and device_type == "cuda"
        if config.enable_memory_snapshot and device_type != "cuda":
            log.warning(
                "profiling.enable_memory_snapshot = true records CUDA allocations only; "
                "nothing is recorded on %s",
                device_type,
            )

    def __enter__(self) -> Self:
        if self._trace is not None:
            self._trace.__enter__()
        if self._takes_snapshots:
            torch.cuda.memory._record_memory_history(max_entries=MAX_SNAPSHOT_EVENTS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._takes_snapshots:
            if isinstance(error, torch.OutOfMemoryError):
                self._write_snapshot(f"step-{self._step + 1}-out-of-memory")
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._trace is not None:
            self._trace.__exit__(kind, error, trace)

    def after_step(self) -> None:
        """Note that an optimizer step is done, and write what is due; every rank, every step."""
        if self._trace is None and not self._takes_snapshots:
            return
        self._step += 1
        if self._trace is not None:
            self._trace.step()
        if self._takes_snapshots and self._step % self._config.profile_freq == 0:
            self._write_snapshot(f"step-{self._step}")

    def _write_trace(self, recorder: profile) -> None:
        path = self._path(self._config.save_traces_folder, f"step-{self._step}", "json")
        start = time.perf_counter()
        recorder.export_chrome_trace(str(path))
        log.info("profiler trace %s written in %.1f s", path, time.perf_counter() - start)

    def _write_snapshot(self, name: str) -> None:
        path = self._path(self._config.save_memory_snapshot_folder, name, "pickle")
        with path.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        log.info("memory snapshot %s written; view it at pytorch.org/memory_viz", path)

    def _path(self, kind: str, name: str, suffix: str) -> Path:
        folder = self._folder / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"rank-{self._rank}.{suffix}"


def _trace_recorder(
    config: ProfilingConfig,
    start_step: int,
    write: Callable[[profile], None],
    device_type: str,
) -> profile:
    activities = [ProfilerActivity.CPU]
    if device_type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    cycle = schedule(
        wait=config.profile_freq - config.profiler_warmup - config.profiler_active,
        warmup=config.profiler_warmup,
        active=config.profiler_active,
    )

    def action(steps_seen: int) -> ProfilerAction:
        return cycle(start_step + steps_seen)

    return profile(activities=activities, schedule=action, on_trace_ready=write, record_shapes=True)
