"""What training minimises: a weighted sum of ratios, each divided by its own global count.

An objective counts before the forward pass and sums after it, so the step can add the counts of
all microbatches and ranks with one all-reduce and divide once. That makes the loss independent
of accumulation, packing and uneven ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.data.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What training minimises."""

    name: str = "pretrain"
    """Name of a file in engine/objectives, or the dotted path of a module of one's own; its
    function `build` returns the objective."""


class SequenceSum(Protocol):
    """Adds a per-sequence value over the ranks that share the sequence's tokens; differentiable."""

    num_ranks: int
    """How many ranks share a sequence. Each gets the whole sum."""

    def __call__(self, value_B: Tensor) -> Tensor:
        """Return the sum over these ranks."""
        ...


class Objective(Protocol):
    """A pure function of per-token log-probabilities; `engine/objectives/<name>.py` holds one."""

    coefficients: Mapping[str, float]
    """Weight of each term in the loss; its keys are the names of the terms."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count what each row adds to what a term is divided by: (B,) on the batch's device."""
        ...

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        """Add up each term over each row of this microbatch; differentiable fp32, (B,).

        A batch holds this rank's tokens of its rows, and the results of all ranks are added up. A
        row that trains nothing adds zero.
        An objective that is nonlinear in a sequence's total takes `sequence_sum` of it before the
        nonlinearity; as each rank then has the whole value, it divides it by
        `sequence_sum.num_ranks`.
        """
        ...


def combine(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], coefficients: Mapping[str, float]
) -> Tensor:
    """Return the loss: each term's sum over its global count, weighted.

    A term whose global count is zero contributes nothing. Of sums and counts by source it returns
    the loss of each source.
    """
    terms = [
        weight * sums[name] / counts[name].clamp(min=1).to(sums[name].dtype)
        for name, weight in coefficients.items()
    ]
    return sum(terms[1:], start=terms[0])
