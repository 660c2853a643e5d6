"""Runs that train adapters: what they start from, and how they go on."""

from pathlib import Path
from typing import Any

import pytest

from engine.loop import fit
from models.decoder import DecoderLM
from tests.engine.tiny_run import SIZES, rows_of_run, tiny_config, tiny_folder
from tests.models.tiny import fill

ADAPTERS = (
    *("--adapter.kind=dora", "--adapter.rank=4", "--adapter.dropout=0.2"),
    *("--adapter.more", '[{name = "second", rank = 2, use_rslora = true}]'),
)
SAVING = (
    *("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.no_last_save_in_hf"),
    *("--checkpoint.no_last_save_model_only", "--checkpoint.initial_load_in_hf"),
)
STEPS = ("--training.steps=4", "--metrics.log_freq=1", "--debug.deterministic")


def train(folder: Path, *options: str) -> list[dict[str, Any]]:
    fit(tiny_config(folder, *SAVING, *STEPS, *options))
    return rows_of_run(folder)


def test_adapters_begin_as_the_model_and_a_resumed_run_repeats_the_uninterrupted_one(
    tmp_path: Path,
) -> None:
    weights = {n: p.detach() for n, p in fill(DecoderLM(SIZES), spread=5.0).named_parameters()}
    tiny_folder(tmp_path / "hf", weights)
    rows = train(tmp_path, *ADAPTERS)
    again = train(tmp_path, *ADAPTERS, "--checkpoint.load_step=2", "--checkpoint.load_only")
    losses = {row["step"]: row["loss"] for row in rows}
    assert {row["step"]: row["loss"] for row in again[-2:]} == {3: losses[3], 4: losses[4]}
    plain = tmp_path / "plain"
    plain.mkdir()
    tiny_folder(plain / "hf", weights)
    assert rows[0]["loss"] == pytest.approx(train(plain)[0]["loss"], abs=1e-6)
