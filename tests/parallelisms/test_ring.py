"""A ring of ranks attends, forward and backward, as one process does with whole rows."""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import flex_attention as flex_module

from models.attention import AttentionCore, AttentionMasks
from models.attention import flex as flex_backend
from models.attention import sdpa as sdpa_backend
from parallelisms.context import ring_operator, token_order
from parallelisms.context.ring import Ring
from parallelisms.context.ring_operator import ring_pieces
from tests.ranks import RankPool

FP32_REORDERED_SUM = 5e-6
BF16_ARITHMETIC = 3e-2
ROWS, CHANNELS = 2, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One ring; the defaults are one document a row, dealt head and tail."""

    degree: int
    balanced: bool = True
    lengths: tuple[int, ...] = ()  # of the documents of each row; the rest is padding
    num_heads: int = 4
    num_kv_heads: int = 2
    backend: str = "sdpa"
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    num_tokens: int = 32

    def __str__(self) -> str:
        parts = [f"cp{self.degree}", self.backend, f"kv{self.num_kv_heads}"]
        parts += [] if self.balanced else ["contiguous"]
        parts += ["-".join(map(str, self.lengths))] if self.lengths else []
        parts += ["bf16"] if self.dtype == torch.bfloat16 else []
        return "-".join(parts + (["compiled"] if self.compiled else []))


def whole_rows(case: Case) -> tuple[list[Tensor], Tensor | None]:
    """Return q, k, v and the gradient of the output, and the documents of each token."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    shapes = [(ROWS, case.num_tokens, n, CHANNELS) for n in heads]
    tensors = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
    if not case.lengths:
        return tensors, None
    padding = case.num_tokens - sum(case.lengths)
    numbers = torch.tensor([*range(1, len(case.lengths) + 1), 0])
    documents_T = numbers.repeat_interleave(torch.tensor([*case.lengths, padding]))
    # The second row is cut elsewhere.
    return tensors, torch.stack((documents_T, documents_T.roll(3)))


def one_process(case: Case) -> dict[str, Tensor]:
    """Return output and gradients of whole rows, by fp32 attention that is written out."""
    tensors, documents_BT = whole_rows(case)
    q, k, v, grad = (x.float() for x in tensors)
    places_BT = torch.arange(case.num_tokens).expand(ROWS, -1)
    mask = AttentionMasks("eager", head_dim=CHANNELS)(places_BT, documents_BT=documents_BT)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = AttentionCore("eager")(*leaves, mask=mask)
    gradients = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach(), **dict(zip("qkv", gradients, strict=True))}


def this_rank(rank: int, case: Case) -> dict[str, Tensor]:
    """Return output and gradients of a rank's tokens, by the ring."""
    mesh = init_device_mesh("cpu", (case.degree,), mesh_dim_names=("cp",))
    core = AttentionCore(case.backend)
    ring = Ring(mesh, balanced=case.balanced, cores=[core])
    order_T = token_order(case.num_tokens, case.degree, rank, balanced=case.balanced)
    tensors, documents_BT = whole_rows(case)
    q, k, v, grad = (x[:, order_T] for x in tensors)
    documents_BT = None if documents_BT is None else documents_BT[:, order_T]
    with (
        patch.object(flex_module, "_validate_device", lambda *args: None),
        patch.object(flex_backend, "unsupported_reason", lambda **kwargs: None),
    ):
        make = AttentionMasks(case.backend, head_dim=CHANNELS)
        mask = ring.mask(make, documents_BT, torch.Size((ROWS, len(order_T))), q.device)
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
            return ring.attend(core, core.forward, q * 1, k * 1, v * 1, mask=mask) * 1

        if case.compiled:
            attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
        out = attend(q, k, v, mask)
        gradients = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach(), **dict(zip("qkv", gradients, strict=True))}


def worst_error(rank: int, world_size: int, case: Case) -> float:
    """Return the largest error of output and gradients on this rank, relative to the largest."""
    order_T = token_order(case.num_tokens, case.degree, rank, balanced=case.balanced)
    errors = []
    found = this_rank(rank, case)
    for name, whole in one_process(case).items():
        assert found[name].dtype == case.dtype
        difference = (found[name].float() - whole[:, order_T]).abs().max()
        errors.append(difference / whole.abs().max())
    return float(torch.stack(errors).max())  # not a number if any is not


CASES = [
    Case(degree=2),
    Case(degree=2, balanced=False, backend="eager"),
    Case(degree=2, lengths=(5, 1, 17, 4), num_kv_heads=1),
    Case(degree=2, lengths=(31, 1), balanced=False, num_kv_heads=4),
    Case(degree=4, backend="eager"),
    Case(degree=4, balanced=False, num_kv_heads=1),
    Case(degree=4, lengths=(9, 1, 2, 13)),
    Case(degree=4, lengths=(4,) * 8, backend="eager"),  # most pieces hold nothing to see
    Case(degree=4, lengths=(3, 20), balanced=False, num_kv_heads=1),
    Case(degree=8, lengths=(11, 2, 16), num_kv_heads=1),
    Case(degree=2, lengths=(5, 1, 17, 4), compiled=True),
    Case(degree=2, lengths=(5, 1, 17, 4), compiled=True, backend="flex"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_ring_attends_as_one_process_does(ranks: RankPool, case: Case) -> None:
    errors = ranks(case.degree, worst_error, case)
    assert all(error <= FP32_REORDERED_SUM for error in errors), errors


@pytest.mark.parametrize("lengths", [(), (9, 1, 2, 13)], ids=["one", "packed"])
def test_a_ring_in_bf16_joins_pieces_in_fp32(ranks: RankPool, lengths: tuple[int, ...]) -> None:
    errors = ranks(4, worst_error, Case(degree=4, lengths=lengths, dtype=torch.bfloat16))
    assert all(error <= BF16_ARITHMETIC for error in errors), errors


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("degree", [2, 3, 8])
def test_the_pieces_are_all_that_any_query_sees(degree: int, balanced: bool) -> None:
    length, costs = 4, []
    for rank in range(degree):
        own_T = token_order(length * degree, degree, rank, balanced=balanced)
        pieces = ring_pieces(rank, degree, length, balanced=balanced)
        assert len(pieces) == degree
        cost = 0
        for hop, piece in enumerate(pieces):
            source_S = token_order(
                length * degree, degree, (rank - hop) % degree, balanced=balanced
            )
            allowed_TS = own_T[:, None] >= source_S
            if piece is not None:
                queries, keys = piece
                assert allowed_TS[queries, keys].all() or hop == 0
                allowed_TS[queries, keys] = False
                cost += len(own_T[queries]) * len(source_S[keys])
            assert not allowed_TS.any(), "nothing else is seen"
        costs.append(cost)
    assert (len(set(costs)) == 1) == balanced


def order_of_events(rank: int, world_size: int, packed: bool) -> tuple[list[str], list[str], int]:
    """Return what the forward and the backward do in order, and the numbers kept between."""
    events: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return wrapped

    saved: list[Tensor] = []
    backend, transfer = "models.attention.sdpa", ring_operator._Transfer
    case = Case(degree=world_size, lengths=(9, 1, 2, 13) if packed else ())
    with (
        patch(f"{backend}.attend_with_lse", noted("attend", sdpa_backend.attend_with_lse)),
        patch(f"{backend}.attend_backward", noted("attend", sdpa_backend.attend_backward)),
        patch.object(transfer, "__init__", noted("send", transfer.__init__)),
        patch.object(transfer, "finish", noted("wait", transfer.finish)),
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x) or events.append("keep") or x, lambda x: x
        ),
    ):
        this_rank(rank, case)
    end = events.index("keep")
    return events[:end], [e for e in events[end:] if e != "keep"], sum(x.numel() for x in saved)


@pytest.mark.parametrize("packed", [False, True])
def test_messages_travel_during_attention_and_nothing_that_came_is_kept(
    ranks: RankPool, packed: bool
) -> None:
    length, heads, kv_heads = 32 // 4, 4, 2
    for forward, backward, num_kept in ranks(4, order_of_events, packed):
        assert forward == ["send", "attend", "wait"] * 3 + ["attend"]
        # Keys and values go before a piece is attended to, their gradient after it.
        first, middle = (
            ["send", "attend", "send", "wait"],
            ["send", "attend", "wait", "send", "wait"],
        )
        assert backward == first + middle * 2 + ["attend", "wait", "send", "wait"]
        masks = ROWS * length * (length + 3 * length // 2) if packed else 0
        tokens = ROWS * length * (CHANNELS * 2 * (heads + kv_heads) + heads)
        assert num_kept == tokens + masks
