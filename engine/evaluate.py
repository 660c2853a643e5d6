"""The objective on held-out rows, and nothing else: no gradients, no training state touched."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.data.batch import Batch
from engine.data.loader import DataloaderConfig
from engine.objectives import Objective, combine
from engine.step import local_tokens, model_inputs, sum_globally
from parallelisms.collectives import SequenceSum
from parallelisms.mesh import ParallelDims


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Held-out loss, during training or alone."""

    enable: bool = False
    """Validate every `freq` steps and after the last one."""

    only: bool = False
    """Load the newest checkpoint (or the initial weights), validate once and leave."""

    dataset: str = "python_stdlib"
    """Name of the data source; its validation part is read."""

    dataset_path: str | None = None
    """File or folder of the data, where the source needs one."""

    local_batch_size: int = 8
    """Rows of one forward pass on one data-parallel rank; 1 where `data.batch_tokens` says how many
    rows that is."""

    seq_len: int = 2048
    """Tokens of one row."""

    freq: int = 10
    """Optimizer steps between two validations."""

    steps: int = -1
    """Forward passes on each rank; -1 is one whole pass over the validation rows."""

    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    """Workers that read validation rows."""

    def __post_init__(self) -> None:
        for key in ("local_batch_size", "seq_len", "freq"):
            if getattr(self, key) < 1:
                raise ValueError(f"validation.{key} = {getattr(self, key)}; give at least 1")
        if self.steps != -1 and self.steps < 1:
            raise ValueError(
                f"validation.steps = {self.steps}; give a number of forward passes, or -1 for one "
                "whole pass"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Result of one pass over the held-out rows; equal on every rank."""

    loss: float
    tokens: int
    """Tokens that were scored."""

    seconds: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[], Iterable[Batch]],
    dims: ParallelDims,
    device: torch.device,
) -> Validation:
    """Return the token-weighted loss over all rows of `batches()`.

    Every rank must call this with the same number of batches.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    sequence_sum = SequenceSum(dims)
    sums: list[dict[str, Tensor]] = []
    counts: list[dict[str, Tensor]] = []
    for on_host in batches():
        whole = on_host.to(device)
        batch = local_tokens(whole, dims)
        logps_BT = model(batch.tokens_BT, **model_inputs(batch))
        sums.append(objective.sums(logps_BT, batch, sequence_sum))
        counts.append(objective.counts(whole))
    model.train(was_training)
    total_counts = sum_globally(counts, dims, "batch")
    loss = combine(sum_globally(sums, dims, "loss"), total_counts, objective.coefficients)
    seconds = time.perf_counter() - started
    return Validation(loss=float(loss), tokens=int(sum(total_counts.values())), seconds=seconds)
