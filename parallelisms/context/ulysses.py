"""Ranks exchange tokens for heads: inside attention each holds whole rows of some heads.

Source: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509, section 3.1. Any attention backend
will do, with its causal kernel where a row is one document.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallelisms.collectives import exchange, gather


class Ulysses:
    """One all-to-all before attention and one after it; tokens lie in the order of the row.

    Query heads are dealt evenly. Where there are fewer key/value heads than ranks, each of these
    is repeated for the ranks whose query heads it serves.
    """

    def __init__(self, mesh: DeviceMesh, *, balanced: bool) -> None:
        assert not balanced, "each rank attends with whole rows, so there is nothing to balance"
        self.is_balanced = False
        self.degree = mesh.size()
        self.group = mesh.get_group()

    def mask(
        self,
        make: Callable[..., Any],
        documents_BT: Tensor | None,
        shape: torch.Size,
        device: torch.device,
        **whole_rows: Any,
    ) -> object:
        """Return the mask of whole rows."""
        order_T = torch.arange(shape[1] * self.degree, device=device)
        documents_BT = None if documents_BT is None else gather(documents_BT, 1, self.group)
        order_BT = order_T.expand(shape[0], -1).contiguous()
        return make(order_BT, documents_BT=documents_BT, **whole_rows)

    def attend(
        self,
        core: nn.Module,
        forward: Callable[..., Tensor],
        q_BTHC: Tensor,
        k_BSKC: Tensor,
        v_BSKC: Tensor,
        *,
        mask: object,
    ) -> Tensor:
        """Return the attended values of this rank's tokens, all heads."""
        num_heads, num_kv_heads = q_BTHC.shape[2], k_BSKC.shape[2]
        if num_kv_heads < self.degree:
            copies = self.degree // num_kv_heads
            k_BSKC, v_BSKC = (x.repeat_interleave(copies, dim=2) for x in (k_BSKC, v_BSKC))
        # One exchange for all three: the heads of rank r are part r of each.
        parts = [x.unflatten(2, (self.degree, -1)) for x in (q_BTHC, k_BSKC, v_BSKC)]
        mine = self._tokens_for_heads(torch.cat(parts, dim=3))
        q_BTHC, k_BSKC, v_BSKC = mine.split([part.shape[3] for part in parts], dim=2)
        out_BTHC = self._heads_for_tokens(forward(q_BTHC, k_BSKC, v_BSKC, mask=mask))
        assert out_BTHC.shape[2] == num_heads, "every head comes back"
        return out_BTHC

    def _tokens_for_heads(self, x: Tensor) -> Tensor:
        """(B, T / cp, cp, heads, C) of all heads to (B, T, heads, C) of this rank's."""
        return exchange(x.movedim(2, 0), self.group).movedim(0, 1).flatten(1, 2)

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        """(B, T, heads, C) of this rank's heads to (B, T / cp, cp x heads, C)."""
        by_rank = x.unflatten(1, (self.degree, -1)).movedim(1, 0)
        return exchange(by_rank, self.group).movedim(0, 2).flatten(2, 3)
