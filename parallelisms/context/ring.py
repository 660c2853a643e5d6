"""Keys and values travel from rank to rank; each attends to what passes and joins the results.

Source: Liu et al. 2023, Ring Attention, arXiv:2310.01889. The memory for keys and values does
not grow with the number of ranks. Needs an attention backend that returns its log-sum-exp.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallelisms.collectives import gather
from parallelisms.context.ring_operator import (
    PieceFunctions,
    register_backend,
    ring_attention,
    ring_pieces,
)
from parallelisms.context.tokens import token_order


@dataclass(frozen=True, kw_only=True, eq=False)
class RingMask:
    """The masks of all pieces that this rank attends to, in the order of the hops."""

    tensors: list[Tensor]

    is_causal: bool
    """Rows are one document: a rank's own piece is causal, of the others all is seen."""


class Ring:
    """Passes keys and values round, one message a hop, during the attention to those at hand."""

    def __init__(self, mesh: DeviceMesh, *, balanced: bool, cores: Iterable[nn.Module]) -> None:
        self.is_balanced = balanced
        self.degree = mesh.size()
        self.rank = mesh.get_local_rank()
        self.group = mesh.get_group()
        self.group_name: str = self.group.group_name
        backends = {str(core.backend): core for core in cores}
        assert len(backends) == 1, "one mask serves all attention of a model"
        self.backend, core = backends.popitem()
        assert core.attend_with_lse is not None, "the table of combinations refuses other backends"
        self.mask_tensors: Callable[[Any], list[Tensor]] = core.mask_tensors  # pyright: ignore
        functions = PieceFunctions(
            attend_with_lse=core.attend_with_lse,  # pyright: ignore[reportArgumentType]
            attend_backward=core.attend_backward,  # pyright: ignore[reportArgumentType]
        )
        register_backend(self.backend, functions)

    def mask(
        self,
        make: Callable[..., Any],
        documents_BT: Tensor | None,
        shape: torch.Size,
        device: torch.device,
        **whole_rows: Any,
    ) -> RingMask:
        """Return the masks of this rank's queries over the piece of each rank."""
        num_rows, length = shape

        def places(rank: int) -> Tensor:
            order_T = token_order(
                length * self.degree, self.degree, rank, balanced=self.is_balanced, device=device
            )
            return order_T.expand(num_rows, -1).contiguous()

        own_BT = places(self.rank)
        masks = [make(own_BT, documents_BT=documents_BT)]
        if documents_BT is not None:
            documents = gather(documents_BT, 1, self.group).chunk(self.degree, dim=1)
            pieces = ring_pieces(self.rank, self.degree, length, balanced=self.is_balanced)
            for hop, piece in list(enumerate(pieces))[1:]:
                if piece is None:
                    continue
                (queries, keys), source = piece, (self.rank - hop) % self.degree
                seen = (places(source)[:, keys], documents[source][:, keys])
                masks.append(
                    make(own_BT[:, queries], documents_BT=documents_BT[:, queries], keys=seen)
                )
        tensors = [tensor for mask in masks for tensor in self.mask_tensors(mask)]
        return RingMask(tensors=tensors, is_causal=documents_BT is None)

    def attend(
        self,
        core: nn.Module,
        forward: Callable[..., Tensor],
        q_BTHC: Tensor,
        k_BSKC: Tensor,
        v_BSKC: Tensor,
        *,
        mask: RingMask,
    ) -> Tensor:
        """Return the attended values of this rank's queries."""
        scale: float = core.scale(q_BTHC.shape[-1])  # pyright: ignore[reportCallIssue]
        softcap: float | None = core.softcap  # pyright: ignore[reportAssignmentType]
        out_BTHC, _ = ring_attention(
            q_BTHC,
            k_BSKC,
            v_BSKC,
            mask.tensors,
            self.group_name,
            self.backend,
            self.is_balanced,
            mask.is_causal,
            scale,
            softcap,
        )
        return out_BTHC
