"""The two operators of the ring: attention to all keys of a group of ranks, and its backward.

Operators of their own, because a compiled block cannot hold messages from rank to rank, and so that
checkpointing can keep the result. Masks and the place in the model are in `ring.py`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceFunctions:
    """What an attention backend does with one piece of the keys; see `models/attention/`."""

    attend_with_lse: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


# An operator's arguments are tensors, numbers and strings, so it looks functions up by a name.
_functions: dict[str, PieceFunctions] = {}

OUTSIDE = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def register_backend(name: str, functions: PieceFunctions) -> None:
    """Let the operators attend with the backend called `name`."""
    _functions[name] = functions


def _as_outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an operator's body do all that code outside can, without recording its own steps.

    torch switches off autograd inside an operator, which a backend may need for its backward, and
    the first time in a compiled block much more, such as vmap.
    """

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        with torch._C._ForceDispatchKeyGuard(*OUTSIDE), torch.no_grad():
            return function(*arguments)

    return wrapped


def ring_pieces(
    rank: int, degree: int, length: int, *, balanced: bool
) -> list[tuple[slice, slice] | None]:
    """Return for each hop which queries see which of the keys it brings; None where none sees any.

    Dealt head and tail, all queries lie between the two parts of a lower rank, and all keys of a
    higher rank between our two: every hop costs each rank the same.
    """
    whole, head, tail = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    from_lower, from_higher = (whole, head), (tail, whole)
    if not balanced:
        from_lower, from_higher = (whole, whole), None
    # Hop h brings the piece of rank - h, or of rank - h + degree.
    others = [from_lower] * rank + [from_higher] * (degree - 1 - rank)
    return [(whole, whole), *others]


@dataclass(frozen=True, eq=False)
class _Hop:
    """What one hop brings to this rank."""

    queries: slice
    keys: slice
    mask: Sequence[Tensor]
    is_causal: bool

    def options(self, scale: float, softcap: float | None) -> dict[str, Any]:
        """Return the keywords of the backend's functions, of which some know no cap."""
        options = {"mask": self.mask, "is_causal": self.is_causal, "scale": scale}
        return options if softcap is None else {**options, "softcap": softcap}


def _hops(
    group: dist.ProcessGroup,
    length: int,
    masks: Sequence[Tensor],
    *,
    balanced: bool,
    is_causal: bool,
) -> list[_Hop | None]:
    """Return what each hop brings, and None for those that bring nothing to see."""
    hops: list[_Hop | None] = []
    pieces = ring_pieces(group.rank(), group.size(), length, balanced=balanced)
    num_masks = 1 if is_causal else sum(piece is not None for piece in pieces)
    num_tensors, rest = divmod(len(masks), num_masks)
    assert rest == 0, "the masks of a forward pass are alike"
    masks = list(masks)
    for number, piece in enumerate(pieces):
        if piece is None:
            hops.append(None)
            continue
        own, masks = masks[:num_tensors], masks[num_tensors:]
        hops.append(_Hop(*piece, mask=own, is_causal=is_causal and number == 0))
    return hops


class _Transfer:
    """A message on its way to the next rank, and one from the previous rank on its way here.

    Both are one all-to-all in which each rank has something for the next rank alone. Messages
    between pairs of ranks (`isend`) would take memory: their tensors cannot be used again before
    the GPU has got that far, and the host runs a whole step ahead of it
    (https://github.com/pytorch/pytorch/issues/132292).
    """

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        rank, degree = group.rank(), group.size()
        self.received = torch.empty_like(sent)
        to, come_from = [0] * degree, [0] * degree
        to[(rank + 1) % degree] = come_from[(rank - 1) % degree] = sent.numel()
        work = dist.all_to_all_single(
            self.received.view(-1), sent.view(-1), come_from, to, group=group, async_op=True
        )
        assert work is not None, "this rank is of the group"
        self.work = work  # it keeps both tensors until it is waited for

    def finish(self) -> Tensor:
        """Wait for both; return what came."""
        self.work.wait()
        return self.received


@torch.library.custom_op("tessera::ring_attention", mutates_args=())
@_as_outside
def ring_attention(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    masks: Sequence[Tensor],
    group_name: str,
    backend: str,
    balanced: bool,
    is_causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the attended values (B, T, H, C) and the log-sum-exp over all keys (B, T, H).

    Every rank of the group must call this. `masks` holds equally many tensors for each piece that
    this rank attends to, in the order of the hops; with `is_causal` only for its own.
    """
    group = _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]
    attend_with_lse = _functions[backend].attend_with_lse
    hops = _hops(group, q_BTHC.shape[1], masks, balanced=balanced, is_causal=is_causal)
    out_BTHC = torch.zeros_like(_like(q_BTHC), dtype=torch.float32)
    lse_BTH = out_BTHC.new_full(out_BTHC.shape[:-1], float("-inf"))
    both = torch.stack((k_BSKC, v_BSKC))
    for number, hop in enumerate(hops):
        transfer = _Transfer(both, group) if number + 1 < len(hops) else None
        if hop is not None:
            q, (k, v) = q_BTHC[:, hop.queries], both[:, :, hop.keys]
            options = hop.options(scale, softcap)
            piece = attend_with_lse(q, k, v, **options)
            _join(out_BTHC[:, hop.queries], lse_BTH[:, hop.queries], *piece)
        if transfer is not None:
            both = transfer.finish()
    return out_BTHC.to(q_BTHC.dtype), lse_BTH


def _join(out_BTHC: Tensor, lse_BTH: Tensor, piece_BTHC: Tensor, piece_lse_BTH: Tensor) -> None:
    """Add a piece to the fp32 result of the pieces before it, in place."""
    joined_BTH = torch.logaddexp(lse_BTH, piece_lse_BTH)
    shift_BTH = joined_BTH.masked_fill(joined_BTH == float("-inf"), 0.0)
    out_BTHC.mul_(torch.exp(lse_BTH - shift_BTH)[..., None])
    out_BTHC.add_(piece_BTHC * torch.exp(piece_lse_BTH - shift_BTH)[..., None])
    lse_BTH.copy_(joined_BTH)


@ring_attention.register_fake
def _(q_BTHC: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _like(q_BTHC), q_BTHC.new_empty(q_BTHC.shape[:-1], dtype=torch.float32)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("tessera::ring_attention_backward", mutates_args=())
@_as_outside
def ring_attention_backward(
    grad_BTHC: Tensor,
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    out_BTHC: Tensor,
    lse_BTH: Tensor,
    masks: Sequence[Tensor],
    group_name: str,
    backend: str,
    balanced: bool,
    is_causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's queries, keys and values.

    Keys and values go round again, followed by what all ranks add to their fp32 gradient, which
    goes one hop further: home.
    """
    group = _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]
    attend_backward = _functions[backend].attend_backward
    hops = _hops(group, q_BTHC.shape[1], masks, balanced=balanced, is_causal=is_causal)
    local = (grad_BTHC, q_BTHC, out_BTHC, lse_BTH)
    grad_q_BTHC = torch.zeros_like(_like(q_BTHC), dtype=torch.float32)
    both = torch.stack((k_BSKC, v_BSKC))
    grad_both, coming = torch.zeros_like(both, dtype=torch.float32), None
    for number, hop in enumerate(hops):
        transfer = _Transfer(both, group) if number + 1 < len(hops) else None
        found = None
        if hop is not None:
            grad, q, out, lse = (x[:, hop.queries] for x in local)
            k, v = both[:, :, hop.keys]
            options = hop.options(scale, softcap)
            found = attend_backward(grad, q, k, v, out, lse, **options)
        if coming is not None:
            grad_both = coming.finish()
        if hop is not None and found is not None:
            grad_q_BTHC[:, hop.queries] += found[0]
            grad_both[0, :, hop.keys] += found[1]
            grad_both[1, :, hop.keys] += found[2]
        coming = _Transfer(grad_both, group)
        if transfer is not None:
            both = transfer.finish()
    assert coming is not None, "there is at least one hop"
    grad_k_BSKC, grad_v_BSKC = coming.finish().to(k_BSKC.dtype)
    return grad_q_BTHC.to(q_BTHC.dtype), grad_k_BSKC.clone(), grad_v_BSKC.clone()


@ring_attention_backward.register_fake
def _(
    grad_BTHC: Tensor, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q_BTHC), _like(k_BSKC), _like(v_BSKC)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, masks, group_name, backend, balanced, is_causal, scale, softcap = inputs
    ctx.save_for_backward(*qkv, *output, *masks)
    ctx.settings = (group_name, backend, balanced, is_causal, scale, softcap)


def _backward(ctx: Any, grad_BTHC: Tensor, grad_lse_BTH: Tensor) -> tuple[Any, ...]:
    q_BTHC, k_BSKC, v_BSKC, out_BTHC, lse_BTH, *masks = ctx.saved_tensors
    kept = (q_BTHC, k_BSKC, v_BSKC, out_BTHC, lse_BTH)
    gradients = ring_attention_backward(grad_BTHC, *kept, masks, *ctx.settings)
    return (*gradients, [None] * len(masks), None, None, None, None, None, None)


ring_attention.register_autograd(_backward, setup_context=_keep)
