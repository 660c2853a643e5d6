"""What training minimises: a weighted sum of ratios, each divided by its own global count.

An objective counts before the forward pass and sums after it, so the step can add the counts of
all microbatches and ranks with one all-reduce and divide once. That makes the loss independent
of accumulation, packing and uneven ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Protocol

from torch import Tensor

from engine.data.batch import Batch

PAIRED = frozenset({"dpo", "orpo", "simpo"})
UNPAIRED = frozenset({"kto"})
WITH_REFERENCE = frozenset({"dpo", "kto"})
READERS: Mapping[str, frozenset[str]] = {
    "beta": PAIRED | UNPAIRED,
    "loss": frozenset({"dpo"}),
    "label_smoothing": frozenset({"dpo"}),
    "nll_weight": frozenset({"dpo", "simpo"}),
    "gamma": frozenset({"simpo"}),
    "desirable_weight": UNPAIRED,
    "undesirable_weight": UNPAIRED,
    "reference": WITH_REFERENCE,
    "reference_path": WITH_REFERENCE,
}
"""Key of the section -> our objectives that read it; a module of one's own may read any."""

USUAL_BETA: Mapping[str, float] = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What training minimises."""

    name: str = "pretrain"
    """Name of a file in engine/objectives (pretrain, dpo, orpo, simpo, kto), or the dotted path of
    a module of one's own; its function `build`, given this section, returns the objective."""

    beta: float | None = None
    """Scale of the rewards of dpo, simpo and kto, weight of the odds ratio of orpo; none takes 0.1,
    for simpo 2.0."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Loss of dpo as a function of the margin: DPO's, IPO's or SLiC's."""

    label_smoothing: float = 0.0
    """Probability with which dpo's sigmoid loss takes a pair to be labelled the wrong way round."""

    nll_weight: float = 0.0
    """Weight of the mean negative log-probability of the chosen answers' tokens, added to dpo and
    simpo; 0 adds none."""

    gamma: float = 1.0
    """Margin by which simpo wants the reward of the chosen answer to be higher."""

    desirable_weight: float = 1.0
    """Weight of the answers that kto has labelled as wanted."""

    undesirable_weight: float = 1.0
    """Weight of those that are not."""

    reference: Literal["auto", "online", "adapters_off", "precomputed"] = "auto"
    """Where dpo and kto have the reference's log-probabilities from. online: a frozen second model
    on the plan of the first, kept in `training.mixed_precision_param` and gathered a block at a
    time, reads every batch. adapters_off: the model that is trained reads it without its adapters.
    precomputed: a file in the cache folder, which a second model writes once before training. auto:
    adapters_off where new adapters are trained without a reference_path, else online."""

    reference_path: str = ""
    """Hugging Face folder, checkpoint step or folder of steps with the reference's weights; empty
    takes what the run starts from."""

    def __post_init__(self) -> None:
        for key, readers in READERS.items():
            value = getattr(self, key)
            if self.name in readers or self.name not in {"pretrain", *PAIRED, *UNPAIRED}:
                continue
            if value != next(one.default for one in fields(self) if one.name == key):
                raise ValueError(
                    f"objective.{key} = {value!r} has no meaning with objective.name = "
                    f"{self.name!r}; remove it, or use one of {', '.join(sorted(readers))}"
                )
        if self.beta is not None and not 0.0 < self.beta < math.inf:
            raise ValueError(f"objective.beta = {self.beta}; give a number above 0, such as 0.1")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"objective.label_smoothing = {self.label_smoothing}; give a probability from 0 to "
                "below 0.5, such as 0.1"
            )
        if self.reference == "adapters_off" and self.reference_path:
            raise ValueError(
                f"objective.reference_path = {self.reference_path!r} has no meaning with "
                "objective.reference = 'adapters_off', which compares with the base of the "
                "adapters; leave it out, or set objective.reference = 'online' or 'precomputed'"
            )
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"objective.label_smoothing = {self.label_smoothing} has no meaning with "
                f"objective.loss = {self.loss!r}; set it to 0, or objective.loss = 'sigmoid'"
            )
        for key in ("nll_weight", "gamma", "desirable_weight", "undesirable_weight"):
            if not 0.0 <= (value := getattr(self, key)) < math.inf:
                raise ValueError(f"objective.{key} = {value}; give 0 or a positive number")

    @property
    def beta_in_force(self) -> float:
        """`beta`, or the usual value for the objective."""
        return USUAL_BETA.get(self.name, 0.1) if self.beta is None else self.beta


class SequenceSum(Protocol):
    """Adds a per-sequence value over the ranks that share the sequence's tokens; differentiable."""

    num_ranks: int
    """How many ranks share a sequence. Each gets the whole sum."""

    def __call__(self, value_B: Tensor) -> Tensor:
        """Return the sum over these ranks; of any shape, the same on all of them."""
        ...


class Objective(Protocol):
    """A pure function of per-token log-probabilities; `engine/objectives/<name>.py` holds one."""

    coefficients: Mapping[str, float]
    """Weight of each term in the loss; its keys are the names of the terms."""

    metrics: Mapping[str, str]
    """What is reported beside the loss: name of a sum -> name of the count that divides it."""

    uses_reference: bool
    """Whether it reads `Batch.reference_logps_BP2`."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count what each row adds to what is divided by: (B,) on the batch's device."""
        ...

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        """Add up each term and metric over each row of this microbatch; fp32, (B,).

        A batch holds this rank's tokens of its rows, and the results of all ranks are added up. A
        row that trains nothing adds zero. Terms are differentiable.
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
