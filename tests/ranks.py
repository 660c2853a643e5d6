"""Pytest plugin: the fixture `ranks` runs a function on several gloo ranks of a persistent pool.

Workers are forked once from a process that has already imported torch, and serve every test of
the session, so a distributed case costs tenths of a second. Each call gets a fresh process group.
A worker that raises, dies or hangs fails its test; the pool is forked anew for the next one.
"""

import ctypes
import faulthandler
import gc
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

DEFAULT_TIMEOUT_SECONDS = 120.0
GRACE_AFTER_FIRST_FAILURE_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

PRELOADED_MODULES = ["tests.preloaded"]


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the text says which and why."""


@dataclass(frozen=True)
class Task:
    """One call, as a worker receives it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    rendezvous: Path
    timeout_seconds: float


@dataclass
class Worker:
    """A forked process and the parent's end of its pipe."""

    process: BaseProcess
    pipe: Connection
    crash: Path
    """Where it writes its stacks when a signal such as SIGSEGV ends it."""

    def death(self) -> str:
        """Say how the process ended."""
        self.process.join(timeout=1.0)
        stacks = self.crash.read_text() if self.crash.is_file() else ""
        return f"the worker died with exit code {self.process.exitcode}\n{stacks}".strip()


def _serve(pipe: Connection, path: list[str], crash: Path) -> None:
    """Answer tasks until the pipe closes; runs in the worker."""
    stacks = crash.open("w")
    faulthandler.enable(stacks)
    if sys.platform == "linux":
        # A worker that hangs must not outlive the test run.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    # Gathering a parameter to compare it is slow and says so, once a rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    gc.freeze()  # a collection after each call then looks at little
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer = (True, _run(pickle.loads(message)))
            encoded = pickle.dumps(answer)
        except BaseException:
            # BaseException: a checkpoint error of torch derives from it directly.
            encoded = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(encoded)


def _run(task: Task) -> Any:
    import torch
    import torch.distributed as dist

    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(task.rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(task.world_size)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task.rendezvous}",
        rank=task.rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=task.timeout_seconds),
    )
    try:
        result = task.function(task.rank, task.world_size, *task.args)
        if dist.is_initialized():
            dist.barrier()  # as in leave_process_group
        return result
    finally:
        forget_meshes()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()


def leave_process_group() -> None:
    """End the process group of a call, for a function that joins another; every rank calls this."""
    import torch.distributed as dist

    dist.barrier()  # a peer may still be connecting, and would see its connection closed
    dist.destroy_process_group()


def forget_meshes() -> None:
    """Drop every reference to the meshes of a call, so that its process groups end with it.

    Otherwise caches would hand the next case a mesh whose groups are gone, and keep the groups'
    threads: fifty groups were alive in one worker, to be freed at any later moment.
    """
    import torch
    from torch.distributed.tensor import _collective_utils, _redistribute, debug

    torch._dynamo.reset()
    debug._clear_sharding_prop_cache()
    for owner, name in (
        (debug, "_clear_fast_path_sharding_prop_cache"),  # not in every torch
        (_redistribute, "clear_redistribute_planner_cache"),
    ):
        getattr(owner, name, lambda: None)()
    _redistribute._gen_transform_infos.cache_clear()
    _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()
    gc.collect()  # models and their graphs, which then let go of meshes


@dataclass
class RankPool:
    """The workers of one test session; grows to the largest world size asked for."""

    workers: list[Worker] = field(default_factory=list)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ranks-")))
    calls: int = 0
    started: int = 0

    def __call__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> list[Any]:
        """Run `function(rank, world_size, *args)` on every rank; return the results by rank.

        The function must be importable (module level), arguments and results picklable. Inside,
        the default process group is ready. A failure on any rank raises `RankFailure` with that
        rank's traceback.
        """
        self._grow(world_size)
        self.calls += 1
        workers = self.workers[:world_size]
        for rank, worker in enumerate(workers):
            task = Task(
                function, args, rank, world_size, self.folder / str(self.calls), timeout_seconds
            )
            worker.pipe.send_bytes(pickle.dumps(task))
        results, failures = self._collect(workers, timeout_seconds)
        if failures:
            self._discard(workers)
            raise RankFailure("\n".join(failures.values()))  # the first to fail is the cause
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End every worker and remove the rendezvous files."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join(timeout=5.0)
        self._discard(self.workers[:])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _grow(self, size: int) -> None:
        self._discard([w for w in self.workers if not w.process.is_alive()])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED_MODULES)
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            self.started += 1
            crash = self.folder / f"crash-{self.started}"
            process = context.Process(target=_serve, args=(theirs, sys.path, crash), daemon=True)
            process.start()
            theirs.close()
            self.workers.append(Worker(process, ours, crash))

    def _collect(
        self, workers: list[Worker], timeout_seconds: float
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """Wait for every rank; after the first failure the others get a short grace only."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(enumerate(workers))
        deadline = time.monotonic() + timeout_seconds
        while waiting:
            pipes = [worker.pipe for worker in waiting.values()]
            ready = wait(pipes, max(0.0, deadline - time.monotonic()))
            if not ready:
                if not failures:
                    for rank in waiting:
                        failures[rank] = f"rank {rank}: no answer in {timeout_seconds:g} seconds"
                return results, failures
            for rank in [r for r, worker in waiting.items() if worker.pipe in ready]:
                try:
                    succeeded, value = pickle.loads(waiting[rank].pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, waiting[rank].death()
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = f"rank {rank}: {value}"
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FIRST_FAILURE_SECONDS)
                del waiting[rank]
        return results, failures

    def _discard(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.pipe.close()
            worker.process.kill()
            worker.process.join(timeout=5.0)
            self.workers.remove(worker)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The pool itself, for tests of the pool."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def ranks(rank_pool: RankPool) -> RankPool:
    """Run `ranks(world_size, function, *args)` on gloo ranks; see `RankPool.__call__`."""
    return rank_pool
