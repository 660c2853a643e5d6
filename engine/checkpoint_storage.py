"""Tensors to and from the files of a checkpoint folder, through torch's distributed checkpointing.

Digests are taken while the bytes are written, by the rank that writes them: no file is read again
for its digest, and what is recorded is what was meant to be written.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from engine.distributed import STORAGE_GROUP, cores_of_rank
from engine.manifest import DIGEST_BYTES, CheckpointError, FaultHook, FileRecord, no_fault

_MAX_WRITE_THREADS = 4

LONGEST_WAIT = timedelta(hours=6)
"""For another rank's files: the largest save or export must fit."""

Value = TypeVar("Value")


class RankGroup:
    """All ranks, talking over a gloo group of their own: safe beside the training collectives.

    Every rank must construct it and make the same calls in the same order. In a process without
    `torch.distributed` it is a group of one.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.group: dist.ProcessGroup | None = None
        if distributed:
            made = dist.new_group(backend="gloo", timeout=LONGEST_WAIT, group_desc=STORAGE_GROUP)
            self.group = cast(dist.ProcessGroup, made)
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, function: Callable[[], Value]) -> Value:
        """Run `function` on rank 0 and return its result, or raise its error, on every rank."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, function: Callable[[], Value]) -> Value:
        """Run `function` on every rank; where one fails, all raise an error."""
        result, error = None, None
        try:
            result = function()
        except Exception as failure:
            error = failure
        failed = [failure for failure in self.gather(error) if failure is not None]
        if failed:
            raise failed[0] if error is None else error
        return cast(Value, result)

    def close(self) -> None:
        """Give the group back."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


class HostCopies:
    """Copies of tensors in host memory that later training steps do not change.

    The memory is kept between saves, so a copy must be written out before the next is taken.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned and torch.cuda.is_available()
        """Whether the memory is pinned, so that a GPU copies into it at its own rate."""
        self._copies: dict[str, Tensor] = {}

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate what copies of these tensors need."""
        for name, tensor in tensors.items():
            kept = self._copies.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                self._copies[name] = self._allocate(tensor)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy all tensors of this rank and return when the copy is whole."""
        self.reserve(tensors)
        for name, tensor in tensors.items():
            _local(self._copies[name]).copy_(_local(tensor), non_blocking=self.pinned)
        if self.pinned:
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in tensors}

    def _allocate(self, tensor: Tensor) -> Tensor:
        memory = torch.empty_like(_local(tensor), device="cpu", pin_memory=self.pinned)
        if not isinstance(tensor, DTensor):
            return memory
        # Not from_local, which would move the memory to the device of the mesh.
        return DTensor(memory, tensor._spec, requires_grad=False)

    def close(self) -> None:
        """Free the memory."""
        self._copies.clear()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _DigestStream:
    """A file opened for writing that digests what passes through."""

    def __init__(self, path: Path, hook: FaultHook) -> None:
        self._path, self._hook = path, hook
        self._file = path.open("wb")
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def write(self, content: Any) -> int:
        self._hook("write", self._path)
        self._digest.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def record(self) -> FileRecord:
        return FileRecord(bytes=self._path.stat().st_size, digest=self._digest.hexdigest())


class _DigestFileSystem(FileSystem):
    """The writer's file system; `records` collects what this rank wrote, by file name."""

    def __init__(self, hook: FaultHook) -> None:
        self._hook = hook
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        stream = _DigestStream(Path(path), self._hook)
        try:
            yield stream
        finally:
            stream.close()
        self.records[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


def write_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    ranks: RankGroup,
    hook: FaultHook = no_fault,
    *,
    planner: dcp.SavePlanner | None = None,
    one_file_per_tensor: bool = False,
) -> dict[str, FileRecord]:
    """Write each rank's part of `tensors` into `folder`; return every file with its digest.

    Every rank must call this; a failure on one is a CheckpointError on all.
    """
    writer = FileSystemWriter(
        folder,
        single_file_per_rank=not one_file_per_tensor,
        thread_count=min(_MAX_WRITE_THREADS, cores_of_rank()),
        per_thread_copy_ahead=0,
    )
    files = _DigestFileSystem(hook)
    writer.fs = files
    with warnings.catch_warnings(), _explained(f"writing {folder}"):
        warnings.simplefilter("ignore")
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=planner,
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return {name: record for part in ranks.gather(files.records) for name, record in part.items()}


class _MetadataReader(FileSystemReader):
    """A reader that is given the metadata, so that it is parsed once for many reads."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """Return the tensors' names, shapes, dtypes and places in the files of a checkpoint folder."""
    return FileSystemReader(folder).read_metadata()


def read_tensors(
    tensors: Mapping[str, Tensor], folder: Path, metadata: Metadata, ranks: RankGroup | None
) -> None:
    """Fill `tensors` in place from a checkpoint folder, each rank reading only its own parts.

    Every rank of `ranks` must call this; without it, this process alone reads.
    """
    group = ranks.group if ranks is not None else None
    with warnings.catch_warnings(), _explained(f"reading {folder}"), torch.no_grad():
        warnings.simplefilter("ignore")
        dcp.load(
            dict(tensors),
            storage_reader=_MetadataReader(folder, metadata),
            process_group=group,
            no_dist=group is None,
        )


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn torch's CheckpointException, which `except Exception` misses, into a CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        causes = [
            f"rank {rank}: {type(cause).__name__}: {cause}"
            for rank, (cause, _) in sorted(error.failures.items())
        ]
        raise CheckpointError(f"{doing} failed ({'; '.join(causes[:4])})") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{doing} failed ({type(error).__name__}: {error})") from error
