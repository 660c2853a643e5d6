"""Keys and values of all ranks are gathered on each, which attends with its own queries.

Any attention backend will do. Costs memory for the keys and values of whole rows, one block at a
time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallelisms.collectives import gather, gather_differentiably
from parallelisms.context.tokens import gathered_order, token_order


class AllGather:
    """Gathers keys and values in rank order; their gradients are reduced and scattered back."""

    def __init__(self, mesh: DeviceMesh, *, balanced: bool) -> None:
        self.is_balanced = balanced
        self.degree = mesh.size()
        self.rank = mesh.get_local_rank()
        self.group = mesh.get_group()

    def mask(
        self,
        make: Callable[..., Any],
        documents_BT: Tensor | None,
        shape: torch.Size,
        device: torch.device,
        **whole_rows: Any,
    ) -> object:
        """Return the mask of this rank's queries over the keys of all ranks."""
        num_rows, num_tokens = shape[0], shape[1] * self.degree
        order_T = token_order(
            num_tokens, self.degree, self.rank, balanced=self.is_balanced, device=device
        )
        order_S = gathered_order(num_tokens, self.degree, balanced=self.is_balanced, device=device)
        order_BT, order_BS = (x.expand(num_rows, -1).contiguous() for x in (order_T, order_S))
        documents_BS = None if documents_BT is None else gather(documents_BT, 1, self.group)
        return make(order_BT, documents_BT=documents_BT, keys=(order_BS, documents_BS))

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
        """Return the attended values of this rank's queries."""
        num_heads = k_BSKC.shape[2]
        both = gather_differentiably(torch.cat((k_BSKC, v_BSKC), dim=2), 1, self.group)
        k_BSKC, v_BSKC = both.split(num_heads, dim=2)
        return forward(q_BTHC, k_BSKC, v_BSKC, mask=mask)
