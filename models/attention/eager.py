"""Attention written out, on any device: the oracle of the other backends, slow and large."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention import AttentionMask

SUPPORTS_WINDOWS = True
SUPPORTS_SOFTCAP = True


def prepare(mask: AttentionMask) -> Tensor:
    """Return the boolean mask, broadcast over groups of heads: (B, 1, 1, T, S)."""
    return mask.allowed_BTS()[:, None, None]


def attend(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v, the softmax and the cap in fp32.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; the cap: Gemma Team 2024,
    arXiv:2408.00118, section 2.
    """
    scores_BKGTS = _masked(_scores(q_BTHC, k_BSKC, scale, softcap), mask_tensors(mask))
    weights_BKGTS = torch.softmax(scores_BKGTS, dim=-1).to(v_BSKC.dtype)
    return _joined(weights_BKGTS @ _shared(v_BSKC))


def _grouped(x_BTHC: Tensor, num_kv_heads: int) -> Tensor:
    """Return query heads by the key/value head they share: (B, K, G, T, C)."""
    return x_BTHC.transpose(1, 2).unflatten(1, (num_kv_heads, -1))


def _joined(x_BKGTC: Tensor) -> Tensor:
    return x_BKGTC.flatten(1, 2).transpose(1, 2)


def _shared(x_BSKC: Tensor) -> Tensor:
    """Return key/value heads to broadcast over their group: (B, K, 1, S, C)."""
    return x_BSKC.transpose(1, 2).unsqueeze(2)


def _scores(q_BTHC: Tensor, k_BSKC: Tensor, scale: float, softcap: float | None) -> Tensor:
    q_BKGTC = _grouped(q_BTHC, k_BSKC.shape[2])
    scores_BKGTS = (q_BKGTC @ _shared(k_BSKC).transpose(-1, -2)).float() * scale
    return scores_BKGTS if softcap is None else (scores_BKGTS / softcap).tanh() * softcap


def _masked(scores_BKGTS: Tensor, mask: Sequence[Tensor]) -> Tensor:
    return scores_BKGTS.masked_fill(~mask[0], float("-inf")) if mask else scores_BKGTS


def mask_tensors(mask: AttentionMask) -> list[Tensor]:
    """Return the boolean mask."""
    assert isinstance(mask.prepared, Tensor), "the mask was prepared by this file"
    return [mask.prepared]


def attend_with_lse(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    *,
    mask: Sequence[Tensor],
    is_causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attended values and the log-sum-exp of scores; see `PieceBackend`."""
    scores_BKGTS = _masked(_scores(q_BTHC, k_BSKC, scale, softcap), mask)
    lse_BKGT1 = scores_BKGTS.logsumexp(-1, keepdim=True)
    weights_BKGTS = torch.exp(scores_BKGTS - _finite(lse_BKGT1)).to(v_BSKC.dtype)
    lse_BTH = _joined(lse_BKGT1).squeeze(-1)
    return _joined(weights_BKGTS @ _shared(v_BSKC)), lse_BTH


def attend_backward(
    grad_BTHC: Tensor,
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    out_BTHC: Tensor,
    lse_BTH: Tensor,
    *,
    mask: Sequence[Tensor],
    is_causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this piece; see `PieceBackend`."""
    num_kv_heads, dtype = k_BSKC.shape[2], q_BTHC.dtype
    q_BKGTC, grad_BKGTC, out_BKGTC, lse_BKGT1 = (
        _grouped(x, num_kv_heads) for x in (q_BTHC, grad_BTHC, out_BTHC, lse_BTH[..., None])
    )
    scores_BKGTS = _scores(q_BTHC, k_BSKC, scale, softcap)
    weights_BKGTS = torch.exp(_masked(scores_BKGTS, mask) - _finite(lse_BKGT1))
    delta_BKGT1 = (grad_BKGTC.float() * out_BKGTC.float()).sum(-1, keepdim=True)
    grad_weights_BKGTS = (grad_BKGTC @ _shared(v_BSKC).transpose(-1, -2)).float()
    grad_scores_BKGTS = weights_BKGTS * (grad_weights_BKGTS - delta_BKGT1) * scale
    if softcap is not None:
        grad_scores_BKGTS = grad_scores_BKGTS * (1.0 - (scores_BKGTS / softcap) ** 2)
    grad_scores_BKGTS = grad_scores_BKGTS.to(dtype)
    grad_q_BKGTC = grad_scores_BKGTS @ _shared(k_BSKC)
    # A key/value head gets the sum over its group.
    grad_k_BKSC = (grad_scores_BKGTS.transpose(-1, -2) @ q_BKGTC).sum(2)
    grad_v_BKSC = (weights_BKGTS.to(dtype).transpose(-1, -2) @ grad_BKGTC).sum(2)
    return _joined(grad_q_BKGTC), grad_k_BKSC.transpose(1, 2), grad_v_BKSC.transpose(1, 2)


def _finite(lse: Tensor) -> Tensor:
    """Return 0 where no key is seen; the scores there are -inf, and their weights 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def unsupported_reason(
    *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
) -> None:
    """Return None: it runs everywhere."""
