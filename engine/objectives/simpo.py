"""Simple preference optimisation: length-normalised rewards, with no reference."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from engine.data.batch import Batch
from engine.objectives import Objective, ObjectiveConfig, SequenceSum
from engine.objectives._answers import PAIR_METRICS, answers_of, count_pairs, pair_sums, shared


class SimPO:
    """One term, `pairs`, counted in pairs; with `nll_weight` also `nll`, in chosen tokens.

    The reward of an answer is beta times the mean log-probability of its tokens; the loss of a
    pair is -log sigmoid(reward of the chosen - reward of the rejected - gamma).
    Source: Meng et al. 2024, arXiv:2405.14734, eq. 4 and 6.
    """

    uses_reference = False
    metrics: Mapping[str, str] = PAIR_METRICS

    def __init__(self, config: ObjectiveConfig) -> None:
        self.coefficients: Mapping[str, float] = {"pairs": 1.0}
        if config.nll_weight:
            self.coefficients = {"pairs": 1.0, "nll": config.nll_weight}
        self._beta, self._gamma = config.beta_in_force, config.gamma

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the pairs of each row and their chosen tokens."""
        return count_pairs(batch)

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        """Add up the loss of each row's pairs, and the metrics."""
        answers = answers_of(logps_BT, batch, sequence_sum)
        rewards_BP2 = self._beta * answers.mean_logps_BP2()
        loss_BP = -logsigmoid(rewards_BP2[..., 0] - rewards_BP2[..., 1] - self._gamma)
        told = pair_sums(answers, rewards_BP2)
        return shared({"pairs": answers.sum_B(loss_BP), **told}, sequence_sum)


def build(config: ObjectiveConfig) -> Objective:
    """Return the objective that the section describes."""
    return SimPO(config)
