"""Odds ratio preference optimisation: fine-tuning on the chosen answers, with no reference."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from engine.data.batch import Batch
from engine.objectives import Objective, ObjectiveConfig, SequenceSum
from engine.objectives._answers import PAIR_METRICS, answers_of, count_pairs, pair_sums, shared

NEAREST_TO_ONE = -1e-7  # a mean log-probability above it counts as this: fp32 has 6e-8 beside 1


def log_one_minus_exp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x below 0; exact near 0 and far from it, as is its gradient.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7.
    """
    is_near = x > -math.log(2.0)
    # Each branch is given numbers at which it is defined: a NaN in the other would reach gradients.
    near = torch.where(is_near, x, -1.0)
    far = torch.where(is_near, -1.0, x)
    return torch.where(is_near, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


class ORPO:
    """Two terms: `nll`, counted in chosen tokens, and beta times `pairs`, counted in pairs.

    `pairs` is -log sigmoid(log odds(chosen) - log odds(rejected)), with odds p / (1 - p) and log p
    the mean log-probability of an answer's tokens. Rewards are beta times log p.
    Source: Hong et al. 2024, arXiv:2403.07691, eq. 3, 4, 6 and 7; beta is lambda there.
    """

    uses_reference = False
    metrics: Mapping[str, str] = {**PAIR_METRICS, "log_odds_ratio": "pairs"}

    def __init__(self, config: ObjectiveConfig) -> None:
        self._beta = config.beta_in_force
        self.coefficients: Mapping[str, float] = {"nll": 1.0, "pairs": self._beta}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the pairs of each row and their chosen tokens."""
        return count_pairs(batch)

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        """Add up both terms over each row's pairs, and the metrics."""
        answers = answers_of(logps_BT, batch, sequence_sum)
        is_there_BP1 = answers.is_there_BP.unsqueeze(-1)
        mean_BP2 = torch.where(is_there_BP1, answers.mean_logps_BP2(), -1.0)
        mean_BP2 = mean_BP2.clamp(max=NEAREST_TO_ONE)
        log_odds_BP2 = mean_BP2 - log_one_minus_exp(mean_BP2)
        ratio_BP = log_odds_BP2[..., 0] - log_odds_BP2[..., 1]
        found = {
            "pairs": answers.sum_B(-logsigmoid(ratio_BP)),
            "log_odds_ratio": answers.sum_B(ratio_BP.detach()),
            **pair_sums(answers, self._beta * mean_BP2),
        }
        return shared(found, sequence_sum)


def build(config: ObjectiveConfig) -> Objective:
    """Return the objective that the section describes."""
    return ORPO(config)
