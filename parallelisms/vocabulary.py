"""Log-probabilities of labels when each rank holds the logits of a part of the vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from parallelisms.collectives import shard_range

IGNORED_LABEL = -100


class _SplitLabelLogps(torch.autograd.Function):
    """Three numbers per token travel: the maximum, the sum of exponentials, the label's logit."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        first_id: int,
        softcap: float | None,
        group: Any,
    ) -> Tensor:
        local_N = labels_N - first_id
        is_here = (labels_N != IGNORED_LABEL) & (local_N >= 0) & (local_N < logits_NV.shape[-1])
        local_N = torch.where(is_here, local_N, 0)
        # A cap keeps the order of the logits, so that of the largest is the largest.
        maximum_N = _all_reduce(_soft_cap(_maximum(logits_NV), softcap), "max", group)
        sum_N = (_soft_cap(logits_NV, softcap) - maximum_N[:, None]).exp_().sum(dim=-1)
        target_N = logits_NV.gather(-1, local_N[:, None]).squeeze(-1)
        target_N = _soft_cap(target_N, softcap)
        target_N = torch.where(is_here, target_N - maximum_N, 0.0)
        sum_N, target_N = _all_reduce(torch.stack((sum_N, target_N)), "sum", group).unbind()
        log_sum_N = sum_N.log()
        is_scored = labels_N != IGNORED_LABEL
        ctx.save_for_backward(logits_NV, maximum_N + log_sum_N, local_N, is_here, is_scored)
        ctx.softcap = softcap
        return torch.where(is_scored, target_N - log_sum_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits_NV, normaliser_N, local_N, is_here, is_scored = ctx.saved_tensors
        scale_N = torch.where(is_scored, grad_N, 0.0)
        capped_NV = _soft_cap(logits_NV, ctx.softcap)
        likelihood_NV = (capped_NV - normaliser_N[:, None]).exp()
        # Compared, not scattered, so that a compiler fuses all of this into one pass.
        columns_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
        is_label_NV = (local_N[:, None] == columns_V) & is_here[:, None]
        grad_NV = torch.where(is_label_NV, 1.0 - likelihood_NV, -likelihood_NV) * scale_N[:, None]
        if ctx.softcap is not None:
            grad_NV = grad_NV * (1.0 - (capped_NV / ctx.softcap) ** 2)
        return grad_NV.to(logits_NV.dtype), None, None, None, None


def _soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Return fp32 `cap * tanh(x / cap)`; see `models.layers.head.soft_cap`."""
    return x.float() if cap is None else (x.float() / cap).tanh() * cap


def _maximum(logits_NV: Tensor) -> Tensor:
    return logits_NV.amax(dim=-1).float()


def _all_reduce(x: Tensor, operation: str, group: Any) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x, operation, group))


class VocabularyLogps:
    """The head's `label_logps` under tensor parallelism; every rank of `mesh` must call it.

    With `keep_split` the logits never leave their rank; otherwise they are gathered and scored by
    `whole`, the head's own function, which has the soft cap already.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        whole: Callable[[Tensor, Tensor], Tensor],
        softcap: float | None = None,
        keep_split: bool,
    ) -> None:
        self.mesh = mesh
        self.whole = whole
        self.softcap = softcap
        self.keep_split = keep_split

    def __call__(self, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Return fp32 log-probabilities (N,) of logits (N, V) split over V."""
        assert isinstance(logits_NV, DTensor), "the split head makes distributed logits"
        if not self.keep_split:
            gathered = logits_NV.redistribute(placements=(Replicate(),)).to_local()
            return self.whole(gathered, labels_N)
        part = shard_range(logits_NV.shape[-1], self.mesh.size(), self.mesh.get_local_rank())
        logps_N = _SplitLabelLogps.apply(
            logits_NV.to_local(), labels_N, part.start, self.softcap, self.mesh.get_group()
        )
        assert isinstance(logps_N, Tensor), "autograd functions return what their forward returns"
        return logps_N
