"""torch's flex_attention: block masks that skip what no query of a block may see.

Compiled on GPUs; on a CPU it only runs forward and not compiled, for tests.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.attention import AttentionMask

SMALLEST_HEAD_DIM = 16


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


def prepare(mask: AttentionMask) -> BlockMask:
    """Return the block mask; one for all rows where each is one document."""
    positions_BT, positions_BS = mask.query_positions_BT, mask.key_positions_BS
    documents_BT, documents_BS = mask.query_documents_BT, mask.key_documents_BS

    def is_behind(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def is_allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = positions_BT[row, query] >= positions_BS[row, key]
        if documents_BT is None or documents_BS is None:
            return allowed
        return allowed & (documents_BT[row, query] == documents_BS[row, key])

    device = positions_BT.device
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    rows, num_queries = positions_BT.shape
    function, rows = (is_behind, None) if mask.is_causal else (is_allowed, rows)
    return make(function, rows, None, num_queries, positions_BS.shape[1], device=device)


def attend(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
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
        block_mask=mask.prepared,
        scale=scale,
        enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
    )
    return out_BHTC.transpose(1, 2)


def unsupported_reason(*, device_type: str, training: bool, head_dim: int) -> str | None:
    """Refuse training on a CPU, and heads smaller than the GPU kernel's tiles."""
    if device_type == "cpu" and training:
        return "flex_attention has no backward on CPU; use 'sdpa', or train on a GPU"
    if device_type == "cuda" and head_dim < SMALLEST_HEAD_DIM:
        return (
            f"flex_attention needs heads of at least {SMALLEST_HEAD_DIM} channels on a GPU and "
            f"the model has {head_dim}; use 'sdpa'"
        )
    return None
