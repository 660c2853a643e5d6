"""The rows of a run that is killed and goes on with other ranks, against those of one rank alone.

Every data-parallel rank of a part is a process of its own that reads through the loader of a real
run, workers included, and is killed with them while they read ahead. `elastic_command.py` says
which parts there are and prints what came of them.
"""

import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from engine.batches import Counters, count_step, first_counters, open_training_batches
from engine.config import JobConfig
from engine.data.batch import Batch
from engine.data.loader import FILLER
from engine.data.rows import RowSource

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
DIGEST_BYTES = 16

Read = tuple[int, bytes]
"""Global number of a row, and the digest of the number and of all its tensors."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Steps between two kills."""

    ranks: int
    """Data-parallel ranks."""

    workers: int
    """Worker processes of each rank's loader."""

    first_step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class PartRead:
    """What the ranks of one part read."""

    part: Part
    rows: tuple[Read, ...]
    """In the order of steps, and within one by number, as a step is the sum of its rows; fillers
    are left out."""

    seconds: float
    error: str = ""
    """What a rank said that could not go on; the rows are not complete then."""


def cut_steps(steps: int, sizes: Sequence[int], workers: int) -> list[Part]:
    """Return the parts of a run of `steps` steps: one for each size, nearly equally long."""
    borders = [steps * number // len(sizes) for number in range(len(sizes) + 1)]
    return [
        Part(ranks=ranks, workers=workers, first_step=begin + 1, num_steps=end - begin)
        for ranks, begin, end in zip(sizes, borders, borders[1:], strict=False)
    ]


def read_parts(
    config: JobConfig, rows: RowSource, parts: Sequence[Part], timeout_seconds: float
) -> Iterator[PartRead]:
    """Read the parts in turn, each from where the steps of those before it left off.

    `training.global_batch_size` must be a number. After a part with an error there are no others.
    """
    counters = first_counters()
    for part in parts:
        found = _read_part(
            _with_workers(config, part.workers), rows, part, counters, timeout_seconds
        )
        yield found
        if found.error:
            return
        count_part(counters, part, config.training.global_batch_size)


def count_part(counters: Counters, part: Part, rows_per_step: int) -> None:
    """Count the steps of a part as a run does; tokens decide no row and are left out."""
    for step in range(part.first_step, part.first_step + part.num_steps):
        count_step(counters, step, rows=rows_per_step, tokens=0, trained_tokens=0, sources={})


def digest_stream(rows: Sequence[Read]) -> str:
    """Return the digest of rows in their order."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for _, one in rows:
        digest.update(one)
    return digest.hexdigest()


def not_once(rows: Sequence[Read], num_rows: int) -> str:
    """Say which of the first `num_rows` rows are missing, repeated or foreign; empty if none."""
    counts = Counter(number for number, _ in rows)
    faults = {
        "missing": [number for number in range(num_rows) if number not in counts],
        "more than once": sorted(number for number, count in counts.items() if count > 1),
        "of later steps": sorted(number for number in counts if number >= num_rows),
    }
    return "; ".join(
        f"{len(numbers):,} rows {what}, the first is row {numbers[0]:,}"
        for what, numbers in faults.items()
        if numbers
    )


def _with_workers(config: JobConfig, workers: int) -> JobConfig:
    given = config.training.dataloader
    changes = {"num_workers": workers}
    # Both mean nothing, and are refused, without workers.
    changes |= {} if workers else {"prefetch_factor": None, "persistent_workers": False}
    dataloader = replace(given, **changes)
    return replace(config, training=replace(config.training, dataloader=dataloader))


def _read_part(
    config: JobConfig, rows: RowSource, part: Part, counters: Counters, timeout_seconds: float
) -> PartRead:
    started = time.perf_counter()
    each = config.training.dealing(part.ranks).microbatches
    with _ranks(config, rows, part, counters) as pipes:
        read, error = _collect(pipes, each * part.num_steps, timeout_seconds)
    microbatches = list(zip(*read, strict=not error))
    in_order: list[Read] = []
    for first in range(0, len(microbatches), each):
        step = microbatches[first : first + each]
        in_order += sorted(row for shares in step for share in shares for row in share)
    seconds = round(time.perf_counter() - started, 2)
    return PartRead(part=part, rows=tuple(in_order), seconds=seconds, error=error)


def _collect(
    pipes: Sequence[Connection], microbatches: int, timeout_seconds: float
) -> tuple[list[list[list[Read]]], str]:
    """Return the rows of each rank's first microbatches; what ranks read ahead is left unread."""
    read: list[list[list[Read]]] = [[] for _ in pipes]
    while silent := [rank for rank, one in enumerate(read) if len(one) < microbatches]:
        ready = wait([pipes[rank] for rank in silent], timeout_seconds)
        if not ready:
            return read, f"rank {silent[0]}: nothing in {timeout_seconds:g} seconds"
        for rank in [rank for rank in silent if pipes[rank] in ready]:
            try:
                message = pipes[rank].recv()
            except (EOFError, ConnectionResetError):
                return read, f"rank {rank} died"
            if isinstance(message, str):
                return read, f"rank {rank}: {message}"
            read[rank].append(message)
    return read, ""


@contextmanager
def _ranks(
    config: JobConfig, rows: RowSource, part: Part, counters: Counters
) -> Iterator[list[Connection]]:
    """Start the ranks of a part; on leaving, kill them and their workers wherever they are."""
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    sys.stdout.flush()
    try:
        for rank in range(part.ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_read, args=(config, rows, part, rank, counters, theirs)
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        yield pipes
    finally:
        for process in processes:
            _kill_group(process)
        for process in processes:
            process.join(timeout=10.0)
        for pipe in pipes:
            pipe.close()


def _kill_group(process: BaseProcess) -> None:
    assert process.pid is not None, "the process was started"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # gone, or not yet the leader of a group
        process.kill()


def _read(
    config: JobConfig, rows: RowSource, part: Part, rank: int, counters: Counters, pipe: Connection
) -> None:
    """Read microbatches without end, as one rank, and send what is in them; runs until killed."""
    os.setpgid(0, 0)  # the kill is to take the workers too
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the command
    torch.set_num_threads(1)
    try:
        batches = open_training_batches(
            config, rows, batch_rank=rank, batch_degree=part.ranks, counters=counters
        )
        for batch in batches:
            pipe.send(_digests(batch))
    except BrokenPipeError:
        return  # the parent has all it wants and will kill us
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _digests(batch: Batch) -> list[Read]:
    tensors = (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.documents_BT)
    return [
        (number, _digest(number, [tensor_BT[row] for tensor_BT in tensors]))
        for row, number in enumerate(batch.rows_B.tolist())
        if number != FILLER
    ]


def _digest(number: int, tensors_T: Sequence[Tensor]) -> bytes:
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    for tensor_T in tensors_T:
        digest.update(tensor_T.numpy().tobytes())
    return digest.digest()
