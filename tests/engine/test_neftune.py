"""NEFTune's noise: its size, what it depends on, and that every layout and resume adds the same."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.batch import PADDING_DOCUMENT, document_offsets
from engine.loop import fit
from engine.neftune import EmbeddingNoise
from engine.step import StepReport, train_step
from parallelisms import ParallelConfig, ParallelDims
from tests.engine.tiny_run import packed_documents, rows_of_run, tiny_config, tiny_folder
from tests.engine.training_cases import ROWS_PER_STEP, RaggedRows, make_trainer, whole_parameters
from tests.parity.cases import Case
from tests.ranks import RankPool

FP32_REORDERED_SUM = 1e-5  # another order of the same sums, through one update of AdamW
NOISE = EmbeddingNoise(alpha=5.0, seed=3, width=256, dtype=torch.float32)
LENGTHS = ((48, 200, 0), (120, 60, 68), (230, 0, 18))
"""Of two documents and the padding of each row; over 12,000 values a document."""

ONE_RANK = ParallelDims.of(ParallelConfig(), 1)


def documents(lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> Tensor:
    ids = torch.tensor([1, 2, PADDING_DOCUMENT])
    return torch.stack([ids.repeat_interleave(torch.tensor(row)) for row in lengths])


def draw(documents_BT: Tensor, rows: Sequence[int], noise: EmbeddingNoise = NOISE) -> Tensor:
    offsets = document_offsets(documents_BT)
    return noise(documents_BT, document_offsets=offsets, rows_B=torch.tensor(rows), dims=ONE_RANK)


def test_each_document_has_the_noise_of_its_own_length_and_padding_none() -> None:
    documents_BT = documents()
    noise_BTD = draw(documents_BT, [0, 1, 2])
    assert noise_BTD.shape == (*documents_BT.shape, NOISE.width)
    for row, lengths in enumerate(LENGTHS):
        for document, length in enumerate(lengths[:2], 1):
            values = noise_BTD[row][documents_BT[row] == document]
            if not length:
                continue
            largest = NOISE.alpha / (length * NOISE.width) ** 0.5
            rms = values.double().square().mean().sqrt().item()
            assert rms == pytest.approx(largest / 3**0.5, rel=0.02)
            assert 0.99 * largest < values.abs().max() < largest
            assert abs(values.mean()) < 0.03 * largest
    assert not noise_BTD[documents_BT == PADDING_DOCUMENT].any()


def test_no_two_tokens_channels_rows_or_seeds_share_their_noise() -> None:
    noise_BTD = draw(documents(((256, 0, 0),) * 2), [0, 1])
    other_BTD = draw(documents(((256, 0, 0),) * 2), [0, 1], replace(NOISE, seed=4))
    vectors = torch.cat([noise_BTD.flatten(0, 1), other_BTD.flatten(0, 1)]).double()
    # Of independent vectors of 256 values: standard deviation 1/16, none of 524,288 beyond 6.5.
    assert (torch.corrcoef(vectors) - torch.eye(len(vectors))).abs().max() < 6.5 / 16
    assert (torch.corrcoef(vectors.T) - torch.eye(NOISE.width)).abs().max() < 6.5 / 32
    assert len(vectors.unique()) > 0.95 * vectors.numel()


def test_noise_depends_on_the_row_and_the_place_and_not_on_what_is_beside_them() -> None:
    documents_BT = documents()
    expected_BTD = draw(documents_BT, [7, 8, 9])
    assert torch.equal(draw(documents_BT[[2, 0]], [9, 7]), expected_BTD[[2, 0]])
    padded_BT = torch.nn.functional.pad(documents_BT, (0, 8), value=PADDING_DOCUMENT)
    padded_BTD = draw(padded_BT, [7, 8, 9])
    assert torch.equal(padded_BTD[:, :-8], expected_BTD) and not padded_BTD[:, -8:].any()
    assert not torch.equal(draw(documents_BT, [8, 8, 9])[0], expected_BTD[0])
    rounded = draw(documents_BT, [7, 8, 9], replace(NOISE, dtype=torch.bfloat16))
    assert torch.equal(rounded, expected_BTD.bfloat16())


def test_noise_drawn_in_parts_is_the_noise_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected_BTD = draw(documents(), [0, 1, 2])
    monkeypatch.setattr("engine.neftune.VALUES_AT_ONCE", 7 * NOISE.width)
    assert torch.equal(draw(documents(), [0, 1, 2]), expected_BTD)


# ---------------------------------------------------------------------- on gloo ranks
# Gradients of each layout: tests/parity/test_plans.py, in whose pairs of features noise is one.


Outcome = tuple[StepReport, dict[str, Tensor]]


def take_a_step(rank: int, world_size: int, case: Case, local_batch_size: int) -> Outcome:
    rows = RaggedRows(seq_len=13)  # padded to 16 where two ranks share a row
    trainer = make_trainer(case, local_batch_size=local_batch_size, rows=rows)
    return train_step(trainer, 1), whole_parameters(trainer)


@pytest.mark.parametrize(
    "case", [Case(shard=2), Case(tp=2), Case(cp=2), Case(shard=2, cp=2, context="ulysses")], ids=str
)
def test_a_step_with_noise_is_the_same_for_any_ranks_and_microbatches(
    ranks: RankPool, case: Case
) -> None:
    one, case = Case(neftune=True), replace(case, neftune=True)
    ((expected, parameters),) = ranks(1, take_a_step, one, ROWS_PER_STEP)
    ((plain, _),) = ranks(1, take_a_step, Case(), ROWS_PER_STEP)
    assert abs(plain.loss - expected.loss) > 100 * FP32_REORDERED_SUM, "there is noise"
    for report, found in ranks(case.world_size, take_a_step, case, 2):
        assert report.loss == pytest.approx(expected.loss, rel=FP32_REORDERED_SUM)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=FP32_REORDERED_SUM)
        for name, value in parameters.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


# -------------------------------------------------------------------------- whole runs

WITH_NOISE = "--training.neftune_noise_alpha=5"


def rows_of(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Return the numbers of a run on packed documents, gone on with where it stopped."""
    data = packed_documents(folder)
    fit(tiny_config(folder, *data, "--metrics.log_freq=1", "--data.packing=best_fit", *options))
    return rows_of_run(folder)


def started(folder: Path) -> Path:
    folder.mkdir()
    tiny_folder(folder / "hf")
    return folder


def test_validation_is_without_noise_and_the_seed_decides_it(tmp_path: Path) -> None:
    unmoved = ("--training.steps=2", "--optimizer.lr=0", "--validation.enable")
    plain = rows_of(started(tmp_path / "plain"), *unmoved)
    noisy = rows_of(started(tmp_path / "noisy"), *unmoved, WITH_NOISE)
    again = rows_of(started(tmp_path / "again"), *unmoved, WITH_NOISE)
    assert noisy[-1]["validation_loss"] == plain[-1]["validation_loss"] > 0
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in noisy] == [row[name] for row in again]
        assert noisy[0][name] != plain[0][name]


def test_a_resumed_run_adds_the_noise_of_the_uninterrupted_one(tmp_path: Path) -> None:
    kept = ("--checkpoint.enable", "--checkpoint.no_last_save_model_only", WITH_NOISE)
    schedule = "--lr_scheduler.total_steps=70"
    whole = rows_of(started(tmp_path / "whole"), *kept, schedule, "--training.steps=70")
    folder = started(tmp_path / "parts")
    rows_of(folder, *kept, schedule, "--training.steps=33")
    parts = rows_of(folder, *kept, schedule, "--training.steps=70")
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert len(whole) == 70, "more than one pass over the documents"
