"""Next-token prediction: the mean negative log-probability of every token that has a label."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.data.batch import IGNORED_LABEL, Batch
from engine.objectives import Objective, ObjectiveConfig, SequenceSum


class Pretrain:
    """One term, `nll`, counted in trained tokens; its exponential is the perplexity."""

    coefficients: Mapping[str, float] = {"nll": 1.0}
    metrics: Mapping[str, str] = {}
    uses_reference = False

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the labels of each row that are trained."""
        return {"nll": (batch.labels_BT != IGNORED_LABEL).sum(dim=1)}

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        """Add up the negative log-probabilities of each row's trained labels."""
        assert logps_BT.shape == batch.labels_BT.shape, "the head scores every label position"
        trained_BT = batch.labels_BT != IGNORED_LABEL
        return {"nll": -torch.where(trained_BT, logps_BT, 0.0).sum(dim=1, dtype=torch.float32)}


def build(config: ObjectiveConfig) -> Objective:
    """Return the objective; it reads no setting."""
    return Pretrain()
