"""What objectives on pairs share: whole log-probabilities of answers, and what is told of them.

Shapes: B rows, P pairs of a row (2 answers each), T tokens of this rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.batch import IGNORED_LABEL, Batch
from engine.objectives import SequenceSum

PAIR_METRICS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
            *("logps/chosen", "logps/rejected"),
        ),
        "pairs",
    ),
    "nll": "nll",
}
"""Metrics of objectives on pairs, as `Objective.metrics`: means over pairs, and over the tokens of
the chosen answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The answers of a microbatch, whole also where ranks share their tokens."""

    logps_BP2: Tensor
    """Log-probability of each answer, summed over its tokens; differentiable fp32."""

    tokens_BP2: Tensor
    """Tokens of each answer, fp32."""

    desirable_BP: Tensor
    """1 or -1 by what the first answer is, 0 where there is no pair."""

    @property
    def is_there_BP(self) -> Tensor:
        """Which pairs there are."""
        return self.desirable_BP != 0

    def mean_logps_BP2(self) -> Tensor:
        """Return the log-probability of each answer divided by its tokens."""
        return self.logps_BP2 / self.tokens_BP2.clamp(min=1.0)

    def sum_B(self, value_BP: Tensor, where_BP: Tensor | None = None) -> Tensor:
        """Add up a value over the pairs of each row, or over those of `where_BP`."""
        chosen_BP = self.is_there_BP if where_BP is None else where_BP
        return torch.where(chosen_BP, value_BP, 0.0).sum(dim=1, dtype=torch.float32)


def answers_of(logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> Answers:
    """Add up the log-probabilities of each answer over its tokens, and count these.

    `batch` holds this rank's tokens; the sums are over all ranks that share a row.
    """
    assert logps_BT.shape == batch.labels_BT.shape, "the head scores every label position"
    is_of_BTD = _is_of_answer_BTD(batch)
    logps_BD = torch.where(is_of_BTD, logps_BT.unsqueeze(-1), 0.0).sum(dim=1, dtype=torch.float32)
    tokens_BD = is_of_BTD.sum(dim=1).to(torch.float32)
    whole_2BD = sequence_sum(torch.stack([logps_BD, tokens_BD]))
    logps_BP2, tokens_BP2 = whole_2BD.unflatten(-1, (-1, 2))
    assert batch.desirable_BP is not None, "the rows are of pairs"
    return Answers(
        logps_BP2=logps_BP2, tokens_BP2=tokens_BP2.detach(), desirable_BP=batch.desirable_BP
    )


def count_tokens_BP2(batch: Batch) -> Tensor:
    """Count the tokens of each answer of whole rows."""
    return _is_of_answer_BTD(batch).sum(dim=1).unflatten(-1, (-1, 2))


def reference_logps_BP2(batch: Batch) -> Tensor:
    """Return what the reference model gives each answer."""
    found = batch.reference_logps_BP2
    assert found is not None, "the step asks the reference before it asks the objective"
    return found


def count_pairs(batch: Batch) -> dict[str, Tensor]:
    """Count the pairs of each row, and the tokens of their chosen answers."""
    assert batch.desirable_BP is not None, "the rows are of pairs"
    return {
        "pairs": (batch.desirable_BP != 0).sum(dim=1),
        "nll": count_tokens_BP2(batch)[..., 0].sum(dim=1),
    }


def pair_sums(answers: Answers, rewards_BP2: Tensor) -> dict[str, Tensor]:
    """Add up the metrics of `PAIR_METRICS` over the pairs of each row; `nll` has a gradient.

    A pair counts as right where the chosen answer has the higher reward.
    """
    logps_BP2, rewards_BP2 = answers.logps_BP2.detach(), rewards_BP2.detach()
    chosen_BP, rejected_BP = rewards_BP2.unbind(-1)
    found = {
        "rewards/chosen": chosen_BP,
        "rewards/rejected": rejected_BP,
        "rewards/margins": chosen_BP - rejected_BP,
        "rewards/accuracies": (chosen_BP > rejected_BP).float(),
        "logps/chosen": logps_BP2[..., 0],
        "logps/rejected": logps_BP2[..., 1],
        "nll": -answers.logps_BP2[..., 0],
    }
    return {name: answers.sum_B(value_BP) for name, value_BP in found.items()}


def shared(sums: Mapping[str, Tensor], sequence_sum: SequenceSum) -> dict[str, Tensor]:
    """Divide sums of whole values by the ranks that all have them."""
    return {name: value_B / sequence_sum.num_ranks for name, value_B in sums.items()}


def _is_of_answer_BTD(batch: Batch) -> Tensor:
    """Say which label belongs to which document, the 2 P answers in order."""
    assert batch.desirable_BP is not None, "the rows are of pairs"
    num_documents = 2 * batch.desirable_BP.shape[1]
    # Compared, not scattered: sums whose order does not vary from run to run, also on GPUs.
    numbers_D = torch.arange(1, num_documents + 1, device=batch.documents_BT.device)
    is_trained_BT = batch.labels_BT != IGNORED_LABEL
    return (batch.documents_BT.unsqueeze(-1) == numbers_D) & is_trained_BT.unsqueeze(-1)
