"""Attention arithmetic behind one interface; each other file here is a backend.

A backend has `prepare(mask)`, called once per forward pass, `attend(q, k, v, *, mask, scale)`,
called by every block, and `unsupported_reason(...)`. The one asked for is used or refused. Those
that also have the functions of `PieceBackend` can attend to the keys piece by piece; those with
`NEEDS_WHOLE_ROWS = True` attend document by document, from the offsets of whole rows; those with
`SUPPORTS_WINDOWS = True` heed the window of a mask; those with `SUPPORTS_SOFTCAP = True` take the
keyword `softcap` wherever they take `scale`: scores s become softcap * tanh(s / softcap) before
they are masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef

from models.registry import load_member, member_names

PIECE_FUNCTIONS = ("mask_tensors", "attend_with_lse", "attend_backward")


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMask:
    """Which key each query may see: those of its document that are not behind it, nor too far back.

    Without documents each row is one document; padding may follow it, never precede it.
    """

    query_positions_BT: Tensor
    key_positions_BS: Tensor
    query_documents_BT: Tensor | None
    key_documents_BS: Tensor | None

    is_causal: bool
    """Queries are the keys, a row is one document, no window: causal attention suffices."""

    window: int | None = None
    """Newest keys that a query sees, its own among them; None where it sees all."""

    document_offsets: Tensor | None = None
    """Where each document begins in the joined rows of queries, which are the keys; see
    `DecoderLM.forward`."""

    longest_document_tokens: int | None = None
    """No document is longer; None: than a row."""

    prepared: object = None
    """What the backend made of the above."""

    def allowed_BTS(self) -> Tensor:
        """Return the mask as booleans, True where the query may see the key."""
        distance = self.query_positions_BT[:, :, None] - self.key_positions_BS[:, None, :]
        allowed = distance >= 0
        if self.window is not None:
            allowed &= distance < self.window
        if self.query_documents_BT is None or self.key_documents_BS is None:
            return allowed
        same = self.query_documents_BT[:, :, None] == self.key_documents_BS[:, None, :]
        return allowed & same


class Backend(Protocol):
    """A file of this package, called `models/attention/<name>.py`."""

    def prepare(self, mask: AttentionMask) -> object:
        """Return what `attend` wants to read of the mask."""
        ...

    def attend(
        self, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
    ) -> Tensor:
        """Return the attended values (B, T, H, C)."""
        ...

    def unsupported_reason(
        self, *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
    ) -> str | None:
        """Say why the backend cannot do this here, or None if it can; `dtype` None is any."""
        ...


class PieceBackend(Backend, Protocol):
    """A backend for keys that come in pieces, whose results are joined by their log-sum-exp.

    In both `attend_` functions `mask` is what `mask_tensors` returned. Without tensors and not
    causal, every query sees every key. `is_causal` is that of the mask: query t sees keys 0 to t.
    """

    def mask_tensors(self, mask: AttentionMask) -> list[Tensor]:
        """Return the mask as tensors only, as operators of torch can take it."""
        ...

    def attend_with_lse(
        self,
        q_BTHC: Tensor,
        k_BSKC: Tensor,
        v_BSKC: Tensor,
        *,
        mask: Sequence[Tensor],
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the attended values (B, T, H, C) and the fp32 log-sum-exp of scores (B, T, H).

        A query that sees no key has value 0 and log-sum-exp -inf. Nothing is recorded for autograd.
        """
        ...

    def attend_backward(
        self,
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
        """Return what this piece of the keys adds to the gradient of q, and that of its k and v.

        `out` and `lse` are those over all pieces. Source: Dao 2023, arXiv:2307.08691, algorithm 2.
        """
        ...


def backend_names() -> tuple[str, ...]:
    """Return the values that `model.attention` may have."""
    return member_names(__name__)


def unsupported_reason(
    backend: str,
    *,
    device_type: str,
    training: bool,
    head_dim: int,
    dtype: torch.dtype | None = None,
    has_window: bool = False,
    has_softcap: bool = False,
) -> str | None:
    """Say why a backend cannot run on such a device, and what to do; None if it can.

    `dtype` is that of queries, keys and values, None where it is not known; `has_window` says
    whether some blocks attend through a sliding window, `has_softcap` whether scores are capped.
    """
    if has_softcap and not supports_softcap(backend):
        return (
            f"{backend} does not cap the scores of attention softly, which the model does; use "
            "'flex' on a GPU, or 'eager'"
        )
    if has_window and not supports_windows(backend):
        return (
            f"{backend} does not heed a sliding window, which the model has; use 'flex' on a GPU, "
            "or 'sdpa'"
        )
    reason = load_member(__name__, backend, "unsupported_reason")
    return reason(device_type=device_type, training=training, head_dim=head_dim, dtype=dtype)


def needs_whole_rows(backend: str) -> bool:
    """Say whether a backend attends document by document, so that keys must be the queries'."""
    return bool(_optional_member(backend, "NEEDS_WHOLE_ROWS"))


def supports_windows(backend: str) -> bool:
    """Say whether a backend heeds the window of a mask."""
    return bool(_optional_member(backend, "SUPPORTS_WINDOWS"))


def supports_softcap(backend: str) -> bool:
    """Say whether a backend can cap scores."""
    return bool(_optional_member(backend, "SUPPORTS_SOFTCAP"))


def returns_lse(backend: str) -> bool:
    """Say whether a backend can attend piece by piece; see `PieceBackend`."""
    return all(_optional_member(backend, name) is not None for name in PIECE_FUNCTIONS)


def whole_row_offsets(mask: AttentionMask) -> Tensor:
    """Return the document offsets of a mask, for backends that need whole rows."""
    if mask.document_offsets is None and mask.query_documents_BT is None:
        rows, length = mask.query_positions_BT.shape
        device = mask.query_positions_BT.device
        return torch.arange(rows + 1, dtype=torch.int32, device=device) * length
    if mask.document_offsets is None:
        raise ValueError(
            "the attention backend attends document by document and needs document_offsets beside "
            "documents_BT; give them, or use 'flex' or 'sdpa'"
        )
    # Its length changes with the number of documents; blocks are compiled once for all.
    torch._dynamo.maybe_mark_dynamic(mask.document_offsets, 0)
    return mask.document_offsets


def longest_document(mask: AttentionMask) -> Tensor:
    """Return an empty tensor as long as the longest document may be.

    A block that is compiled for one number is compiled again for the next; not so for a size.
    """
    row_tokens = mask.query_positions_BT.shape[1]
    longest = min(mask.longest_document_tokens or row_tokens, row_tokens)
    sized = mask.query_positions_BT.new_empty(longest, 0)
    torch._dynamo.maybe_mark_dynamic(sized, 0)
    return sized


def _optional_member(backend: str, name: str) -> Any:
    load_member(__name__, backend, "attend")  # refuses an unknown backend
    return getattr(
        import_module(backend if "." in backend else f"{__name__}.{backend}"), name, None
    )


def connect_backward(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Make `backward` the gradient of `forward`: operators of attention document by document.

    `forward(q, k, v, documents, longest, scale)` returns the values and their log-sum-exp;
    `backward(grad, q, k, v, values, log_sum_exp, documents, longest, scale)` returns the gradients
    of q, k and v, laid out without gaps.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *qkv, documents, longest, scale = inputs
        ctx.save_for_backward(*qkv, *output, documents)
        ctx.settings = (longest, scale)

    def gradients(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        return (*backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None)

    @backward.register_fake
    def _(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        whole = torch.contiguous_format
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=whole) for x in (q, k, v))
        return grad_q, grad_k, grad_v

    forward.register_autograd(gradients, setup_context=keep)


class AttentionMasks(nn.Module):
    """Makes the mask that all blocks of one forward pass share; holds no parameters."""

    def __init__(
        self,
        backend: str,
        *,
        head_dim: int,
        window: int | None = None,
        has_softcap: bool = False,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.head_dim = head_dim
        self.window = window
        self.has_softcap = has_softcap
        self.prepare = load_member(__name__, backend, "prepare")

    def forward(
        self,
        positions_BT: Tensor,
        *,
        documents_BT: Tensor | None = None,
        document_offsets: Tensor | None = None,
        longest_document_tokens: int | None = None,
        keys: tuple[Tensor, Tensor | None] | None = None,
    ) -> AttentionMask:
        """Return the mask of queries at `positions_BT`.

        `keys` gives positions and documents of the keys where these are not the queries.
        """
        assert keys is None or not needs_whole_rows(self.backend), "refused where it is chosen"
        key_positions_BS, key_documents_BS = keys or (positions_BT, documents_BT)
        reaches_all = self.window is None or self.window >= key_positions_BS.shape[1]
        window = None if reaches_all else self.window
        reason = unsupported_reason(
            self.backend,
            device_type=positions_BT.device.type,
            training=torch.is_grad_enabled(),
            head_dim=self.head_dim,
            has_window=window is not None,
            has_softcap=self.has_softcap,
        )
        if reason is not None:
            raise ValueError(f"model.attention = {self.backend!r} cannot be used: {reason}")
        mask = AttentionMask(
            query_positions_BT=positions_BT,
            key_positions_BS=key_positions_BS,
            query_documents_BT=documents_BT,
            key_documents_BS=key_documents_BS,
            is_causal=keys is None and documents_BT is None and window is None,
            window=window,
            document_offsets=document_offsets,
            longest_document_tokens=longest_document_tokens,
        )
        return replace(mask, prepared=self.prepare(mask))


class AttentionCore(nn.Module):
    """The arithmetic of attention, without parameters; context parallelism wraps its forward.

    Scores are scaled by the root of `query_pre_attn_scalar`, by default of the channels of a head.
    """

    def __init__(
        self,
        backend: str,
        *,
        query_pre_attn_scalar: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.query_pre_attn_scalar = query_pre_attn_scalar
        self.softcap = softcap
        self.attend = load_member(__name__, backend, "attend")
        # None where the backend cannot attend piece by piece.
        self.mask_tensors, self.attend_with_lse, self.attend_backward = (
            _optional_member(backend, name) for name in PIECE_FUNCTIONS
        )

    def forward(
        self, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask
    ) -> Tensor:
        """Return the attended values (B, T, H, C); query heads share key/value heads in groups."""
        options: dict[str, Any] = {"mask": mask, "scale": self.scale(q_BTHC.shape[-1])}
        if self.softcap is not None:
            options["softcap"] = self.softcap
        return self.attend(q_BTHC, k_BSKC, v_BSKC, **options)

    def scale(self, head_dim: int) -> float:
        """Return the factor of the scores."""
        return (self.query_pre_attn_scalar or head_dim) ** -0.5

    def extra_repr(self) -> str:
        """Show the backend."""
        return self.backend
