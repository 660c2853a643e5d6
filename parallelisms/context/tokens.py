"""Which tokens of a row each context-parallel rank holds, and the one place that cuts rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallelisms.mesh import ParallelDims


def token_order(
    num_tokens: int,
    degree: int,
    rank: int,
    *,
    balanced: bool,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the places in a row of the tokens that `rank` holds, in its order: (T / degree,).

    Balanced, the row is cut into 2 x degree chunks and rank r holds chunk r from the head and
    chunk r from the tail, so that causal attention costs every rank the same; otherwise it holds
    the r-th of `degree` chunks.
    """
    chunks = (rank, 2 * degree - 1 - rank) if balanced else (rank,)
    length = num_tokens // (degree * len(chunks))
    parts = [torch.arange(c * length, (c + 1) * length, device=device) for c in chunks]
    return torch.cat(parts)


def gathered_order(
    num_tokens: int, degree: int, *, balanced: bool, device: torch.device | str | None = None
) -> Tensor:
    """Return the places in a row of the tokens of all ranks, joined in rank order: (T,)."""
    orders = [
        token_order(num_tokens, degree, rank, balanced=balanced, device=device)
        for rank in range(degree)
    ]
    return torch.cat(orders)


def split_tokens(tensors: Mapping[str, Tensor], dims: ParallelDims) -> dict[str, Tensor]:
    """Return this rank's part (B, T / cp, ...) of each tensor (B, T, ...); without cp all of it.

    The one place where tokens, labels, positions and documents are cut, all in the same order.
    Labels must be shifted already. ValueError where T cannot be dealt evenly.
    """
    if dims.cp == 1:
        return dict(tensors)
    rank = dims.mesh("cp").get_local_rank()
    multiple = dims.cp * (2 if dims.balanced else 1)
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        num_tokens = tensor.shape[1]
        if num_tokens % multiple:
            raise ValueError(
                f"rows of {num_tokens} tokens cannot be dealt to "
                f"parallelism.context_parallel_degree = {dims.cp} ranks; pad them to a multiple "
                f"of {multiple}"
            )
        order_T = token_order(
            num_tokens, dims.cp, rank, balanced=dims.balanced, device=tensor.device
        )
        parts[name] = tensor.index_select(1, order_T)
    return parts
