"""Attention written out, on any device: the oracle of the other backends, slow and large."""

import torch
from torch import Tensor

from models.attention import AttentionMask


def prepare(mask: AttentionMask) -> Tensor:
    """Return the boolean mask, broadcast over groups of heads: (B, 1, 1, T, S)."""
    return mask.allowed_BTS()[:, None, None]


def attend(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Return softmax(q k^T * scale) v, the softmax in fp32.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    assert isinstance(mask.prepared, Tensor), "the mask was prepared by this file"
    num_kv_heads = k_BSKC.shape[2]
    q_BKGTC = q_BTHC.transpose(1, 2).unflatten(1, (num_kv_heads, -1))
    k_BK1SC, v_BK1SC = (x.transpose(1, 2).unsqueeze(2) for x in (k_BSKC, v_BSKC))
    scores = (q_BKGTC @ k_BK1SC.transpose(-1, -2)).float() * scale
    scores = scores.masked_fill(~mask.prepared, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(v_BSKC.dtype)
    return (weights @ v_BK1SC).flatten(1, 2).transpose(1, 2)


def unsupported_reason(*, device_type: str, training: bool, head_dim: int) -> None:
    """Return None: it runs everywhere."""
