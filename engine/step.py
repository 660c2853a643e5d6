"""One optimizer update: counts, microbatches, clipping, step. When to do what is in `loop.py`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Batch
from engine.data.loader import FILLER, DataloaderConfig
from engine.health import NonFinitePolicy
from engine.objectives import Objective, combine
from parallelisms.collectives import SequenceSum, clip_gradients, sum_over
from parallelisms.context import split_tokens
from parallelisms.mesh import ParallelDims

PER_TOKEN = ("tokens_BT", "labels_BT", "positions_BT", "documents_BT")
"""What of a batch has a value for each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The work of a run: data, batch, length, precision."""

    dataset: str = "python_stdlib"
    """Name of the data source; README, section Data, lists them."""

    dataset_path: str | None = None
    """File or folder of the data, where the source needs one."""

    local_batch_size: int = 8
    """Rows of one microbatch on one data-parallel rank; 1 where `data.batch_tokens` says how many
    rows that is."""

    global_batch_size: int = -1
    """Rows of one optimizer step over all ranks; -1 means one microbatch on each rank."""

    seq_len: int = 2048
    """Tokens of one row."""

    max_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

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
                f"training.global_batch_size = {self.global_batch_size}; give a multiple of "
                "training.local_batch_size x data-parallel ranks, or -1"
            )
        if not self.max_norm > 0:
            raise ValueError(
                f"training.max_norm = {self.max_norm}; give a positive norm, such as 1.0, or inf "
                "for no clipping"
            )

    def rows_per_step(self, batch_degree: int) -> int:
        """Return the rows of one optimizer step over `batch_degree` data-parallel ranks."""
        per_microbatch = self.local_batch_size * batch_degree
        if self.global_batch_size == -1:
            return per_microbatch
        if self.global_batch_size % per_microbatch:
            raise ValueError(
                f"training.global_batch_size = {self.global_batch_size} is not a multiple of "
                f"training.local_batch_size x data-parallel ranks = {self.local_batch_size} x "
                f"{batch_degree} = {per_microbatch}; change one of them"
            )
        return self.global_batch_size


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
    watched: Callable[[int], AbstractContextManager[object]] = nullcontext
    """Given the step's number, entered for what the step does once its rows are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one update did; every value is global, equal on all ranks."""

    loss: float
    grad_norm: float
    """Before clipping."""

    updated: bool
    """False where the step was skipped because its gradients were not finite."""

    rows: int
    tokens: int
    """Tokens that the model read, padding left out."""

    trained_tokens: int
    """Tokens with a label."""

    squared_document_tokens: int
    """Sum over documents of their squared length, for attention FLOPs."""


def model_inputs(batch: Batch) -> dict[str, Tensor | None]:
    """Return the keyword arguments of a model's forward, beside the tokens, for `batch`."""
    return {
        "positions_BT": batch.positions_BT,
        "documents_BT": None if batch.one_document_per_row else batch.documents_BT,
        "document_offsets": None if batch.one_document_per_row else batch.document_offsets,
        "labels_BT": batch.labels_BT,
    }


def local_tokens(batch: Batch, dims: ParallelDims) -> Batch:
    """Return the batch with only this rank's tokens of each row; what is counted stays whole."""
    tensors = {name: getattr(batch, name) for name in PER_TOKEN}
    parts: dict[str, Any] = dict(split_tokens(tensors, dims))
    return replace(batch, **parts)


def sum_globally(
    parts: Sequence[Mapping[str, Tensor]], dims: ParallelDims, axis: Literal["batch", "loss"]
) -> dict[str, Tensor]:
    """Add up each named value over `parts` and the ranks of an axis, in float64.

    What was taken from whole rows is added over "batch", from a rank's tokens over "loss".
    """
    names = list(parts[0])
    local = [torch.stack([part[name].double() for part in parts]).sum() for name in names]
    total = sum_over(dims, axis, torch.stack(local))
    return dict(zip(names, total.unbind(), strict=True))


def accumulate_gradients(
    trainer: Trainer, batches: Sequence[Batch], counts: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Run forward and backward over `batches`; return the detached sums of this rank's tokens."""
    sequence_sum = SequenceSum(trainer.dims)
    parts: list[dict[str, Tensor]] = []
    for whole in batches:
        batch = local_tokens(whole, trainer.dims)
        logps_BT = trainer.model(batch.tokens_BT, **model_inputs(batch))
        sums = trainer.objective.sums(logps_BT, batch, sequence_sum)
        combine(sums, counts, trainer.objective.coefficients).backward()
        parts.append({name: value.detach() for name, value in sums.items()})
    return parts


def measure(batch: Batch, objective: Objective) -> dict[str, Tensor]:
    """Count what whole rows hold: what the objective divides by, and what is reported."""
    squared = batch.squared_document_tokens
    return {
        **objective.counts(batch),
        "rows": (batch.rows_B != FILLER).sum(),
        "tokens": (batch.documents_BT != PADDING_DOCUMENT).sum(),
        "trained_tokens": (batch.labels_BT != IGNORED_LABEL).sum(),
        # Written by the device: copied to it with torch.tensor, the host would wait.
        "squared_document_tokens": torch.full((), squared, device=batch.tokens_BT.device),
    }


def train_step(trainer: Trainer, step: int) -> StepReport:
    """Run optimizer update `step` over the next microbatches. Every rank must call this."""
    batches = [next(trainer.batches).to(trainer.device) for _ in range(trainer.microbatches)]
    with trainer.watched(step):
        return _update(trainer, step, batches)


def _update(trainer: Trainer, step: int, batches: Sequence[Batch]) -> StepReport:
    objective, dims = trainer.objective, trainer.dims
    counts = sum_globally([measure(batch, objective) for batch in batches], dims, "batch")
    sums = sum_globally(accumulate_gradients(trainer, batches, counts), dims, "loss")

    norm = clip_gradients(trainer.model.parameters(), trainer.max_norm)
    loss = combine(sums, counts, objective.coefficients)
    # The one host synchronisation of a step; `stalls.py` tells of any other. All values are
    # global: every rank takes one branch.
    values = torch.stack([loss, norm.double(), *counts.values()]).tolist()
    amounts = dict(zip(counts, values[2:], strict=True))
    updated = trainer.nonfinite.allows_update(
        step, loss=values[0], grad_norm=values[1], named_parameters=trainer.model.named_parameters
    )
    if updated:
        trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return StepReport(
        loss=values[0],
        grad_norm=values[1],
        updated=updated,
        rows=int(amounts["rows"]),
        tokens=int(amounts["tokens"]),
        trained_tokens=int(amounts["trained_tokens"]),
        squared_document_tokens=int(amounts["squared_document_tokens"]),
    )
