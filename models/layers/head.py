"""The language-model head: logits, or log-probabilities of labels taken in chunks of tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models.layers import liger

IGNORED_LABEL = -100


class _LabelLogps(torch.autograd.Function):
    """Keeps the logits in their own dtype and one fp32 number per token for the backward."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        is_scored = labels_N != IGNORED_LABEL
        target_N = torch.where(is_scored, labels_N, 0)
        normaliser_N = torch.logsumexp(logits_NV.float(), dim=-1)
        label_logits_N = logits_NV.gather(-1, target_N[:, None]).squeeze(-1).float()
        ctx.save_for_backward(logits_NV, normaliser_N, labels_N)
        return torch.where(is_scored, label_logits_N - normaliser_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor, None]:
        logits_NV, normaliser_N, labels_N = ctx.saved_tensors
        scale_N = torch.where(labels_N == IGNORED_LABEL, 0.0, grad_N)
        likelihood_NV = (logits_NV.float() - normaliser_N[:, None]).exp()
        # Compared, not scattered, so that a compiler fuses all of this into one pass.
        vocabulary_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
        is_label_NV = labels_N[:, None] == vocabulary_V
        grad_NV = torch.where(is_label_NV, 1.0 - likelihood_NV, -likelihood_NV) * scale_N[:, None]
        return grad_NV.to(logits_NV.dtype), None


def label_logps(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the fp32 log-probability of each label; 0, without gradient, where it is ignored."""
    logps_N = _LabelLogps.apply(logits_NV, labels_N)
    assert isinstance(logps_N, Tensor), "autograd functions return what their forward returns"
    return logps_N


class LMHead(nn.Linear):
    """The last linear layer, which scores labels itself so that few logits are alive at once.

    `label_logps` is an attribute, the one seam where a split vocabulary or a compiled kernel
    steps in: `(logits_NV, labels_N) -> logps_N` in fp32. It may overwrite the logits.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        *,
        chunk_tokens: int,
        recompute_logits: bool,
        kernels: liger.Kernels = "torch",
    ) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.chunk_tokens = chunk_tokens
        self.recompute_logits = recompute_logits
        self.label_logps: Callable[[Tensor, Tensor], Tensor] = (
            liger.label_logps if kernels == "liger" else label_logps
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_BTD: Tensor, *, labels_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or with labels their fp32 log-probabilities (B, T)."""
        if labels_BT is None:
            return F.linear(x_BTD, self.weight)
        chunks = zip(
            x_BTD.flatten(0, 1).split(self.chunk_tokens),
            labels_BT.flatten().split(self.chunk_tokens),
            strict=True,
        )
        is_split = labels_BT.numel() > self.chunk_tokens
        if is_split and self.recompute_logits and torch.is_grad_enabled():
            logps = [
                checkpoint(self._score, x, labels, use_reentrant=False, preserve_rng_state=False)
                for x, labels in chunks
            ]
        else:
            logps = [self._score(x, labels) for x, labels in chunks]
        return torch.cat(logps).view_as(labels_BT)

    def _score(self, x_ND: Tensor, labels_N: Tensor) -> Tensor:
        return self.label_logps(F.linear(x_ND, self.weight), labels_N)
