"""torch's variable-length attention: FlashAttention 2 as torch ships it, over joined documents.

Rows of one document take `sdpa`'s causal kernels.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionMask, longest_document, sdpa, whole_row_offsets

NEEDS_WHOLE_ROWS = True
SUPPORTS_WINDOWS = True
LARGEST_HEAD_DIM = 256
OLDEST_GENERATION = 8  # Ampere


def prepare(mask: AttentionMask) -> tuple[Tensor, Tensor] | None:
    """Return document offsets and `longest_document`, or None where causal attention suffices."""
    if mask.is_causal:
        return None
    return whole_row_offsets(mask), longest_document(mask)


def attend(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Return the attended values; key/value heads are shared, not repeated."""
    if mask.is_causal:
        return sdpa.attend(q_BTHC, k_BSKC, v_BSKC, mask=mask, scale=scale)
    from torch.nn.attention.varlen import varlen_attn

    assert isinstance(mask.prepared, tuple), "the mask was prepared by this file"
    offsets, longest = mask.prepared[0], mask.prepared[1].shape[0]
    q_NHC, k_NKC, v_NKC = (x.flatten(0, 1) for x in (q_BTHC, k_BSKC, v_BSKC))
    options = _options(q_BTHC.shape[2] != k_BSKC.shape[2], mask.window)
    out_NHC: Any = varlen_attn(
        q_NHC, k_NKC, v_NKC, offsets, offsets, longest, longest, scale=scale, **options
    )
    return out_NHC.view_as(q_BTHC)


@cache
def _options(is_grouped: bool, window: int | None) -> dict[str, Any]:
    """Return causal attention, its window and shared heads in the words of this torch."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    before = -1 if window is None else window - 1
    causal = {"window_size": (before, 0)} if "window_size" in known else {"is_causal": True}
    if window is not None and "window_size" not in known:
        raise ValueError(
            f"model.attention = 'varlen' has no sliding window in torch {torch.__version__}, and "
            "the model has one; use 'flex'"
        )
    return causal | ({"enable_gqa": is_grouped} if "enable_gqa" in known else {})


def unsupported_reason(
    *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
) -> str | None:
    """Refuse what FlashAttention 2 has no kernel for."""
    return missing_kernel("varlen_attn", device_type=device_type, head_dim=head_dim, dtype=dtype)


def missing_kernel(
    name: str, *, device_type: str, head_dim: int, dtype: torch.dtype | None
) -> str | None:
    """Say why `name`, a FlashAttention, has no kernel for this; None if it has."""
    if device_type != "cuda":
        return f"{name} has kernels for GPUs only; use 'sdpa'"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"{name} attends in bfloat16 or float16, not in {dtype}; use 'flex'"
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return (
            f"{name} needs heads of a multiple of 8 channels, at most {LARGEST_HEAD_DIM}, and "
            f"the model has {head_dim}; use 'flex'"
        )
    is_here = torch.cuda.is_available()  # else another machine will train
    if is_here and torch.cuda.get_device_capability()[0] < OLDEST_GENERATION:
        return f"{name} needs an Ampere GPU or a later one; use 'flex'"
    return None
