"""Whole runs whose ranks share rows: built, trained, validated, saved and resumed as users do."""

import os
from pathlib import Path
from typing import Any

import pytest

from engine.loop import fit
from tests.end_to_end.launch import free_port
from tests.engine.tiny_run import packed_documents, rows_of_run, tiny_config, tiny_folder
from tests.ranks import RankPool, leave_process_group

FP32_REORDERED_SUM = 1e-6  # other orders of the same sums, through six updates of AdamW
STEPS, SAVED = 6, 3
COMPARED = ("loss", "grad_norm", "validation_loss")
EQUAL = ("step", "lr", "tokens", "trained_tokens", "rows")

RUN = (
    *("--training.global_batch_size=4", "--metrics.log_freq=1"),
    *(f"--lr_scheduler.total_steps={STEPS}", "--lr_scheduler.warmup_steps=1"),
    # A small eps would make of the first update the gradient's sign, which rounding may turn.
    *("--optimizer.lr=0.01", "--optimizer.eps=0.01"),
    *("--validation.enable", f"--validation.freq={SAVED}"),
    "--validation.local_batch_size=2",
    *("--checkpoint.enable", f"--checkpoint.interval={SAVED}"),
    "--checkpoint.no_last_save_model_only",
)

Rows = list[dict[str, Any]]


def layout(*, shard: int = 1, tp: int = 1, cp: int = 1, mode: str = "allgather") -> tuple[str, ...]:
    return (
        f"--parallelism.data_parallel_shard_degree={shard}",
        f"--parallelism.tensor_parallel_degree={tp}",
        f"--parallelism.context_parallel_degree={cp}",
        f"--parallelism.context_parallel_mode={mode}",
    )


ALONE = layout()


def train(folder: Path, data: tuple[str, ...], *options: str) -> Rows:
    """Run what `train.py` runs, in this process; return all rows of numbers in the folder."""
    fit(tiny_config(folder, *RUN, *data, *options))
    return rows_of_run(folder)


def as_a_rank(rank: int, world_size: int, port: int, *arguments: Any) -> Rows:
    leave_process_group()  # the run joins one as torchrun's ranks do
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return train(*arguments)


class Runs:
    """Runs in one folder, each going on from the one before, in any layout."""

    def __init__(self, ranks: RankPool, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        tiny_folder(folder / "hf")
        self.data = packed_documents(folder)
        self.rows: Rows = []

    def train(self, num_ranks: int, layout: tuple[str, ...], *, until: int) -> Rows:
        """Train up to a step; return the rows of numbers since the start."""
        arguments = (self.folder, self.data, *layout, f"--training.steps={until}")
        if num_ranks == 1:
            rows = train(*arguments)
        else:
            rows = self.ranks(num_ranks, as_a_rank, free_port(), *arguments)[0]
        assert rows[: len(self.rows)] == self.rows, "what was done is not done again"
        self.rows = rows
        return rows


@pytest.fixture
def runs(ranks: RankPool, tmp_path: Path) -> Runs:
    return Runs(ranks, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of one rank."""
    runs = Runs(rank_pool, tmp_path_factory.mktemp("one"))
    rows = runs.train(1, ALONE, until=STEPS)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "validation_loss" in row] == [SAVED, STEPS]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1, "each update matters to the losses after it"
    return runs


def assert_same(found: Rows, expected: Rows) -> None:
    """Compare the numbers of every step."""
    for row, wanted in zip(found, expected, strict=True):
        assert {key: row[key] for key in EQUAL} == {key: wanted[key] for key in EQUAL}
        near = {key: wanted[key] for key in COMPARED if key in wanted}
        seen = {key: row[key] for key in COMPARED if key in row}
        assert seen == pytest.approx(near, rel=FP32_REORDERED_SUM)


def test_a_run_whose_ranks_share_rows_follows_one_rank_and_goes_on_where_they_do_not(
    runs: Runs, uninterrupted: Runs
) -> None:
    rows = runs.train(2, layout(cp=2), until=SAVED)
    assert_same(rows, uninterrupted.rows[:SAVED])
    assert_same(runs.train(2, layout(shard=2), until=STEPS), uninterrupted.rows)


def test_a_run_of_tensor_and_context_parallel_ranks_goes_on_on_one(
    runs: Runs, uninterrupted: Runs
) -> None:
    rows = runs.train(4, layout(tp=2, cp=2, mode="ring"), until=SAVED)
    assert_same(rows, uninterrupted.rows[:SAVED])
    assert_same(runs.train(1, ALONE, until=STEPS), uninterrupted.rows)


def test_a_run_of_one_rank_goes_on_where_four_share_rows_and_parameters(
    runs: Runs, uninterrupted: Runs
) -> None:
    runs.train(1, ALONE, until=SAVED)
    rows = runs.train(4, layout(shard=2, cp=2, mode="ulysses"), until=STEPS)
    assert_same(rows, uninterrupted.rows)
