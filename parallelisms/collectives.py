"""Sums over named axes, differentiable collectives, cuts into shards."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from parallelisms.mesh import ParallelDims


def shard_range(size: int, num_shards: int, index: int) -> slice:
    """Return which part of `size` elements shard `index` holds.

    All shards but the last non-empty one are equally long, as `torch.chunk` cuts.
    """
    length = -(-size // num_shards)
    return slice(min(index * length, size), min((index + 1) * length, size))


def sum_over(dims: ParallelDims, axis: str, tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over the ranks of an axis; every rank of it must call this."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=dims.mesh(axis).get_group())
    return total


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def wait_differentiably(x: Tensor) -> Tensor:
    """Return `x` as an ordinary tensor whose gradient still reaches what computed it.

    A compiled block that is handed an unfinished tensor loses the embedding's gradient without an
    error, and so does a plain `.wait()`, which detaches. See
    test_the_embedding_gradient_survives_compile_under_tensor_parallelism.
    """
    waited = _Wait.apply(x)
    assert isinstance(waited, Tensor), "autograd functions return what their forward returns"
    return waited


def _finished(x: Tensor) -> Tensor:
    """Wait for a functional collective, traced or not."""
    return funcol.wait_tensor(x)


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Return `x` of all ranks joined along `dim`, in rank order; every rank must call this."""
    # torch 2.13 calls all_gather_tensor by another name, and warns of the old one.
    collective = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    joined = _finished(collective(x.movedim(dim, 0).contiguous(), 0, group))
    return joined.movedim(0, dim)


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    collective = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
    mine = _finished(collective(x.movedim(dim, 0).contiguous(), "sum", 0, group))
    return mine.movedim(0, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gather(x, dim, group)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


def gather_differentiably(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Do as `gather`; each rank gets back the gradients that all ranks have of its part."""
    joined = _Gather.apply(x, dim, group)
    assert isinstance(joined, Tensor), "autograd functions return what their forward returns"
    return joined


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _finished(funcol.all_reduce(x, "sum", group))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return _finished(funcol.all_reduce(grad, "sum", ctx.group)), None


class SequenceSum:
    """Adds a per-sequence value over the ranks that share its tokens; differentiable.

    Every one of these ranks must call it and gets the whole sum; alone, a rank gets its own value.
    """

    def __init__(self, dims: ParallelDims) -> None:
        self.num_ranks = dims.cp
        self._group = dims.mesh("cp").get_group() if dims.cp > 1 else None

    def __call__(self, value_B: Tensor) -> Tensor:
        """Return the sum over the ranks that share a sequence."""
        if self._group is None:
            return value_B
        total_B = _Sum.apply(value_B, self._group)
        assert isinstance(total_B, Tensor), "autograd functions return what their forward returns"
        return total_B


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _finished(funcol.all_to_all_single(x.contiguous(), None, None, group))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return _finished(funcol.all_to_all_single(grad.contiguous(), None, None, ctx.group)), None


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part r of the first dim, which has one for each rank, to rank r; differentiable.

    Returns the parts received in rank order. Every rank of the group must call this.
    """
    received = _Exchange.apply(x, group)
    assert isinstance(received, Tensor), "autograd functions return what their forward returns"
    return received
