"""Every family's plan gives the loss and the gradients of one fp32 process."""

from dataclasses import replace

import pytest

from engine.verify import parity
from engine.verify.case import Case
from engine.verify.parity import Comparison
from engine.verify.subject import TINY, Subject, find_subject, shrink
from models.decoder import FULL, SLIDING
from models.registry import load_family
from tests.ranks import RankPool

EVERYTHING = replace(
    TINY,
    family_name="qwen3",
    config=replace(
        TINY.config,
        qkv_bias=True,
        qk_norm="head",
        head_dim=16,
        sliding_window=4,
        layer_types=(FULL, SLIDING, SLIDING),
    ),
)
"""Head norms, biases of queries, keys and values, and windows in some layers, in one model."""

CASES = [
    Case(shard=2, tp=2, checkpointing="op"),
    Case(tp=2, sequence=False, tied=True, vocab=61),
    Case(tp=2, backend="aot_eager", checkpointing="full"),
    Case(cp=2, balanced=False),
    Case(cp=2, context="ulysses", packed=False, tied=True),
]


def run(rank: int, world_size: int, subject: Subject, case: Case) -> Comparison:
    return parity.run_case(case, subject=subject)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_biases_and_windows_in_each_layout(ranks: RankPool, case: Case) -> None:
    for result in ranks(case.world_size, run, EVERYTHING, case, timeout_seconds=280):
        result.check()


@pytest.mark.parametrize(
    "case", [Case(shard=2, tp=2, checkpointing="full"), Case(tp=2, sequence=False)], ids=str
)
def test_norms_behind_and_across_heads_in_each_layout(ranks: RankPool, case: Case) -> None:
    config = replace(TINY.config, norms="after", qk_norm="width", head_dim=16)
    subject = replace(TINY, family_name="olmo2", config=config)
    for result in ranks(case.world_size, run, subject, case):
        result.check()


# Caps that every score and logit feels.
CAPPED = replace(
    load_family("gemma2").flavors["debugmodel"],
    **{name: getattr(TINY.config, name) for name in ("hidden_size", "num_heads", "head_dim")},
    intermediate_size=48,
    num_layers=3,
    initializer_range=0.2,
    attention_softcap=0.5,
    logit_softcap=2.0,
    sliding_window=4,
    layer_types=(SLIDING, FULL, SLIDING),
)


@pytest.mark.parametrize(
    "case",
    [
        Case(shard=2, tp=2, checkpointing="op", chunks=True, tied=True),
        Case(tp=2, sequence=False, loss_parallel=False, vocab=61),
        Case(cp=2, context="ring"),
    ],
    ids=str,
)
def test_soft_caps_and_norms_on_both_sides_in_each_layout(ranks: RankPool, case: Case) -> None:
    config = replace(CAPPED, layer_types=()) if case.cp > 1 else CAPPED  # no window in a ring
    subject = replace(TINY, family_name="gemma2", config=config)
    for result in ranks(case.world_size, run, subject, case):
        result.check()


def test_a_released_size_says_what_was_shrunk() -> None:
    for name in ("mistral:7B_v0.1", "qwen2:7B", "phi3:medium_4k", "gemma3:27B"):
        _, sentence = find_subject(name, "cpu")
        assert ("sliding_window" in sentence) == name.startswith(("mistral", "phi3", "gemma3"))


def test_a_model_keeps_each_type_of_layer_when_it_is_shrunk() -> None:
    mixed = replace(
        TINY.config, num_layers=6, sliding_window=99, layer_types=(FULL, *[SLIDING] * 5)
    )
    small, _ = shrink(mixed, 16)
    assert (small.layer_types, small.sliding_window) == ((FULL, SLIDING, SLIDING), 4)
