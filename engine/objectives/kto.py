"""Kahneman-Tversky optimisation: single answers, each labelled as wanted or not."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.data.batch import Batch
from engine.objectives import Objective, ObjectiveConfig, SequenceSum
from engine.objectives._answers import answers_of, count_tokens_BP2, reference_logps_BP2, shared


class KTO:
    """One term, `answers`, counted in answers.

    With r the log-ratio of policy and reference of an answer and z its reference point, the loss
    is w (1 - sigmoid(beta (r - z))) for a wanted answer and w (1 - sigmoid(beta (z - r))) for
    another, w being the weight of its kind. Rewards are beta r; an answer counts as right where r
    lies on the wanted side of z.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.

    z stands for the divergence of policy and reference. As in the paper (section 4.1) it is the
    mean log-ratio of answers to other prompts, at least 0 and without gradient, shared by the
    answers estimated together. The paper takes a microbatch for that, whose content depends on
    ranks and accumulation; here it is the row, which every plan packs alike. Rows of few answers
    (`data.packing` "none" has one) make it noisy, as small microbatches do there.
    """

    uses_reference = True
    coefficients: Mapping[str, float] = {"answers": 1.0}
    metrics: Mapping[str, str] = {
        "rewards/chosen": "desirable",
        "rewards/rejected": "undesirable",
        "rewards/accuracies": "answers",
        "logps/chosen": "desirable",
        "logps/rejected": "undesirable",
        "nll": "nll",
        "kl": "answers",
    }

    def __init__(self, config: ObjectiveConfig) -> None:
        self._beta = config.beta_in_force
        self._weights = config.desirable_weight, config.undesirable_weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the answers of each row, of each kind, and the tokens of the wanted ones."""
        assert batch.desirable_BP is not None, "the rows are of labelled answers"
        is_wanted_BP = batch.desirable_BP == 1
        tokens_BP = count_tokens_BP2(batch)[..., 0]
        return {
            "answers": (batch.desirable_BP != 0).sum(dim=1),
            "desirable": is_wanted_BP.sum(dim=1),
            "undesirable": (batch.desirable_BP == -1).sum(dim=1),
            "nll": torch.where(is_wanted_BP, tokens_BP, 0).sum(dim=1),
        }

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        """Add up the loss of each row's answers, and the metrics."""
        answers = answers_of(logps_BT, batch, sequence_sum)
        ratio_BP, other_BP = (answers.logps_BP2 - reference_logps_BP2(batch)).unbind(-1)
        num_answers_B = answers.is_there_BP.sum(dim=1).clamp(min=1)
        point_B = (answers.sum_B(other_BP.detach()) / num_answers_B).clamp(min=0.0)
        side_BP = answers.desirable_BP
        gain_BP = side_BP * (ratio_BP - point_B.unsqueeze(1))
        weight_BP = torch.where(side_BP == 1, *self._weights)
        loss_BP = weight_BP * torch.sigmoid(-self._beta * gain_BP)
        rewards_BP, logps_BP = self._beta * ratio_BP.detach(), answers.logps_BP2[..., 0].detach()
        wanted_BP, unwanted_BP = side_BP == 1, side_BP == -1
        found = {
            "answers": answers.sum_B(loss_BP),
            "rewards/chosen": answers.sum_B(rewards_BP, wanted_BP),
            "rewards/rejected": answers.sum_B(rewards_BP, unwanted_BP),
            "rewards/accuracies": answers.sum_B((gain_BP > 0).float()),
            "logps/chosen": answers.sum_B(logps_BP, wanted_BP),
            "logps/rejected": answers.sum_B(logps_BP, unwanted_BP),
            "nll": answers.sum_B(-logps_BP, wanted_BP),
            "kl": answers.sum_B(point_B.unsqueeze(1).expand_as(rewards_BP)),
        }
        return shared(found, sequence_sum)


def build(config: ObjectiveConfig) -> Objective:
    """Return the objective that the section describes."""
    return KTO(config)
