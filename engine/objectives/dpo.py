"""Direct preference optimisation, with the losses of DPO, IPO and SLiC on one margin."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from engine.data.batch import Batch
from engine.objectives import Objective, ObjectiveConfig, SequenceSum
from engine.objectives._answers import (
    PAIR_METRICS,
    answers_of,
    count_pairs,
    pair_sums,
    reference_logps_BP2,
    shared,
)


class DPO:
    """One term, `pairs`, counted in pairs; with `nll_weight` also `nll`, in chosen tokens.

    With h the log-ratio of policy and reference of the chosen answer less that of the rejected
    one, each summed over the tokens of the answer, the loss of a pair is

        sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing
                 (Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with e its note on conservative
                 DPO: Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3)
        ipo      (h - 1 / (2 beta))^2, beta being tau there
                 (Azar et al. 2023, arXiv:2310.12036, eq. 17; sums, not means over tokens)
        hinge    max(0, 1 - beta h)
                 (Zhao et al. 2023, arXiv:2305.10425, eq. 4; with the reference as in Liu et al.
                 2024, arXiv:2309.06657, eq. 7)

    Rewards are beta times the log-ratios (arXiv:2305.18290, section 4). The NLL term is that of
    Pang et al. 2024, arXiv:2404.19733, eq. 1, as a mean over all chosen tokens.
    """

    uses_reference = True
    metrics: Mapping[str, str] = PAIR_METRICS

    def __init__(self, config: ObjectiveConfig) -> None:
        self.coefficients: Mapping[str, float] = {"pairs": 1.0}
        if config.nll_weight:
            self.coefficients = {"pairs": 1.0, "nll": config.nll_weight}
        self._beta = config.beta_in_force
        self._smoothing = config.label_smoothing
        losses: dict[str, Callable[[Tensor], Tensor]] = {
            "sigmoid": self._sigmoid,
            "ipo": lambda margin_BP: (margin_BP - 0.5 / self._beta).square(),
            "hinge": lambda margin_BP: relu(1.0 - self._beta * margin_BP),
        }
        self._loss = losses[config.loss]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the pairs of each row and their chosen tokens."""
        return count_pairs(batch)

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        """Add up the loss of each row's pairs, and the metrics."""
        answers = answers_of(logps_BT, batch, sequence_sum)
        ratios_BP2 = answers.logps_BP2 - reference_logps_BP2(batch)
        loss_BP = self._loss(ratios_BP2[..., 0] - ratios_BP2[..., 1])
        told = pair_sums(answers, self._beta * ratios_BP2)
        return shared({"pairs": answers.sum_B(loss_BP), **told}, sequence_sum)

    def _sigmoid(self, margin_BP: Tensor) -> Tensor:
        logits_BP = self._beta * margin_BP
        flipped_BP = -logsigmoid(-logits_BP) if self._smoothing else torch.zeros_like(logits_BP)
        return -(1.0 - self._smoothing) * logsigmoid(logits_BP) + self._smoothing * flipped_BP


def build(config: ObjectiveConfig) -> Objective:
    """Return the objective that the section describes."""
    return DPO(config)
