"""The objective on held-out rows, and nothing else: no gradients, no training state touched."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.data.batch import IGNORED_LABEL, Batch
from engine.data.config import SourceConfig, check_names
from engine.data.loader import DataloaderConfig
from engine.objectives import Objective, combine
from engine.step import (
    Reference,
    added_up,
    known_ratios,
    local_tokens,
    model_inputs,
    ratios,
    sum_globally,
    sums_by_source,
)
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

    sources: list[SourceConfig] = field(default_factory=list[SourceConfig])
    """Held-out sources, `[[validation.sources]]` once for each, in place of validation.dataset; the
    loss of each is written too."""

    local_batch_size: int = 8
    """Rows of one forward pass on one data-parallel rank; 1 where `data.batch_tokens` says how many
    rows that is."""

    seq_len: int = 2048
    """Tokens of one row."""

    freq: int = 10
    """Optimizer steps between two validations."""

    steps: int = -1
    """Forward passes on each rank over each source; -1 is one whole pass over its rows."""

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
        check_names(self.sources, "validation")
        if self.sources and (self.dataset != "python_stdlib" or self.dataset_path is not None):
            raise ValueError(
                f"validation.dataset = {self.dataset!r} with dataset_path = {self.dataset_path!r} "
                "stands beside validation.sources, which names all that is read; make it one of "
                "the sources, or leave it out"
            )


SCORED = "scored tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Result of one pass over the held-out rows; equal on every rank."""

    loss: float
    tokens: int
    """Tokens that were scored."""

    seconds: float

    losses: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """Loss of each source by name where there are several; none where it has no scored token."""

    metrics: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """What the objective tells beside the loss."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[], Iterable[Batch]],
    dims: ParallelDims,
    device: torch.device,
    source_names: Sequence[str] = ("",),
    reference: Reference | None = None,
) -> Validation:
    """Return the loss over all rows of `batches()` as one batch, and that of each source.

    Every rank must call this with the same number of batches. `source_names` are what their
    `sources_B` count in. `reference` is asked for each batch, as in a step of training.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    sequence_sum, num_sources = SequenceSum(dims), len(source_names)
    sums: list[dict[str, Tensor]] = []
    counts: list[dict[str, Tensor]] = []
    for on_host in batches():
        whole = on_host.to(device)
        batch = local_tokens(whole, dims)
        if reference is not None:
            batch = reference(batch, sequence_sum)
        logps_BT = model(batch.tokens_BT, **model_inputs(batch))
        row_sums = objective.sums(logps_BT, batch, sequence_sum)
        sums.append(sums_by_source(row_sums, batch, num_sources))
        row_counts = {**objective.counts(whole), SCORED: scored_tokens(whole)}
        counts.append(sums_by_source(row_counts, whole, num_sources))
    model.train(was_training)
    of_sources = sum_globally(sums, dims, "loss"), sum_globally(counts, dims, "batch")
    total_sums, total_counts = map(added_up, of_sources)
    loss = combine(total_sums, total_counts, objective.coefficients)
    losses = combine(*of_sources, objective.coefficients).tolist()
    scored = of_sources[1][SCORED].tolist()
    told = ratios(total_sums, total_counts, objective.metrics).tolist()
    found = [one if number else None for one, number in zip(losses, scored, strict=True)]
    return Validation(
        loss=float(loss),
        tokens=int(sum(scored)),
        seconds=time.perf_counter() - started,
        losses=dict(zip(source_names, found, strict=True)) if num_sources > 1 else {},
        metrics=known_ratios(objective.metrics, told),
    )


def scored_tokens(batch: Batch) -> Tensor:
    """Count the labels of each row, (B,)."""
    return (batch.labels_BT != IGNORED_LABEL).sum(dim=1)
