"""The ranks of a parity check: each runs the plans in turn, in a group that torchrun or we started.

Ranks that we start are processes of this machine. When one dies, raises or hangs, its plan has
failed with a reason, all of them are ended, and fresh ones go on with the next plan.
"""

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.verify import parity
from engine.verify.case import Case
from engine.verify.faults import FAULTS
from engine.verify.parity import Comparison
from engine.verify.subject import Subject
from parallelisms import ParallelDims

SECONDS_TO_HEAR_THE_OTHERS = 2.0  # after the first rank failed
SECONDS_AFTER_COLLECTIVES_TIMED_OUT = 15.0
MOST_LOST_GROUPS = 3
ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank does; a subclass says with what each plan is compared."""

    cases: tuple[Case, ...]
    device_type: str
    timeout_seconds: float = 300.0
    """Longest that one plan may take, compilation included."""

    def compare(self, case: Case, dims: ParallelDims) -> Comparison:
        """Run one plan and compare it; every rank calls this."""
        raise AssertionError("a subclass compares")


@dataclass(frozen=True, kw_only=True)
class PlanJob(Job):
    """Compares the plans of one model of random weights with one process."""

    subject: Subject
    fault: str | None = None

    def compare(self, case: Case, dims: ParallelDims) -> Comparison:
        """Run one plan, with the fault where there is one, and compare it with one process."""
        parity.reference(parity.reference_case(case), self.subject, self.device_type)
        plan = self.subject.family.plan(self.subject.sizes(case))
        with contextlib.ExitStack() as stack:
            if self.fault is not None:
                plan = plan | FAULTS[self.fault].plan
                stack.enter_context(FAULTS[self.fault].planted())
            return parity.run_case(
                case, device_type=self.device_type, subject=self.subject, dims=dims, plan=plan
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one plan."""

    case: Case
    seconds: float
    comparison: Comparison | None = None
    """The worst of all ranks; None where a rank was lost."""

    error: str = ""
    """What the lost rank said, or how it ended."""


def check_plans(job: Job, host_group: dist.ProcessGroup) -> Iterator[Row]:
    """Run every plan on this rank and yield what all ranks found; every rank must exhaust this."""
    built: dict[ParallelDims, ParallelDims] = {}
    for case in job.cases:
        started = time.perf_counter()
        dims = ParallelDims.of(parity.parallel_config(case), case.world_size)
        degrees = replace(dims, balanced=False)
        if degrees not in built:
            built[degrees] = degrees.build(job.device_type)
        mine = job.compare(case, replace(built[degrees], balanced=dims.balanced))
        everyone: list[Comparison] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=host_group)
        if case.backend:
            torch._dynamo.reset()
        gc.collect()
        seconds = round(time.perf_counter() - started, 2)
        yield Row(case=case, seconds=seconds, comparison=parity.worst(everyone))


@contextlib.contextmanager
def joined(
    job: Job, rendezvous: str = "env://", *, rank: int = -1, world_size: int = -1
) -> Iterator[dist.ProcessGroup]:
    """Join the other ranks; yields the group for small agreements on the host.

    Without a rank the launcher's environment variables say who we are.
    """
    backend = "gloo"
    if job.device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_float32_matmul_precision("highest")  # no TF32: fp32 rows are to be exact
        torch.backends.cudnn.allow_tf32 = False
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(1)
    # Gathering a parameter to compare it is slow and says so, once a rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    timeout = timedelta(seconds=job.timeout_seconds)
    dist.init_process_group(
        backend, init_method=rendezvous, timeout=timeout, rank=rank, world_size=world_size
    )
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(host_group, dist.ProcessGroup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield host_group
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


def _serve(rank: int, size: int, job: Job, rendezvous: str, pipe: Connection) -> None:
    """Run a job in a process of our own and report through the pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the command
    os.environ["LOCAL_RANK"] = str(rank)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries of each rank print there
    torch._logging.set_logs(all=logging.ERROR)
    try:
        with joined(job, rendezvous, rank=rank, world_size=size) as host_group:
            for row in check_plans(job, host_group):
                if rank == 0:
                    pipe.send(row)
        pipe.send(None)
    except BaseException as error:
        pipe.send(_describe(error))


def _describe(error: BaseException) -> str:
    """Return the message and, innermost first, the places in our own files that led to it."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT)]
    places = [f"  at {Path(f.filename).relative_to(ROOT)}:{f.lineno} in {f.name}" for f in ours]
    return "\n".join([f"{type(error).__name__}: {error}", *places])


@dataclass(kw_only=True)
class _Group:
    """Processes of one job, and what was heard of them."""

    job: Job
    processes: list[BaseProcess]
    pipes: list[Connection]
    rows: int = 0
    errors: dict[int, str] = field(default_factory=dict[int, str])
    done: set[int] = field(default_factory=set[int])

    def listen(self) -> Iterator[Row]:
        """Yield rows as they come, the last one with an error where a rank was lost."""
        started = time.monotonic()
        deadline = started + self._patience
        while len(self.done) + len(self.errors) < len(self.pipes):
            silent = [r for r in range(len(self.pipes)) if r not in self.done | {*self.errors}]
            ready = wait([self.pipes[r] for r in silent], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [r for r in silent if self.pipes[r] in ready]:
                row = self._hear(rank)
                if row is not None:
                    yield row
                    started = time.monotonic()
                    deadline = started + self._patience
            if self.errors:
                deadline = min(deadline, time.monotonic() + SECONDS_TO_HEAR_THE_OTHERS)
        if len(self.done) < len(self.pipes):
            seconds = round(time.monotonic() - started, 2)
            case = self.job.cases[min(self.rows, len(self.job.cases) - 1)]
            yield Row(case=case, seconds=seconds, error=self._what_happened())

    @property
    def _patience(self) -> float:
        return self.job.timeout_seconds + SECONDS_AFTER_COLLECTIVES_TIMED_OUT

    def _hear(self, rank: int) -> Row | None:
        try:
            message = self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(timeout=5.0)
            self.errors[rank] = _how_it_ended(self.processes[rank].exitcode)
            return None
        if isinstance(message, Row):
            self.rows += 1
            return message
        if isinstance(message, str):
            self.errors[rank] = message
        else:
            self.done.add(rank)
        return None

    def _what_happened(self) -> str:
        """Say what was heard first, and above it which rank is gone or stuck: that is the cause."""
        lines = [f"rank {r}: {e}" for r, e in self.errors.items()]
        causes = [line for line in lines if ": died" in line]
        heard = lines[0] if lines else ""
        if not causes and (not heard or "imed out" in heard):
            known = self.done | {*self.errors}
            silent = ", ".join(str(r) for r in range(len(self.pipes)) if r not in known)
            if silent:
                causes = [f"rank {silent}: did not go on for {self.job.timeout_seconds:g} seconds"]
        return "\n".join(dict.fromkeys([*causes, *lines[:1]]))


def _how_it_ended(code: int | None) -> str:
    name = f" ({signal.Signals(-code).name})" if code is not None and code < 0 else ""
    return f"died with exit code {code}{name}"


@contextlib.contextmanager
def _started(job: Job, size: int, folder: Path) -> Iterator[_Group]:
    # A fork of a process that has imported torch, and has one thread, starts in tenths of a
    # second; CUDA does not survive one.
    context: Any = multiprocessing.get_context("spawn" if job.device_type == "cuda" else "fork")
    group = _Group(job=job, processes=[], pipes=[])
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(dir=folder) as own:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, size, job, f"file://{own}/rendezvous", theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            group.processes.append(process)
            group.pipes.append(ours)
        try:
            yield group
        finally:
            for process in group.processes:
                process.kill()
            for process in group.processes:
                process.join(timeout=10.0)


def run_here(job: Job, size: int, on_row: Callable[[Row], None]) -> None:
    """Run a job on `size` processes of this machine; a lost rank costs its plan only."""
    torch.set_num_threads(1)
    lost = 0
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        while job.cases:
            if lost == MOST_LOST_GROUPS:
                for case in job.cases:
                    on_row(Row(case=case, seconds=0.0, error=f"not run: ranks were lost {lost} x"))
                return
            with _started(job, size, Path(folder)) as group:
                for row in group.listen():
                    on_row(row)
                    lost += bool(row.error)
                    job = replace(job, cases=job.cases[1:])
