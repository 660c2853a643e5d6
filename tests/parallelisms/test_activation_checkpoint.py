"""Checkpointing is proved by counts of operations, since memory on a CPU shows nothing."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallelisms.activation_checkpoint import ActivationCheckpointConfig, checkpointed
from tests.parity.cases import Case, build_case, train
from tests.ranks import RankPool

PRODUCTS_OF_A_BLOCK = 7
BLOCKS = 3


class Counted(TorchDispatchMode):
    """Counts matrix products and attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.counts["products"] += 1
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            self.counts["attention"] += 1
        return func(*args, **(kwargs or {}))


def counts_and_gradients(
    rank: int, world_size: int, case: Case
) -> tuple[dict[str, int], dict[str, Tensor], list[str]]:
    model, dims = build_case(case)
    with Counted() as counted:
        train(model, dims, case)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        gradients[name] = parameter.grad.to_local()
    return dict(counted.counts), gradients, list(model.state_dict())


def recomputed(ranks: RankPool, mode: str) -> tuple[int, int]:
    """Return products and attentions that the mode computes twice."""
    plain = ranks(2, counts_and_gradients, Case(shard=2))[0][0]
    case = Case(shard=2, checkpointing=mode)
    counts = ranks(2, counts_and_gradients, case)[0][0]
    return tuple(counts[name] - plain[name] for name in ("products", "attention"))  # pyright: ignore


def test_full_computes_every_block_twice(ranks: RankPool) -> None:
    assert recomputed(ranks, "full") == (PRODUCTS_OF_A_BLOCK * BLOCKS, BLOCKS)


def test_every_second_block_computes_one_of_three_twice(ranks: RankPool) -> None:
    assert recomputed(ranks, "2") == (PRODUCTS_OF_A_BLOCK, 1)


def test_logits_of_each_chunk_are_computed_twice_unless_nothing_is(ranks: RankPool) -> None:
    def products_of_chunks(mode: str) -> int:
        cases = (Case(shard=2, checkpointing=mode, chunks=chunks) for chunks in (True, False))
        chunked, whole = (ranks(2, counts_and_gradients, c)[0][0]["products"] for c in cases)
        return chunked - whole

    chunks = 7  # of 10 of a rank's 64 tokens
    assert products_of_chunks("full") - products_of_chunks("none") == chunks


@pytest.mark.parametrize(("asked", "expected"), [("always", True), ("never", False)])
def test_what_happens_to_logits_can_be_asked_for(asked: Any, expected: bool) -> None:
    for mode in ("none", "full"):
        config = ActivationCheckpointConfig(mode=mode, recompute_logits=asked)
        assert config.recomputes_logits == expected


def test_per_operation_keeps_attention_and_every_second_product(ranks: RankPool) -> None:
    assert recomputed(ranks, "op") == (PRODUCTS_OF_A_BLOCK // 2 * BLOCKS, 0)


@pytest.mark.parametrize("layout", [Case(shard=2), Case(tp=2), Case(shard=2, tp=2)], ids=str)
def test_gradients_are_the_same_bits_as_without(ranks: RankPool, layout: Case) -> None:
    plain = ranks(layout.world_size, counts_and_gradients, layout)
    for mode in ("full", "op", "2"):
        case = replace(layout, checkpointing=mode)
        found = ranks(layout.world_size, counts_and_gradients, case)
        for (_, expected, names), (_, gradients, found_names) in zip(plain, found, strict=True):
            assert found_names == names, "parameter names stay what they are"
            for name, gradient in expected.items():
                assert torch.equal(gradients[name], gradient), (mode, name)


class Dropping(nn.Module):
    """A block with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.up(x)).relu())


def gradient_with(config: ActivationCheckpointConfig) -> Tensor:
    torch.manual_seed(0)
    block = Dropping()
    x = torch.randn(4, 8)
    checkpointed(block.forward, config, block)(x).sum().backward()
    assert block.up.weight.grad is not None
    return block.up.weight.grad


def test_dropout_repeats_in_the_recomputation_unless_told_otherwise() -> None:
    plain = ActivationCheckpointConfig(mode="selective", selective_ac_option="op")
    full = ActivationCheckpointConfig(mode="full")
    torch.manual_seed(0)
    block = Dropping()
    x = torch.randn(4, 8)
    block(x).sum().backward()
    assert block.up.weight.grad is not None
    for config in (plain, full):
        assert torch.equal(gradient_with(config), block.up.weight.grad)
    forgetful = ActivationCheckpointConfig(mode="full", preserve_rng_state=False)
    assert not torch.equal(gradient_with(forgetful), block.up.weight.grad)


def products_with(shapes_of: list[str]) -> int:
    config = ActivationCheckpointConfig(
        mode="selective",
        selective_ac_option="op",
        per_op_sac_force_recompute_mm_shapes_by_fqns=shapes_of,
    )
    block = Dropping()
    with Counted() as counted:
        checkpointed(block.forward, config, block)(torch.randn(4, 8)).sum().backward()
    return counted.counts["products"]


def test_products_with_the_shapes_of_listed_modules_are_never_kept() -> None:
    assert products_with(["up", "down"]) == products_with([]) + 1


@pytest.mark.parametrize(
    ("option", "covered"), [("1", [0, 1, 2, 3]), ("2", [1, 3]), ("3", [2]), ("op", [0, 1, 2, 3])]
)
def test_selective_covers_every_nth_block(option: str, covered: list[int]) -> None:
    config = ActivationCheckpointConfig(mode="selective", selective_ac_option=option)
    assert [n for n in range(4) if config.covers(n)] == covered


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("selective_ac_option", "every"),
        ("selective_ac_option", "0"),
        ("memory_budget", 1.5),
        ("memory_budget", -0.1),
        ("determinism_check", "strict"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key: str, value: Any) -> None:
    options: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=rf"activation_checkpoint\.{key} = "):
        ActivationCheckpointConfig(**options)


def test_a_choice_by_operation_cannot_be_debugged() -> None:
    with pytest.raises(ValueError, match=r'debug = true with selective_ac_option = "op"'):
        ActivationCheckpointConfig(debug=True, selective_ac_option="op")
    ActivationCheckpointConfig(debug=True, mode="full", selective_ac_option="op")
    ActivationCheckpointConfig(debug=True)
