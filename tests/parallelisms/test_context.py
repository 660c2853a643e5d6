"""Tokens are dealt once, evenly; attention over all ranks is that of one process."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import flex_attention as flex_module

from models.attention import AttentionCore, AttentionMasks
from models.attention import flex as flex_backend
from parallelisms import ParallelConfig, ParallelDims
from parallelisms.context import gathered_order, make_form, split_tokens, token_order
from parallelisms.mesh import ContextMode
from tests.parity.cases import Case, batch, build_case, forward, local_rows
from tests.ranks import RankFailure, RankPool

FP32_REORDERED_SUM = 5e-6
MODES: tuple[ContextMode, ...] = ("allgather", "ring", "ulysses")
ROWS, TOKENS, CHANNELS = 2, 32, 16


def test_a_rank_holds_a_part_of_the_head_and_one_of_the_tail() -> None:
    assert token_order(16, 2, 0, balanced=True).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert token_order(16, 2, 1, balanced=True).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert token_order(16, 4, 2, balanced=False).tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_every_token_is_held_by_one_rank(degree: int, balanced: bool) -> None:
    everything = gathered_order(64, degree, balanced=balanced)
    assert sorted(everything.tolist()) == list(range(64))


@pytest.mark.parametrize(("balanced", "is_even"), [(True, True), (False, False)])
def test_causal_attention_costs_every_rank_the_same_where_balanced(
    balanced: bool, is_even: bool
) -> None:
    seen = [int((token_order(64, 4, rank, balanced=balanced) + 1).sum()) for rank in range(4)]
    assert (len(set(seen)) == 1) == is_even


def split(rank: int, world_size: int, mode: ContextMode, num_tokens: int) -> dict[str, Tensor]:
    parallel = ParallelConfig(
        context_parallel_degree=2, context_parallel_mode=mode, tensor_parallel_degree=2
    )
    dims = ParallelDims.of(parallel, world_size).build("cpu")
    tokens = torch.arange(3 * num_tokens).view(3, num_tokens)
    return split_tokens({"tokens_BT": tokens, "x_BTD": tokens[..., None] * 1.5}, dims)


@pytest.mark.parametrize("mode", ["allgather", "ulysses"])
def test_a_split_row_joins_to_itself_and_all_of_it_is_cut_alike(
    ranks: RankPool, mode: ContextMode
) -> None:
    found = ranks(4, split, mode, 16)
    assert all(f["tokens_BT"].shape == (3, 8) for f in found)
    joined = torch.cat([found[0]["tokens_BT"], found[2]["tokens_BT"]], dim=1)
    order = gathered_order(16, 2, balanced=mode != "ulysses")
    assert torch.equal(joined, torch.arange(48).view(3, 16)[:, order])
    for number, part in enumerate(found):
        assert torch.equal(part["x_BTD"][..., 0], part["tokens_BT"] * 1.5)
        partner = found[number ^ 1]  # of the same row and part, under tensor parallelism
        assert torch.equal(part["tokens_BT"], partner["tokens_BT"])


@pytest.mark.parametrize(("mode", "multiple"), [("ring", 4), ("ulysses", 2)])
def test_a_row_that_cannot_be_dealt_evenly_is_refused(
    ranks: RankPool, mode: ContextMode, multiple: int
) -> None:
    words = rf"rows of 15 tokens .*context_parallel_degree = 2 .* a multiple of {multiple}"
    with pytest.raises(RankFailure, match=words):
        ranks(4, split, mode, 15)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention over `degree` ranks; the defaults are rows of one document."""

    degree: int
    mode: ContextMode = "allgather"
    balanced: bool = True
    lengths: tuple[int, ...] = (TOKENS,)  # of the documents of each row; the rest is padding
    num_heads: int = 4
    num_kv_heads: int = 2
    backend: str = "sdpa"
    noise: float = 0.0  # what keys and values of the padding hold

    def __str__(self) -> str:
        parts = [self.mode, str(self.degree), self.backend, f"{self.num_heads}/{self.num_kv_heads}"]
        parts += [] if self.balanced else ["contiguous"]
        return "-".join([*parts, "+".join(map(str, self.lengths))])


def tensors(case: Attention) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v and the gradient of the output, and the documents: 0 is padding."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    found = [torch.randn((ROWS, TOKENS, n, CHANNELS), generator=generator) for n in heads]
    numbers = torch.tensor([*range(1, len(case.lengths) + 1), 0])
    lengths = torch.tensor([*case.lengths, TOKENS - sum(case.lengths)])
    documents_T = numbers.repeat_interleave(lengths)
    found[3][:, documents_T == 0] = 0.0  # no label, no gradient
    found[1][:, documents_T == 0] += case.noise
    found[2][:, documents_T == 0] += case.noise
    return found, documents_T.expand(ROWS, -1).contiguous()


def results(out: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in zip("qkv", leaves, strict=True) if x.grad is not None}
    assert len(grads) == 3
    return {"out": out.detach(), **grads}


def attend(rank: int, world_size: int, case: Attention) -> dict[str, Tensor]:
    """Return this rank's part of the output and of the gradients of q, k and v."""
    mesh = init_device_mesh("cpu", (case.degree,), mesh_dim_names=("cp",))
    core = AttentionCore(case.backend)
    form = make_form(case.mode, mesh, balanced=case.balanced, cores=[core])
    order_T = token_order(TOKENS, case.degree, rank, balanced=form.is_balanced)
    whole, documents_BT = tensors(case)
    *qkv, grad = (x[:, order_T] for x in whole)
    documents = documents_BT[:, order_T] if len(case.lengths) > 1 else None
    with (
        patch.object(flex_module, "_validate_device", lambda *args: None),
        patch.object(flex_backend, "unsupported_reason", lambda **kwargs: None),
    ):
        make = AttentionMasks(case.backend, head_dim=CHANNELS)
        mask: Any = form.mask(make, documents, torch.Size((ROWS, len(order_T))), grad.device)
        leaves = [x.requires_grad_() for x in qkv]
        out = form.attend(core, core.forward, *leaves, mask=mask)
        out.backward(grad)
    found = results(out, leaves)
    is_real = (documents_BT[:, order_T] != 0)[..., None, None]
    return {"order": order_T} | {name: x * is_real for name, x in found.items()}


def one_process(case: Attention) -> dict[str, Tensor]:
    (*qkv, grad), documents_BT = tensors(case)
    places_BT = torch.arange(TOKENS).expand(ROWS, -1)
    mask = AttentionMasks("eager", head_dim=CHANNELS)(
        places_BT, documents_BT=documents_BT if len(case.lengths) > 1 else None
    )
    leaves = [x.requires_grad_() for x in qkv]
    out = AttentionCore("eager")(*leaves, mask=mask)
    out.backward(grad)
    found = results(out, leaves)
    return {name: x * (documents_BT != 0)[..., None, None] for name, x in found.items()}


ATTENTIONS = [
    Attention(degree=2),
    Attention(degree=2, backend="flex", lengths=(9, 20)),
    Attention(degree=2, backend="eager", balanced=False, lengths=(5, 1, 17, 4)),
    Attention(degree=4, lengths=(9, 1, 2, 13), num_kv_heads=1),
    Attention(degree=2, mode="ulysses", balanced=False, lengths=(5, 1, 17, 4)),
    Attention(degree=2, mode="ulysses", balanced=False, backend="flex"),
    Attention(degree=4, mode="ulysses", balanced=False, num_kv_heads=1),
    Attention(degree=4, mode="ulysses", balanced=False, num_kv_heads=2, num_heads=8),
    Attention(degree=4, mode="ulysses", balanced=False, num_kv_heads=4, lengths=(31, 1)),
]


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_over_ranks_is_that_of_one_process(ranks: RankPool, case: Attention) -> None:
    expected = one_process(case)
    for found in ranks(case.degree, attend, case):
        for name, whole in expected.items():
            error = (found[name] - whole[:, found["order"]]).abs().max() / whole.abs().max()
            assert error <= FP32_REORDERED_SUM, name


@pytest.mark.parametrize("lengths", [(21,), (9, 1, 11)], ids=["one-document", "documents"])
@pytest.mark.parametrize("mode", MODES)
def test_no_token_sees_the_padding_at_the_end(
    ranks: RankPool, mode: ContextMode, lengths: tuple[int, ...]
) -> None:
    case = Attention(degree=2, mode=mode, balanced=mode != "ulysses", lengths=lengths)
    quiet, loud = (ranks(2, attend, replace(case, noise=noise)) for noise in (0.0, 1e3))
    for before, after in zip(quiet, loud, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def logps(rank: int, world_size: int, case: Case, filler: int) -> Tensor:
    """Return log-probabilities of rows of one document, whose padding has position 0."""
    model, dims = build_case(case)
    rows = batch(case)
    rows["tokens_BT"][:, 11:] = filler
    rows["positions_BT"][:, 11:] = 0
    rows["labels_BT"][:, 11:] = -100
    return forward(model, local_rows(rows, dims, case), case).detach()


@pytest.mark.parametrize("mode", MODES)
def test_masks_come_from_places_in_the_row_and_not_from_rotary_positions(
    ranks: RankPool, mode: ContextMode
) -> None:
    case = Case(cp=2, context=mode, packed=False)
    assert [x.tolist() for x in ranks(2, logps, case, 0)] == [
        x.tolist() for x in ranks(2, logps, case, 9)
    ]
