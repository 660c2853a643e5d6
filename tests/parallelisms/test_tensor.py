"""Tensor parallelism: what travels, the split loss, and lengths that cannot be split."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers.head import label_logps
from parallelisms import ParallelConfig, ParallelDims
from parallelisms.vocabulary import VocabularyLogps
from tests.parity.cases import Case, batch, build_case, forward, train
from tests.ranks import RankFailure, RankPool


class Travelled(TorchDispatchMode):
    """Counts collectives over whole activations by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
        name = func.overloadpacket.__name__
        if name in names and args[0].ndim == 3:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def travelled(rank: int, world_size: int, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    model, _ = build_case(case)
    with Travelled() as there:
        loss = forward(model, batch(case), case).sum()
    with Travelled() as back:
        loss.backward()
    return dict(there.counts), dict(back.counts)


@pytest.mark.parametrize("chunks", [False, True])
def test_each_entrance_gathers_once_and_each_exit_scatters_once(
    ranks: RankPool, chunks: bool
) -> None:
    there, back = ranks(2, travelled, Case(tp=2, chunks=chunks))[0]
    entrances = exits = 2 * 3 + 1  # attention and MLP of three blocks; head, embedding
    expected = {"all_gather_into_tensor": entrances, "reduce_scatter_tensor": exits}
    assert there == expected
    assert back == expected


def test_without_sequence_parallelism_each_half_block_reduces_once(ranks: RankPool) -> None:
    there, back = ranks(2, travelled, Case(tp=2, sequence=False))[0]
    assert there == {"all_reduce": 2 * 3 + 1}
    assert back == {"all_reduce": 2 * 3 + 1}


def split_loss(
    rank: int,
    world_size: int,
    vocab: int,
    softcap: float | None,
    dtype: torch.dtype,
    keep_split: bool,
) -> tuple[Tensor, Tensor]:
    config = ParallelConfig(tensor_parallel_degree=world_size)
    mesh = ParallelDims.of(config, world_size).build("cpu").mesh("tp")
    logits, labels = loss_inputs(vocab, dtype)
    split = distribute_tensor(logits, mesh, (Shard(1),)).requires_grad_()
    whole = partial(label_logps, softcap=softcap)
    score = VocabularyLogps(mesh, whole=whole, softcap=softcap, keep_split=keep_split)
    logps = score(split, labels)
    (logps * torch.arange(1.0, 8.0)).sum().backward()
    assert isinstance(split.grad, DTensor)
    return logps.detach(), split.grad.full_tensor()


def loss_inputs(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(7, vocab, generator=generator) * 30).to(dtype)
    labels = torch.randint(vocab, (7,), generator=generator)
    labels[[1, 4]] = -100
    labels[0], labels[2] = vocab - 1, 0
    return logits, labels


@pytest.mark.parametrize("keep_split", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab", "degree", "softcap"),
    [(16, 2, None), (17, 2, None), (17, 4, None), (64, 4, None), (17, 2, 20.0)],
)
def test_the_split_loss_equals_cross_entropy(
    ranks: RankPool,
    vocab: int,
    degree: int,
    softcap: float | None,
    dtype: torch.dtype,
    keep_split: bool,
) -> None:
    logits, labels = loss_inputs(vocab, dtype)
    whole = logits.float().requires_grad_()
    capped = whole if softcap is None else softcap * torch.tanh(whole / softcap)
    expected = -F.cross_entropy(capped, labels, reduction="none", ignore_index=-100)
    (expected * torch.arange(1.0, 8.0)).sum().backward()
    assert whole.grad is not None
    for logps, gradient in ranks(degree, split_loss, vocab, softcap, dtype, keep_split):
        torch.testing.assert_close(logps, expected.detach(), rtol=1e-6, atol=2e-5)
        assert gradient.dtype == dtype
        rounding = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(gradient.float(), whole.grad, rtol=rounding, atol=rounding)
        assert not gradient[[1, 4]].any(), "ignored labels have no gradient"


def uneven_rows(rank: int, world_size: int, sequence: bool) -> int:
    case = Case(tp=2, sequence=sequence)
    model, _ = build_case(case)
    rows = {k: v[:, :15].contiguous() for k, v in batch(case).items()}
    return forward(model, rows, case).shape[1]


def test_rows_that_cannot_be_split_are_refused_before_the_abort(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"ValueError: rows of 15 tokens .*degree = 2"):
        ranks(2, uneven_rows, True)
    assert ranks(2, uneven_rows, False) == [15, 15]


def logits_of(rank: int, world_size: int, case: Case) -> Tensor:
    model, _ = build_case(case)
    rows = batch(case)
    del rows["labels_BT"]
    with torch.no_grad():
        return forward(model, rows, case)


@pytest.mark.parametrize("case", [Case(tp=2, vocab=61), Case(tp=4, sequence=False)], ids=str)
def test_without_labels_every_rank_gets_the_whole_logits(ranks: RankPool, case: Case) -> None:
    expected = ranks(1, logits_of, Case(vocab=case.vocab))[0]
    for logits in ranks(case.world_size, logits_of, case):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def norm_gradients(rank: int, world_size: int, case: Case) -> dict[str, Tensor]:
    model, dims = build_case(case)
    train(model, dims, case)
    return {
        name: parameter.grad.to_local()
        for name, parameter in model.named_parameters()
        if "norm" in name and isinstance(parameter.grad, DTensor)
    }


@pytest.mark.parametrize("case", [Case(tp=2), Case(tp=2, sequence=False)], ids=str)
def test_every_rank_holds_the_same_gradient_of_a_norm(ranks: RankPool, case: Case) -> None:
    first, second = ranks(2, norm_gradients, case)
    assert len(first) == 7
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def lost(rank: int, world_size: int) -> None:
    case = Case(shard=2, checkpointing="full")
    model, _ = build_case(case)
    rows = batch(case)
    model(rows["tokens_BT"], positions_BT=rows["positions_BT"][:, :-1])


def test_an_error_inside_the_model_points_to_its_file(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"models/decoder\.py"):
        ranks(2, lost)
