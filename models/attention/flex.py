"""torch's flex_attention: block masks that skip what no query of a block may see.

Compiled on GPUs; on a CPU it only runs forward and not compiled, for tests.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from models.attention import AttentionMask

SUPPORTS_WINDOWS = True
SUPPORTS_SOFTCAP = True
SMALLEST_HEAD_DIM = 16
BLOCK_TOKENS = 128
BLOCK_TENSORS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


def prepare(mask: AttentionMask) -> BlockMask:
    """Return the block mask; one for all rows where each is one document."""
    device = mask.query_positions_BT.device
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    rows, num_queries = mask.query_positions_BT.shape
    rows = None if mask.is_causal else rows
    num_keys = mask.key_positions_BS.shape[1]
    return make(
        _mask_function(_sources(mask), mask.window),
        rows,
        None,
        num_queries,
        num_keys,
        device=device,
        BLOCK_SIZE=BLOCK_TOKENS,
    )


def _sources(mask: AttentionMask) -> list[Tensor]:
    """Return what decides who sees what: nothing, or positions, and documents if there are any."""
    if mask.is_causal:
        return []
    sources = [mask.query_positions_BT, mask.key_positions_BS]
    if mask.query_documents_BT is not None and mask.key_documents_BS is not None:
        sources += [mask.query_documents_BT, mask.key_documents_BS]
    return sources


def _mask_function(sources: Sequence[Tensor], window: int | None = None) -> MaskFunction:
    def is_behind(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    if not sources:
        return is_behind
    positions_BT, positions_BS, *documents = sources
    documents_BT, documents_BS = documents or (None, None)

    def is_allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = positions_BT[row, query] - positions_BS[row, key]
        allowed = distance >= 0
        if window is not None:
            allowed = allowed & (distance < window)
        if documents_BT is None or documents_BS is None:
            return allowed
        return allowed & (documents_BT[row, query] == documents_BS[row, key])

    return is_allowed


def _written(softcap: float | None) -> str:
    """Return a cap as text, which the compiler takes for a constant; empty for none.

    A number that differs between two models of a process becomes a variable, and those fail in
    flex_attention (torch 2.13).
    """
    return "" if softcap is None else repr(softcap)


def _score_function(written: str) -> ScoreFunction | None:
    if not written:
        return None

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / float(written)) * float(written)

    return capped


def attend(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Return the attended values; key/value heads are shared, not repeated."""
    # Inside a compiled block the compiler sees flex_attention itself.
    is_alone = q_BTHC.device.type == "cuda" and not torch.compiler.is_compiling()
    kernel = _compiled(flex_attention) if is_alone else flex_attention
    assert isinstance(mask.prepared, BlockMask), "the mask was prepared by this file"
    out_BHTC = kernel(
        q_BTHC.transpose(1, 2),
        k_BSKC.transpose(1, 2),
        v_BSKC.transpose(1, 2),
        score_mod=_score_function(_written(softcap)),
        block_mask=mask.prepared,
        scale=scale,
        enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
    )
    return out_BHTC.transpose(1, 2)


def mask_tensors(mask: AttentionMask) -> list[Tensor]:
    """Return what decides who sees what, then the tensors of the block mask; not for windows."""
    assert mask.window is None, (
        "the table of combinations refuses windows where keys come in pieces"
    )
    assert isinstance(mask.prepared, BlockMask), "the mask was prepared by this file"
    return [*_sources(mask), *(getattr(mask.prepared, name) for name in BLOCK_TENSORS)]


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
    q_BTHC, k_BSKC, v_BSKC = (x.detach() for x in (q_BTHC, k_BSKC, v_BSKC))
    return _attend_piece(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap)


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
    """Return the gradients of this piece; see `PieceBackend`.

    The piece is computed again: torch hands out no backward that takes another log-sum-exp. The
    result is a sum of pieces weighted by w = exp(lse_piece - lse); hence the gradients given here.
    """
    with torch.enable_grad():
        q, k, v = leaves = [x.detach().requires_grad_() for x in (q_BTHC, k_BSKC, v_BSKC)]
        piece_BTHC, piece_lse_BTH = _attend_piece(q, k, v, mask, scale, softcap)
    is_blind_BTH = piece_lse_BTH == float("-inf")
    weight_BTH = torch.exp(piece_lse_BTH - lse_BTH).masked_fill(is_blind_BTH, 0.0)
    grad = grad_BTHC.float()
    change_BTH = (grad * (piece_BTHC.float() - out_BTHC.float())).sum(-1)
    grad_q, grad_k, grad_v = torch.autograd.grad(
        (piece_BTHC, piece_lse_BTH),
        leaves,
        ((weight_BTH[..., None] * grad).to(piece_BTHC.dtype), weight_BTH * change_BTH),
    )
    return grad_q, grad_k, grad_v


def _attend_piece(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    mask: Sequence[Tensor],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    blocks = None
    if mask:
        sources, tensors = mask[: -len(BLOCK_TENSORS)], mask[-len(BLOCK_TENSORS) :]
        named: dict[str, Any] = dict(zip(BLOCK_TENSORS, tensors, strict=True))
        lengths = (q_BTHC.shape[1], k_BSKC.shape[1])
        blocks = BlockMask(
            seq_lengths=lengths,
            BLOCK_SIZE=(BLOCK_TOKENS, BLOCK_TOKENS),
            mask_mod=_mask_function(sources),
            **named,
        )
    kernel = _compiled(_flex_with_lse) if q_BTHC.is_cuda else _flex_with_lse
    q_BHTC, k_BKSC, v_BKSC = (x.transpose(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    out_BHTC, lse_BHT = kernel(q_BHTC, k_BKSC, v_BKSC, blocks, scale, _written(softcap))
    return out_BHTC.transpose(1, 2), lse_BHT.transpose(1, 2)


def _flex_with_lse(
    q_BHTC: Tensor,
    k_BKSC: Tensor,
    v_BKSC: Tensor,
    blocks: BlockMask | None,
    scale: float,
    written_softcap: str,
) -> tuple[Tensor, Tensor]:
    out_BHTC, aux = flex_attention(
        q_BHTC,
        k_BKSC,
        v_BKSC,
        score_mod=_score_function(written_softcap),
        block_mask=blocks,
        scale=scale,
        enable_gqa=q_BHTC.shape[1] != k_BKSC.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None, "it was asked for"
    return out_BHTC, aux.lse


def unsupported_reason(
    *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
) -> str | None:
    """Refuse training on a CPU, and heads smaller than the GPU kernel's tiles."""
    if device_type == "cpu" and training:
        return "flex_attention has no backward on CPU; use 'sdpa', or train on a GPU"
    if device_type == "cuda" and head_dim < SMALLEST_HEAD_DIM:
        return (
            f"flex_attention needs heads of at least {SMALLEST_HEAD_DIM} channels on a GPU and "
            f"the model has {head_dim}; use 'sdpa'"
        )
    return None
