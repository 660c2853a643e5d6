"""Training on batches of unequal shape: the same update as on padded rows, and few graphs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.rows import TokenRows
from engine.loop import fit
from engine.stalls import graphs_compiled
from engine.step import StepReport, train_step
from tests.engine.data.length_cases import budget_rows, log_normal_lengths
from tests.engine.tiny_run import packed_documents, rows_of_run, tiny_config, tiny_folder
from tests.engine.training_cases import ROWS_PER_STEP, make_trainer
from tests.parity.cases import Case
from tests.ranks import RankPool

FP32_REORDERED_SUM = 1e-5  # another order of the same sums
SEQ_LEN, BATCH_TOKENS = 40, 64

Outcome = tuple[StepReport, dict[str, Tensor]]


def rows_of_many_lengths() -> TokenRows:
    """Return batches of 1 row of 40 tokens up to 16 rows of 4."""
    lengths = log_normal_lengths(300, median=14, longest=60)
    return budget_rows(lengths, seq_len=SEQ_LEN, batch_tokens=BATCH_TOKENS, pad_to_multiple=4)


@dataclass(kw_only=True)
class PaddedRows:
    """The rows of some batches, all padded to one length, as packing "none" has them."""

    rows: TokenRows
    num_batches: int
    seq_len: int = SEQ_LEN
    vocab_size: int = 64
    source_names: tuple[str, ...] = ("padded",)
    fingerprint: str = "padded"
    one_document_per_row: bool = True
    batches: None = None

    def __post_init__(self) -> None:
        assert self.rows.batches is not None
        batches = map(self.rows.batches.rows, range(self.num_batches))
        self.numbers = [number for batch in batches for number in batch]
        self.rows_per_epoch = len(self.numbers)
        self.tokens_per_epoch = self.rows.tokens_per_epoch

    def attention_cost(self, index: int) -> int:
        return 0

    def row(self, index: int) -> Row:
        row = self.rows.row(self.numbers[index])
        padding = (0, self.seq_len - row.tokens_T.numel())
        return Row(
            tokens_T=F.pad(row.tokens_T, padding),
            labels_T=F.pad(row.labels_T, padding, value=IGNORED_LABEL),
            positions_T=F.pad(row.positions_T, padding),
            documents_T=F.pad(row.documents_T, padding, value=PADDING_DOCUMENT),
        )


def take_a_step(rank: int, world_size: int, case: Case, is_padded: bool) -> Outcome:
    """Return what a step over the first eight batches reports, and every clipped gradient."""
    rows = rows_of_many_lengths()
    if is_padded:
        padded = PaddedRows(rows=rows, num_batches=ROWS_PER_STEP)
        num_rows = padded.rows_per_epoch
        trainer = make_trainer(case, local_batch_size=num_rows, rows=padded, per_step=num_rows)
    else:
        trainer = make_trainer(case, local_batch_size=1, rows=rows)
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in trainer.model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            whole = getattr(gradient, "full_tensor", lambda gradient=gradient: gradient)()
            gradients[name] = whole.detach().clone()

    trainer.optimizer.register_step_pre_hook(keep)
    return train_step(trainer, 1), gradients


@pytest.mark.parametrize(
    "case",
    [
        *(Case(), Case(shard=2), Case(tp=2), Case(cp=2, context="ring")),
        Case(shard=2, checkpointing="full"),
    ],
    ids=str,
)
def test_batches_of_unequal_shape_give_the_loss_and_gradients_of_padded_rows(
    ranks: RankPool, case: Case
) -> None:
    ((expected, gradients),) = ranks(1, take_a_step, Case(), True)
    assert expected.rows > ROWS_PER_STEP
    for report, found in ranks(case.world_size, take_a_step, case, False):
        assert report.loss == pytest.approx(expected.loss, rel=FP32_REORDERED_SUM)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=FP32_REORDERED_SUM)
        for name in ("rows", "tokens", "trained_tokens", "squared_document_tokens"):
            assert getattr(report, name) == getattr(expected, name), name
        assert found.keys() == gradients.keys()
        for name, value in gradients.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale, msg=name)


def count_graphs(rank: int, world_size: int) -> tuple[list[int], int]:
    """Return how many graphs each of eight steps compiled, and how many shapes they had."""
    trainer = make_trainer(Case(backend="eager"), local_batch_size=1, rows=rows_of_many_lengths())
    shapes: set[torch.Size] = set()
    batches = trainer.batches

    def noted():
        for batch in batches:
            shapes.add(batch.tokens_BT.shape)
            yield batch

    trainer.batches = noted()
    counts: list[int] = []
    for step in range(1, 9):
        before = graphs_compiled()
        train_step(trainer, step)
        counts.append(graphs_compiled() - before)
    return counts, len(shapes)


def test_compiled_blocks_settle_after_few_graphs_however_many_shapes_there_are(
    ranks: RankPool,
) -> None:
    ((counts, num_shapes),) = ranks(1, count_graphs)
    assert num_shapes >= 10
    # One shape; then any length and number of rows, in one graph or two; and a single row, which
    # the compiler always takes apart. Blocks and loss each.
    assert sum(counts) <= 2 * 4
    assert counts[-2:] == [0, 0]


BUDGET = (
    "--lr_scheduler.total_steps=6",
    *("--data.packing=none", "--data.batch_tokens=32", "--data.largest_batch_first"),
    *("--training.global_batch_size=2", "--validation.local_batch_size=1"),
    *("--validation.enable", "--validation.freq=3", "--metrics.log_freq=1"),
)
SAVED = ("--checkpoint.enable", "--checkpoint.no_last_save_model_only")


def test_a_run_on_batches_resumes_exactly_and_validates_as_padded_rows_do(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "hf")
    documents = packed_documents(tmp_path)

    def run(name: str, *options: str) -> list[dict[str, Any]]:
        folder = tmp_path / name
        config = tiny_config(tmp_path, *documents, *options, f"--job.dump_folder={folder / 'run'}")
        fit(config)
        return rows_of_run(folder)

    whole = run("whole", *BUDGET, "--training.steps=6")
    run("parts", *BUDGET, "--training.steps=3", *SAVED)
    parts = run("parts", *BUDGET, "--training.steps=6", *SAVED)
    for left, right in zip(whole, parts, strict=True):
        for key in ("step", "loss", "grad_norm", "rows", "tokens", "validation_loss"):
            assert left.get(key) == right.get(key), key
    assert whole[0]["rows"] == 2 * 2, "the largest batches have two rows of 13 tokens, padded"
    assert sum(row["rows"] for row in whole) > 6 * 2
    log = (tmp_path / "whole" / "run" / "logs" / "rank-0.log").read_text()
    assert "one step: 2 batches of up to 32 tokens, 64 tokens" in log
    padded = ("--data.packing=none", "--validation.enable", "--validation.local_batch_size=3")
    still = ("--optimizer.lr=0.0", "--training.steps=1")
    (left,), (right,) = run("still", *BUDGET, *still), run("padded", *padded, *still)
    assert left["validation_loss"] == pytest.approx(right["validation_loss"], rel=1e-6)
