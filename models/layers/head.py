"""The language-model head: logits, or log-probabilities of labels taken in chunks of tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models.layers import liger

IGNORED_LABEL = -100
PIECES = (1024, 512, 256, 128, 64, 32)
"""Logits of a row that are summed up together, where they divide the vocabulary: few enough for
registers, many enough that their sums are few."""


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Return fp32 `cap * tanh(x / cap)`, which lies between -cap and cap; `x` where it is None.

    Source: Gemma Team 2024, arXiv:2408.00118, section 2.
    """
    return x.float() if cap is None else (x.float() / cap).tanh() * cap


def log_sum_exp(logits_NV: Tensor) -> Tensor:
    """Return the log of the sum of the exponentials of logits (N, V) over V, (N,).

    For values alone: its gradient is NaN where a whole piece is -inf.
    A compiled kernel reads a row twice, for its maximum and for the sum, unless the row is short
    enough for registers: so pieces of it are summed up first, and then their results.
    """
    # A loop, since the compiler follows no gcd of a size that it does not know.
    for piece in PIECES:
        if logits_NV.shape[-1] % piece == 0:
            return logits_NV.unflatten(-1, (-1, piece)).logsumexp(-1).logsumexp(-1)
    return logits_NV.logsumexp(-1)


class _LabelLogps(torch.autograd.Function):
    """Keeps the logits in their own dtype and one fp32 number per token for the backward."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, softcap: float | None) -> Tensor:
        is_scored = labels_N != IGNORED_LABEL
        target_N = torch.where(is_scored, labels_N, 0)
        normaliser_N = log_sum_exp(soft_cap(logits_NV, softcap))
        label_logits_N = logits_NV.gather(-1, target_N[:, None]).squeeze(-1)
        label_logits_N = soft_cap(label_logits_N, softcap)
        ctx.save_for_backward(logits_NV, normaliser_N, labels_N)
        ctx.softcap = softcap
        return torch.where(is_scored, label_logits_N - normaliser_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor, None, None]:
        logits_NV, normaliser_N, labels_N = ctx.saved_tensors
        scale_N = torch.where(labels_N == IGNORED_LABEL, 0.0, grad_N)
        capped_NV = soft_cap(logits_NV, ctx.softcap)
        likelihood_NV = (capped_NV - normaliser_N[:, None]).exp()
        # Compared, not scattered, so that a compiler fuses all of this into one pass.
        vocabulary_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
        is_label_NV = labels_N[:, None] == vocabulary_V
        grad_NV = torch.where(is_label_NV, 1.0 - likelihood_NV, -likelihood_NV) * scale_N[:, None]
        if ctx.softcap is not None:
            grad_NV = grad_NV * (1.0 - (capped_NV / ctx.softcap) ** 2)
        return grad_NV.to(logits_NV.dtype), None, None


def label_logps(logits_NV: Tensor, labels_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Return the fp32 log-probability of each label; 0, without gradient, where it is ignored.

    With `softcap` the logits are capped first, see `soft_cap`.
    """
    logps_N = _LabelLogps.apply(logits_NV, labels_N, softcap)
    assert isinstance(logps_N, Tensor), "autograd functions return what their forward returns"
    return logps_N


class LMHead(nn.Linear):
    """The last linear layer, which scores labels itself so that few logits are alive at once.

    `label_logps` is an attribute, the one seam where a split vocabulary or a compiled kernel
    steps in: `(logits_NV, labels_N) -> logps_N` in fp32. It is given logits without their soft cap,
    which it applies, and may overwrite them. With `recompute_logits` those of one chunk of several
    are not kept for the backward but computed again.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        *,
        chunk_tokens: int,
        recompute_logits: bool = True,
        softcap: float | None = None,
        kernels: liger.Kernels = "torch",
    ) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.chunk_tokens = chunk_tokens
        self.recompute_logits = recompute_logits
        self.softcap = softcap
        score = liger.label_logps if kernels == "liger" else label_logps
        self.label_logps: Callable[[Tensor, Tensor], Tensor] = (
            score if softcap is None else partial(score, softcap=softcap)
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_BTD: Tensor, *, labels_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or with labels their fp32 log-probabilities (B, T)."""
        if labels_BT is None:
            logits_BTV = F.linear(x_BTD, self.weight)
            if self.softcap is None:
                return logits_BTV
            return soft_cap(logits_BTV, self.softcap).type_as(logits_BTV)
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
