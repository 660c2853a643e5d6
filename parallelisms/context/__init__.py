"""Context parallelism: ranks share the tokens of a row, and attention still sees them all.

Everything outside attention treats each token alone. Each other file here is one form of sharing,
called as the value of `parallelism.context_parallel_mode`; `tokens.py` deals the tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallelisms.context.allgather import AllGather
from parallelisms.context.ring import Ring
from parallelisms.context.tokens import gathered_order, split_tokens, token_order
from parallelisms.context.ulysses import Ulysses
from parallelisms.mesh import ContextMode, ParallelDims
from parallelisms.resolve import ResolvedPlan

__all__ = ["ContextForm", "apply_context", "gathered_order", "split_tokens", "token_order"]


class ContextForm(Protocol):
    """One way of letting the queries of a rank see the keys and values of the others.

    Masks are made from places in the row, never from rotary positions: those start anew with each
    document, and are 0 in the padding after one.
    """

    is_balanced: bool
    """Tokens are dealt head and tail, see `token_order`."""

    def mask(
        self,
        make: Callable[..., Any],
        documents_BT: Tensor | None,
        shape: torch.Size,
        device: torch.device,
        **whole_rows: Any,
    ) -> object:
        """Return what `attend` will be given as mask; called once per forward pass.

        `make(places_BT, documents_BT=..., keys=(places_BS, documents_BS), ...)` is the model's own
        function, `shape` that of this rank's tokens (B, T / cp), and `documents_BT` are theirs.
        What `make` is told of whole rows beside these is in `whole_rows`.
        """
        ...

    def attend(
        self,
        core: nn.Module,
        forward: Callable[..., Tensor],
        q_BTHC: Tensor,
        k_BSKC: Tensor,
        v_BSKC: Tensor,
        *,
        mask: Any,
    ) -> Tensor:
        """Return the attended values (B, T / cp, H, C) of this rank's queries.

        `forward` is the core's own. Traced by the compiler inside a block, so collectives are
        functional.
        """
        ...


def make_form(
    mode: ContextMode, mesh: DeviceMesh, *, balanced: bool, cores: Sequence[nn.Module]
) -> ContextForm:
    """Return the form called `mode` over the ranks of `mesh`, for the attention in `cores`."""
    forms: dict[ContextMode, Callable[..., ContextForm]] = {
        "allgather": AllGather,
        "ring": partial(Ring, cores=cores),
        "ulysses": Ulysses,
    }
    return forms[mode](mesh, balanced=balanced)


def apply_context(
    model: nn.Module, plan: ResolvedPlan, dims: ParallelDims, *, mode: ContextMode
) -> None:
    """Let the attention of `model` reach over the ranks that share a row, in place.

    Wraps the forward of the modules in `plan.masks` and `plan.attention`; to be called before the
    blocks are compiled. What `split_tokens` returns is what the model is then called with.
    """
    cores = [model.get_submodule(name) for name in plan.attention]
    form = make_form(mode, dims.mesh("cp"), balanced=dims.balanced, cores=cores)
    for name in plan.masks:
        module = model.get_submodule(name)
        module.forward = partial(_make_mask, form, module.forward)
    classes = {kind: _sharing_class(kind, form) for kind in {type(core) for core in cores}}
    for core in cores:
        core.__class__ = classes[type(core)]


def _sharing_class(core_class: type[nn.Module], form: ContextForm) -> type[nn.Module]:
    """Return the class of an attention core whose forward reaches over the ranks.

    A class, which all blocks share: a forward of its own for each core would be another constant
    for the compiler, which then compiles every block anew and gives up at the ninth.
    """

    class Sharing(core_class):
        def forward(self, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: Any) -> Tensor:
            return form.attend(self, super().forward, q_BTHC, k_BSKC, v_BSKC, mask=mask)

    Sharing.__name__ = core_class.__name__
    return Sharing


def _make_mask(
    form: ContextForm,
    make: Callable[..., Any],
    positions_BT: Tensor,
    *,
    documents_BT: Tensor | None = None,
    keys: object = None,
    **whole_rows: Any,
) -> object:
    assert keys is None, "a cache of keys and values is used on whole rows only"
    shape, device = positions_BT.shape, positions_BT.device
    return form.mask(make, documents_BT, shape, device, **whole_rows)
