"""torch's scaled_dot_product_attention on any device.

One document per row takes the causal kernels; several, and sliding windows, take a dense mask of
T x S booleans a row.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import AttentionMask, eager

SUPPORTS_WINDOWS = True
HOPPER = 9
CUDNN_HEAD_DIMS = range(8, 129, 8)
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def prepare(mask: AttentionMask) -> Tensor | None:
    """Return the boolean mask (B, 1, T, S), or None where causal attention suffices."""
    return None if mask.is_causal else mask.allowed_BTS()[:, None]


def attend(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Return the attended values; key/value heads are shared, not repeated."""
    assert mask.prepared is None or isinstance(mask.prepared, Tensor), "prepared by this file"
    with _kernels(q_BTHC.device):
        out_BHTC = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC)),
            attn_mask=mask.prepared,
            is_causal=mask.prepared is None,
            scale=scale,
            enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
        )
    return out_BHTC.transpose(1, 2)


def _kernels(device: torch.device) -> AbstractContextManager[object]:
    # On Hopper cuDNN takes half the time of the flash kernel that torch prefers: 0.93 + 2.87 ms
    # against 1.88 + 5.28 ms forward + backward at 8,192 tokens and 32/8 heads of 128 on an H200.
    if device.type == "cuda" and _is_hopper(device.index):
        return sdpa_kernel(FASTEST_FIRST, set_priority=True)
    return nullcontext()


@torch.compiler.assume_constant_result
def _is_hopper(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index)[0] == HOPPER


def mask_tensors(mask: AttentionMask) -> list[Tensor]:
    """Return the boolean mask, or nothing where causal attention suffices."""
    assert mask.prepared is None or isinstance(mask.prepared, Tensor), "prepared by this file"
    return [] if mask.prepared is None else [mask.prepared]


def attend_with_lse(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    *,
    mask: Sequence[Tensor],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attended values and the log-sum-exp of scores; see `PieceBackend`."""
    if _is_written_out(q_BTHC):
        mask = _written_out_mask(q_BTHC, mask, is_causal)
        return eager.attend_with_lse(
            q_BTHC, k_BSKC, v_BSKC, mask=mask, is_causal=is_causal, scale=scale
        )
    q_BHTC, k_BKSC, v_BKSC = (x.transpose(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    bias = _bias(mask, q_BTHC.dtype)
    if q_BTHC.is_cuda:
        out_BHTC, lse_BHT, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_BHTC, k_BKSC, v_BKSC, bias, True, 0.0, is_causal, False, scale=scale
        )
        lse_BHT = lse_BHT.view(q_BHTC.shape[:3])  # (B, H, T, 1) in torch 2.11
    else:
        out_BHTC, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTC, k_BKSC, v_BKSC, 0.0, is_causal, attn_mask=bias, scale=scale
        )
    out_BTHC, lse_BTH = out_BHTC.transpose(1, 2), lse_BHT.transpose(1, 2)
    if not mask:
        return out_BTHC, lse_BTH
    # The bias is finite, so that no kernel divides by zero: a query that sees no key gets the mean
    # of all values instead.
    is_blind_BT1 = ~mask[0][:, 0].any(-1, keepdim=True)
    lse_BTH = lse_BTH.masked_fill(is_blind_BT1, float("-inf"))
    return out_BTHC.masked_fill(is_blind_BT1[..., None], 0.0), lse_BTH


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this piece; see `PieceBackend`."""
    tensors = (grad_BTHC, q_BTHC, k_BSKC, v_BSKC, out_BTHC)
    if _is_written_out(q_BTHC):
        mask = _written_out_mask(q_BTHC, mask, is_causal)
        return eager.attend_backward(*tensors, lse_BTH, mask=mask, is_causal=is_causal, scale=scale)
    grad, q, k, v, out = (x.transpose(1, 2) for x in tensors)
    lse_BHT = lse_BTH.transpose(1, 2).masked_fill(lse_BTH.transpose(1, 2) == float("-inf"), 0.0)
    bias = _bias(mask, q.dtype)
    if q.is_cuda:
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        random, lengths = (no_dropout, no_dropout), (None, None, q.shape[2], k.shape[2])
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse_BHT.contiguous()[..., None],
            *random,
            bias,
            *lengths,
            0.0,
            is_causal,
            scale=scale,
        )
    else:
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse_BHT, 0.0, is_causal, attn_mask=bias, scale=scale
        )
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in gradients)
    return grad_q, grad_k, grad_v


def _is_written_out(q_BTHC: Tensor) -> bool:
    """Say whether no kernel that returns the log-sum-exp takes such heads; fp32 on GPUs, say."""
    if not q_BTHC.is_cuda:
        return False
    is_short = q_BTHC.dtype in (torch.bfloat16, torch.float16)
    return not is_short or q_BTHC.shape[-1] not in CUDNN_HEAD_DIMS


def _written_out_mask(q_BTHC: Tensor, mask: Sequence[Tensor], is_causal: bool) -> Sequence[Tensor]:
    if not is_causal:
        return [allowed[:, None] for allowed in mask]
    places_T = torch.arange(q_BTHC.shape[1], device=q_BTHC.device)
    return [places_T[:, None] >= places_T]


def _bias(mask: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return the mask as what is added to scores (B, 1, T, S); it leaves room for the scores."""
    if not mask:
        return None
    unseen = torch.finfo(dtype).min / 2
    return torch.zeros_like(mask[0], dtype=dtype).masked_fill(~mask[0], unseen)


def unsupported_reason(
    *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
) -> None:
    """Return None: it runs everywhere."""
