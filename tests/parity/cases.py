"""Plans that the tests compare with one fp32 process; `engine/verify/parity.py` compares."""

from torch import nn

from engine.verify import parity
from engine.verify.case import Case
from engine.verify.parity import (
    BF16_ARITHMETIC,
    FP32_REORDERED_SUM,
    NOISE_ALPHA,
    Comparison,
    batch,
    build_case,
    checkpoint_config,
    forward,
    local_rows,
    reference,
    reference_case,
    start_values,
    train,
)
from engine.verify.plans import SWITCHES, PlanList, cover
from engine.verify.subject import TINY
from models.decoder import DecoderConfig

__all__ = [
    "BF16_ARITHMETIC",
    "FP32_REORDERED_SUM",
    "LAYOUTS",
    "NOISE_ALPHA",
    "Case",
    "Comparison",
    "batch",
    "build_case",
    "checkpoint_config",
    "compare",
    "forward",
    "local_rows",
    "model_config",
    "pairwise",
    "reference",
    "reference_case",
    "run_case",
    "start_values",
    "train",
]


def model_config(case: Case) -> DecoderConfig:
    return TINY.sizes(case)


def compare(model: nn.Module, loss: float, case: Case) -> Comparison:
    """Compare every gradient with the reference's; one that is missing or zero is a failure."""
    result = parity.compare(model, loss, case)
    assert not result.problems, "; ".join(result.problems)
    return result


def run_case(rank: int, world_size: int, case: Case, device_type: str = "cpu") -> Comparison:
    """Train one step on one rank and compare; called on every rank."""
    model, dims = build_case(case, device_type=device_type)
    return compare(model, train(model, dims, case), case)


LAYOUTS = [
    Case(),
    Case(shard=2),
    Case(shard=4),
    Case(replicate=2),
    Case(replicate=2, shard=2),
    Case(tp=2),
    Case(tp=2, sequence=False),
    Case(tp=4),
    Case(shard=2, tp=2),
    Case(shard=2, tp=2, sequence=False),
    Case(replicate=2, tp=2),
]
"""Every way to divide up to four ranks."""

MIXED = [
    Case(shard=2),
    Case(replicate=2),
    Case(tp=2),
    Case(tp=2, sequence=False),
    Case(shard=2, tp=2),
    Case(replicate=2, tp=2, sequence=False),
    Case(replicate=2, shard=2),
    Case(cp=2),
    Case(cp=2, context="ring"),
    Case(cp=2, context="ulysses"),
]
"""Layouts in which every two switches meet."""


def pairwise() -> list[Case]:
    """Return few cases in which every two settings of two features meet."""
    found = PlanList()
    cover(found, MIXED, SWITCHES, lambda case: None, together=2)
    return found.cases
