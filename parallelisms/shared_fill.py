"""Fills a sharded model from storage: ranks read whole rows, and hand each other what they need.

Rows lie together in a file, columns do not: ranks that hold columns of the same rows read disjoint
rows and swap. Replicas need the same bytes. On one node the second reader finds them in the page
cache, which is faster than a collective; those of several nodes can read disjoint rows too.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallelisms.collectives import gather, shard_range
from parallelisms.materialise import Draw, local_slices

BYTES_AT_ONCE = 1 << 26
"""Largest block of rows that is exchanged at once: what a rank needs of memory beside the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sharers:
    """The ranks that hold, of a matrix, the same rows: all columns of them or some."""

    mesh: DeviceMesh
    replicas: Sequence[int]
    """Axes over which the parameter is replicated, where replicas share."""

    columns: int | None
    """Axis over which its second dim is split."""

    @classmethod
    def of(cls, parameter: Tensor, *, share_replicas: bool) -> "_Sharers | None":
        """Return who shares the rows of a parameter; None where each rank has rows of its own.

        Vectors are too small to be worth a collective, so each rank reads its own part.
        """
        if not isinstance(parameter, DTensor) or parameter.ndim < 2:
            return None
        mesh = parameter.device_mesh
        replicas: list[int] = []
        columns: list[int] = []
        for axis, placement in enumerate(parameter.placements):
            if mesh.size(axis) == 1:
                continue
            if placement.is_replicate():
                replicas += [axis] if share_replicas else []
            elif placement.is_shard(1):
                columns.append(axis)
            elif getattr(placement, "dim", 0) != 0:
                return None
        if len(columns) > 1 or not (replicas or columns):
            return None
        return cls(mesh=mesh, replicas=replicas, columns=columns[0] if columns else None)

    @property
    def axes(self) -> list[int]:
        """The axes of the mesh, the one of the columns last."""
        return [*self.replicas, *([] if self.columns is None else [self.columns])]

    def rows_to_read(self, rows: slice) -> slice:
        """Return which of the rows that all of them need this rank reads."""
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None, "this rank is part of the parameter's mesh"
        place = 0
        for axis in self.axes:
            place = place * self.mesh.size(axis) + coordinate[axis]
        ways = math.prod(self.mesh.size(axis) for axis in self.axes)
        part = shard_range(rows.stop - rows.start, ways, place)
        return slice(rows.start + part.start, rows.start + part.stop)

    def rows_each(self, rows: slice) -> int:
        """Return how many rows a rank reads at most."""
        return -(-(rows.stop - rows.start) // math.prod(self.mesh.size(a) for a in self.axes))

    def exchange(self, whole_RC: Tensor) -> Tensor:
        """Return the columns of this rank in the rows of all sharers, from the rows each has read.

        Every sharer must call this with equally many rows. Columns past the last are zeros.
        """
        part = whole_RC
        if self.columns is not None:
            part = _swap_columns(part, self.mesh.get_group(self.columns))
        for axis in reversed(self.replicas):
            part = gather(part, 0, self.mesh.get_group(axis))
        return part


def _swap_columns(whole_RC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send each rank of the group its columns of our rows; return our columns of all rows."""
    size, num_columns = group.size(), whole_RC.shape[1]
    each = -(-num_columns // size)
    sent = whole_RC.new_zeros(size, whole_RC.shape[0], each, *whole_RC.shape[2:])
    for place in range(size):
        columns = shard_range(num_columns, size, place)
        sent[place, :, : columns.stop - columns.start] = whole_RC[:, columns]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


@torch.no_grad()
def fill_shared(
    model: nn.Module, draw: Draw, *, skip: Collection[str] = (), share_replicas: bool = False
) -> None:
    """Set every parameter but those of `skip` from `draw(name, slices)`, called for whole rows.

    The ranks together draw each element of a matrix once, or once for each replica of it where
    these do not share, and then exchange what they need. Every rank must call this; an error of
    `draw` is raised at the end, when no rank waits for another, and then the values are not to be
    used.
    """
    failures: list[Exception] = []

    def drawn(name: str, slices: Sequence[slice]) -> Tensor | None:
        if failures or any(part.start == part.stop for part in slices):
            return None
        try:
            return draw(name, tuple(slices))
        except Exception as error:
            failures.append(error)
            return None

    for name, parameter in model.named_parameters():
        if name in skip:
            continue
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        slices = local_slices(parameter)
        sharers = _Sharers.of(parameter, share_replicas=share_replicas)
        if sharers is None:
            values = drawn(name, slices)
            if values is not None:
                assert values.shape == local.shape, f"{name}: {values.shape} for {local.shape}"
                local.copy_(values)
            continue
        others = [slice(0, size) for size in parameter.shape[1:]]
        for rows in _blocks(
            slices[0], bytes_of_row=math.prod(parameter.shape[1:]) * local.itemsize
        ):
            read = torch.zeros(
                (sharers.rows_each(rows), *parameter.shape[1:]),
                dtype=local.dtype,
                device=sharers.mesh.device_type,
            )
            values = drawn(name, [sharers.rows_to_read(rows), *others])
            if values is not None:
                read[: len(values)] = values
            held = sharers.exchange(read)[: rows.stop - rows.start, : local.shape[1]]
            first = rows.start - slices[0].start
            local[first : first + len(held)] = held
    if failures:
        raise failures[0]


def _blocks(rows: slice, bytes_of_row: int) -> Iterator[slice]:
    """Cut rows into blocks that are exchanged at once."""
    size = max(1, BYTES_AT_ONCE // bytes_of_row)
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))
