"""Objectives of a user's own module, one for each way to go wrong; named by their dotted path."""

import math
import os

from engine.objectives import pretrain

POISONED_FORWARD = 4
"""Number of the forward pass, counted from 1, whose loss is NaN."""


class Poisoned(pretrain.Pretrain):
    """Next-token prediction that is not a number once."""

    def __init__(self) -> None:
        self.num_forwards = 0

    def sums(self, logps_BT, batch, sequence_sum):
        self.num_forwards += 1
        sums = super().sums(logps_BT, batch, sequence_sum)
        return {"nll": sums["nll"] * (math.nan if self.num_forwards == POISONED_FORWARD else 1.0)}


if os.environ.get("RANK", "0") != "1":  # so that rank 1 alone finds nothing to build

    def build(config):
        return Poisoned()
