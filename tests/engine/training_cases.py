"""A tiny run on any number of ranks: the real model, rows, objective and step, without a folder."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Batch, Row
from engine.data.loader import DataloaderConfig, Dealing, train_batches, validation_batches
from engine.data.rows import RowSource
from engine.health import NonFinitePolicy
from engine.neftune import EmbeddingNoise
from engine.objectives import ObjectiveConfig
from engine.objectives.pretrain import build as build_pretrain
from engine.optim import OptimizerConfig, build_optimizer
from engine.step import Trainer
from engine.verify.parity import parallel_config
from parallelisms import ParallelDims
from parallelisms.gradients import clip_factor, gradient_norm, scale_gradients
from tests.parity.cases import NOISE_ALPHA, Case, build_case, model_config

ROWS_PER_STEP = 8
SEQ_LEN = 16
# A large eps: otherwise the first update is the gradient's sign, which rounding may turn.
SMOOTH = OptimizerConfig(lr=1e-2, eps=1e-2)


@dataclass(kw_only=True)
class RaggedRows:
    """Rows of two documents, of which a varying part has labels: some rows have very few.

    With `one_document_per_row` of one document. Some rows end in padding.
    """

    rows_per_epoch: int = 64
    seq_len: int = SEQ_LEN
    vocab_size: int = 64
    tokens_per_epoch: int = 64 * SEQ_LEN
    source_names: tuple[str, ...] = ("ragged",)
    fingerprint: str = "ragged"
    one_document_per_row: bool = False
    batches: None = None

    def attention_cost(self, index: int) -> int:
        return 0 if self.one_document_per_row else (3 + index % 9) ** 2

    def row(self, index: int) -> Row:
        generator = torch.Generator().manual_seed(index)
        length = self.seq_len
        tokens = torch.randint(self.vocab_size, (length,), generator=generator)
        for place in range(1, length):  # one of four tokens follows, so there is much to learn
            tokens[place] = (3 * tokens[place - 1] + tokens[place] % 4) % self.vocab_size
        labels = tokens.roll(-1)
        first = length if self.one_document_per_row else 3 + index % 9
        labels[first - 1] = labels[-1] = IGNORED_LABEL
        labels[: (index * 5) % (length - 1)] = IGNORED_LABEL
        padding = index % 4
        positions = torch.cat([torch.arange(first), torch.arange(length - first)])
        documents = torch.where(torch.arange(length) < first, 1, 2)
        if padding:
            labels[-padding - 1 :] = IGNORED_LABEL
            documents[-padding:] = PADDING_DOCUMENT
            positions[-padding:] = 0
        return Row(
            tokens_T=tokens,
            labels_T=labels,
            positions_T=positions,
            documents_T=documents,
            source=index % len(self.source_names),
        )


def make_trainer(
    case: Case,
    *,
    local_batch_size: int,
    action: str = "stop",
    frozen: tuple[str, ...] = (),
    optimizer: OptimizerConfig = SMOOTH,
    rows: RowSource | None = None,
    per_step: int = ROWS_PER_STEP,
) -> Trainer:
    """Build the trainer of one rank; a step has the same rows and noise on any layout."""
    noise = EmbeddingNoise(
        alpha=NOISE_ALPHA, seed=0, width=model_config(case).hidden_size, dtype=torch.float32
    )
    model, dims = build_case(case, frozen=frozen)
    rows = rows or RaggedRows()
    dealing = Dealing.of(
        local_batch_size=local_batch_size,
        global_batch_size=per_step,
        batch_degree=dims.batch_degree,
    )
    batches = train_batches(
        rows,
        local_batch_size=local_batch_size,
        global_batch_size=per_step,
        batch_rank=dims.batch_rank,
        batch_degree=dims.batch_degree,
        start_row=0,
        dataloader=DataloaderConfig(),
        pad_to_multiple=parallel_config(case).token_multiple,
    )
    return Trainer(
        model=model,
        optimizer=build_optimizer(model.named_parameters(), optimizer),
        objective=build_pretrain(ObjectiveConfig()),
        batches=batches,
        nonfinite=NonFinitePolicy(action, gather=lambda text: [text]),  # pyright: ignore[reportArgumentType]
        dims=dims,
        device=torch.device("cpu"),
        rows_per_step=per_step,
        microbatches=dealing.microbatches,
        max_norm=0.5,
        source_names=rows.source_names,
        noise=noise if case.neftune else None,
    )


def held_out(
    dims: ParallelDims, num_rows: int, *, case: Case | None = None, seq_len: int = SEQ_LEN
) -> Iterator[Batch]:
    """Yield this rank's share of `num_rows` validation rows."""
    return validation_batches(
        RaggedRows(rows_per_epoch=num_rows, seq_len=seq_len),
        local_batch_size=2,
        batch_rank=dims.batch_rank,
        batch_degree=dims.batch_degree,
        dataloader=DataloaderConfig(),
        pad_to_multiple=parallel_config(case or Case()).token_multiple,
    )


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return getattr(tensor, "to_local", lambda: tensor)()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; return what it was."""
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    scale_gradients(parameters, clip_factor(norm, max_norm))
    return norm


def whole_parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Gather every parameter; every rank must call this."""
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in trainer.model.named_parameters()
    }
