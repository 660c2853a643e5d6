"""One optimizer update: counts, microbatches, clipping, step. When to do what is in `loop.py`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Batch
from engine.data.loader import FILLER, DataloaderConfig, Dealing
from engine.health import NonFinitePolicy
from engine.neftune import EmbeddingNoise
from engine.objectives import Objective, combine
from engine.objectives import SequenceSum as SumOfSequence
from engine.optim import decides_on_device, update_where
from engine.stalls import start_reading
from parallelisms.collectives import SequenceSum, sum_over
from parallelisms.context import split_tokens
from parallelisms.gradients import clip_factor, gradient_norm, scale_gradients
from parallelisms.mesh import ParallelDims

Reference = Callable[[Batch, SumOfSequence], Batch]
"""Gives this rank's part of a microbatch the log-probabilities of a reference model."""

PER_TOKEN = ("tokens_BT", "labels_BT", "positions_BT", "documents_BT")
"""What of a batch has a value for each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The work of a run: data, batch, length, precision."""

    dataset: str = "python_stdlib"
    """Name of the data source; README, section Data, lists them."""

    dataset_path: str | None = None
    """File or folder of the data, where the source needs one; JSON lines in place of the built-in
    chats or pairs."""

    local_batch_size: int = 8
    """Most rows of one microbatch on one data-parallel rank; fewer where the ranks share those of
    a step more evenly so. 1 where `data.batch_tokens` says how many rows that is."""

    global_batch_size: int = -1
    """Rows of one optimizer step over all ranks; -1 means one microbatch on each rank. Ranks that
    cannot share them evenly are given filler rows, which train nothing."""

    seq_len: int = 2048
    """Tokens of one row."""

    max_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    neftune_noise_alpha: float = 0.0
    """Uniform noise added to token embeddings in training: its largest value times the root of
    L x D, for a document of L tokens and D channels (NEFTune, arXiv:2310.05914, 5 to 15); 0 adds
    none."""

    steps: int = 10000
    """Optimizer steps of the run."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Type of the stored (master) parameters and so of gradients and optimizer state."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters during compute."""

    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over ranks."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where the gradient norm is not finite: stop the run with what was saved intact,
    or leave weights and optimizer untouched by that step and go on."""

    gc_freq: int = 50
    """Steps between garbage collections; automatic collection is off, so that ranks do not stall
    each other at different moments."""

    gc_debug: bool = False
    """Collect after every step and say what was found."""

    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    """Workers that read training rows."""

    def __post_init__(self) -> None:
        for key in ("local_batch_size", "seq_len", "steps", "gc_freq"):
            if getattr(self, key) < 1:
                raise ValueError(f"training.{key} = {getattr(self, key)}; give at least 1")
        if self.global_batch_size != -1 and self.global_batch_size < 1:
            raise ValueError(
                f"training.global_batch_size = {self.global_batch_size}; give a number of rows, "
                "best a multiple of training.local_batch_size x data-parallel ranks, or -1"
            )
        if not self.max_norm > 0:
            raise ValueError(
                f"training.max_norm = {self.max_norm}; give a positive norm, such as 1.0, or inf "
                "for no clipping"
            )
        if not 0.0 <= self.neftune_noise_alpha < math.inf:
            raise ValueError(
                f"training.neftune_noise_alpha = {self.neftune_noise_alpha}; give a positive "
                "number, such as 5.0, or 0 for no noise"
            )

    def parameters_on(self, device: torch.device) -> torch.device:
        """Return where parameters lie when `device` computes."""
        return torch.device("cpu") if self.enable_cpu_offload else device

    def rows_per_step(self, batch_degree: int) -> int:
        """Return the rows of one optimizer step over `batch_degree` data-parallel ranks."""
        one_microbatch_each = self.local_batch_size * batch_degree
        return one_microbatch_each if self.global_batch_size == -1 else self.global_batch_size

    def dealing(self, batch_degree: int) -> Dealing:
        """Return how `batch_degree` data-parallel ranks share the rows of one optimizer step."""
        return Dealing.of(
            local_batch_size=self.local_batch_size,
            global_batch_size=self.rows_per_step(batch_degree),
            batch_degree=batch_degree,
        )

    def even_degrees(self) -> list[int]:
        """Return the numbers of data-parallel ranks that share a step's rows without fillers."""
        rows = self.global_batch_size
        return [n for n in range(1, rows + 1) if self.dealing(n).filler_share == 0]


@dataclass(kw_only=True, slots=True)
class Trainer:
    """What one update needs; built once by `build.py`."""

    model: nn.Module
    optimizer: Optimizer
    objective: Objective
    batches: Iterator[Batch]
    nonfinite: NonFinitePolicy
    dims: ParallelDims
    device: torch.device
    rows_per_step: int
    """Rows, or batches of them, that one update takes from the data, over all ranks."""

    microbatches: int
    """Forward passes of one update on each data-parallel rank."""

    max_norm: float
    source_names: tuple[str, ...] = ("",)
    """What `Batch.sources_B` counts in."""

    reference: Reference | None = None
    """Asked for each microbatch; None where the objective needs none, or the rows bring its
    answers."""

    noise: EmbeddingNoise | None = None
    """Draws what is added to the embeddings of each microbatch; None adds nothing."""

    watched: Callable[[int], AbstractContextManager[object]] = nullcontext
    """Given the step's number, entered for what the step does once its rows are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """What one update read of one source; global, equal on all ranks."""

    loss: float | None
    """None where no token of it has a label."""

    tokens: int
    """Tokens that the model read, padding left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one update did; every value is global, equal on all ranks."""

    loss: float
    grad_norm: float
    """Before clipping."""

    updated: bool
    """False where the step was skipped because its gradients were not finite."""

    rows: int
    """Rows that the step read, fillers left out."""

    tokens: int
    """Tokens that the model read, padding left out."""

    trained_tokens: int
    """Tokens with a label."""

    squared_document_tokens: int
    """Sum over documents of their squared length, for attention FLOPs."""

    metrics: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """What the objective tells beside the loss; none where nothing counts for it."""

    sources: Mapping[str, SourceReport] = field(default_factory=dict[str, SourceReport])
    """Each source by name where there are several; their tokens add up to `tokens`."""


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward, beside the tokens, for `batch`."""
    inputs = {"positions_BT": batch.positions_BT, "labels_BT": batch.labels_BT}
    if batch.one_document_per_row:
        return inputs
    return {
        **inputs,
        "documents_BT": batch.documents_BT,
        "document_offsets": batch.document_offsets,
        "longest_document_tokens": batch.longest_document_tokens,
    }


def local_tokens(batch: Batch, dims: ParallelDims) -> Batch:
    """Return the batch with only this rank's tokens of each row; what is counted stays whole."""
    tensors = {name: getattr(batch, name) for name in PER_TOKEN}
    parts: dict[str, Any] = dict(split_tokens(tensors, dims))
    return replace(batch, **parts)


def embedding_noise(
    whole: Batch, noise: EmbeddingNoise | None, dims: ParallelDims
) -> dict[str, Tensor]:
    """Return the keyword argument that adds noise to this rank's tokens of whole rows, if any."""
    if noise is None:
        return {}
    drawn_BTD = noise(
        whole.documents_BT,
        document_offsets=whole.document_offsets,
        rows_B=whole.rows_B,
        dims=dims,
    )
    return {"embedding_noise_BTD": drawn_BTD}


def by_source(value_B: Tensor, sources_B: Tensor, num_sources: int) -> Tensor:
    """Add up a value of each row over the rows of each source: float64 (num_sources,).

    Nothing waits for the device, and the order of the sums does not vary from run to run.
    """
    assert value_B.shape == sources_B.shape, "an objective gives a value for each row"
    if num_sources == 1:
        return value_B.sum(dtype=torch.float64).unsqueeze(0)
    numbers = torch.arange(num_sources, device=value_B.device)
    is_of_source = numbers.unsqueeze(1) == sources_B
    return torch.where(is_of_source, value_B.double(), 0.0).sum(dim=1)


def added_up(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up each named value over the sources or the rows that it is kept for."""
    return {name: value.sum() for name, value in values.items()}


def ratios(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], metrics: Mapping[str, str]
) -> Tensor:
    """Return each metric's global sum over its global count, (metrics,); NaN where that is 0."""
    found = [sums[name] / counts[count] for name, count in metrics.items()]
    return torch.stack(found) if found else next(iter(sums.values())).new_zeros(0)


def known_ratios(metrics: Mapping[str, str], values: Sequence[float]) -> dict[str, float | None]:
    """Return the metrics by name, none where nothing counts."""
    pairs = zip(metrics, values, strict=True)
    return {name: None if math.isnan(value) else value for name, value in pairs}


def sum_globally(
    parts: Sequence[Mapping[str, Tensor]], dims: ParallelDims, axis: Literal["batch", "loss"]
) -> dict[str, Tensor]:
    """Add up each named vector over `parts` and the ranks of an axis, in float64.

    What was taken from whole rows is added over "batch", from a rank's tokens over "loss".
    """
    names = list(parts[0])
    local = [torch.stack([part[name].double() for part in parts]).sum(dim=0) for name in names]
    total = sum_over(dims, axis, torch.cat(local))
    return dict(zip(names, total.split([len(value) for value in local]), strict=True))


def accumulate_gradients(
    trainer: Trainer, batches: Sequence[Batch], counts: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Run forward and backward over `batches`, the loss divided by the global `counts`.

    Returns the sums of this rank's tokens by source, one dictionary for each microbatch.
    """
    sequence_sum = SequenceSum(trainer.dims)
    parts: list[dict[str, Tensor]] = []
    for whole in batches:
        batch = local_tokens(whole, trainer.dims)
        if trainer.reference is not None:
            batch = trainer.reference(batch, sequence_sum)
        noise = embedding_noise(whole, trainer.noise, trainer.dims)
        logps_BT = trainer.model(batch.tokens_BT, **model_inputs(batch), **noise)
        sums = trainer.objective.sums(logps_BT, batch, sequence_sum)
        combine(added_up(sums), counts, trainer.objective.coefficients).backward()
        parts.append(sums_by_source(sums, batch, len(trainer.source_names)))
    return parts


def sums_by_source(
    values: Mapping[str, Tensor], batch: Batch, num_sources: int
) -> dict[str, Tensor]:
    """Add up each named value of each row of `batch` over the rows of each source."""
    return {
        name: by_source(value_B.detach(), batch.sources_B, num_sources)
        for name, value_B in values.items()
    }


def measure(batch: Batch, objective: Objective, num_sources: int) -> dict[str, Tensor]:
    """Count by source what whole rows hold: what the objective divides by, and what is reported.

    The squared lengths of documents are one number for all sources.
    """
    rows = {
        **objective.counts(batch),
        "rows": batch.rows_B != FILLER,
        "tokens": (batch.documents_BT != PADDING_DOCUMENT).sum(dim=1),
        "trained_tokens": (batch.labels_BT != IGNORED_LABEL).sum(dim=1),
    }
    # Written by the device: copied to it with torch.tensor, the host would wait.
    device = batch.tokens_BT.device
    squared = torch.full((1,), batch.squared_document_tokens, device=device)
    return {**sums_by_source(rows, batch, num_sources), "squared_document_tokens": squared}


def train_step(trainer: Trainer, step: int) -> StepReport:
    """Run optimizer update `step` over the next microbatches. Every rank must call this."""
    batches = [next(trainer.batches).to(trainer.device) for _ in range(trainer.microbatches)]
    with trainer.watched(step):
        return _update(trainer, step, batches)


def _update(trainer: Trainer, step: int, batches: Sequence[Batch]) -> StepReport:
    objective, dims, names = trainer.objective, trainer.dims, trainer.source_names
    measured = [measure(batch, objective, len(names)) for batch in batches]
    counts = sum_globally(measured, dims, "batch")
    totals = added_up(counts)
    sums = sum_globally(accumulate_gradients(trainer, batches, totals), dims, "loss")

    norm = gradient_norm(trainer.model.parameters())
    factor = clip_factor(norm, trainer.max_norm)
    loss = combine(added_up(sums), totals, objective.coefficients)
    told = {
        "loss": loss.unsqueeze(0),
        "grad_norm": norm.double().unsqueeze(0),
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained_tokens"],
        "squared_document_tokens": counts["squared_document_tokens"],
        "losses": combine(sums, counts, objective.coefficients),
        "metrics": ratios(added_up(sums), totals, objective.metrics),
    }
    # The one wait of a step, for these values alone, while the update is queued behind them. All
    # are global: every rank takes one branch.
    read = start_reading(torch.cat(list(told.values())))
    if decided := decides_on_device(trainer.optimizer, trainer.device):
        update_where(trainer.optimizer, loss.isfinite() & norm.isfinite(), factor)
    values = iter(read())
    found = {name: [next(values) for _ in range(len(value))] for name, value in told.items()}
    (loss,), (norm,) = found["loss"], found["grad_norm"]
    updated = trainer.nonfinite.allows_update(
        step, loss=loss, grad_norm=norm, named_parameters=trainer.model.named_parameters
    )
    if updated and not decided:
        scale_gradients(trainer.model.parameters(), factor)
        trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return StepReport(
        loss=loss,
        grad_norm=norm,
        updated=updated,
        rows=int(sum(found["rows"])),
        tokens=int(sum(found["tokens"])),
        trained_tokens=int(sum(found["trained_tokens"])),
        squared_document_tokens=int(found["squared_document_tokens"][0]),
        metrics=known_ratios(objective.metrics, found["metrics"]),
        sources=_reports_of_sources(names, found),
    )


def _reports_of_sources(
    names: Sequence[str], found: Mapping[str, list[float]]
) -> dict[str, SourceReport]:
    if len(names) == 1:
        return {}
    columns = zip(names, found["losses"], found["tokens"], found["trained_tokens"], strict=True)
    return {
        name: SourceReport(loss=loss if trained else None, tokens=int(tokens))
        for name, loss, tokens, trained in columns
    }
