"""A run that was stopped and goes on is the run that was not, to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from engine.checkpoint import Checkpointer
from engine.checkpoint_storage import read_metadata, read_tensors
from tests.engine.checkpoint_cases import (
    FSDP2_TP2,
    FSDP4,
    TP2,
    assert_same,
    config,
    gathered,
    start,
    step,
)
from tests.parity.cases import Case

ROOT = Path(__file__).parents[2]
COMPARED = ("loss", "grad_norm", "lr", "tokens")
RUN = (
    *("--job.config_file", "train_configs/debug_model.toml", "--job.device", "cpu"),
    *("--training.dataset", "dummy", "--training.seq_len", "64", "--training.steps", "12"),
    *("--training.local_batch_size", "2", "--training.global_batch_size", "4"),
    *("--checkpoint.interval", "4", "--checkpoint.no_last_save_in_hf"),
    *("--validation.no_enable", "--metrics.log_freq", "1", "--debug.deterministic"),
    *("--training.dataloader.num_workers", "2", "--checkpoint.async_mode", "async"),
)


def _run(
    rank: int, world_size: int, case: Case, folder: Path, stops: list[int]
) -> tuple[list[float], dict[str, Tensor]]:
    """Train to the last of `stops`, saving and building anew at each of the others."""
    losses: list[float] = []
    state, dims = start(case)
    for stop in stops:
        checkpointer = Checkpointer(config(async_mode="async"), folder, files={})
        if losses:
            state, dims = start(case)
            assert checkpointer.load(state) == len(losses)
        while state.counters["step"] < stop:
            losses.append(step(state, dims, case))
        checkpointer.save(stop, state)
        checkpointer.close()
    return losses, gathered(state)


@pytest.mark.parametrize("case", [FSDP4, TP2, FSDP2_TP2], ids=str)
def test_a_resumed_run_repeats_losses_parameters_and_moments_exactly(
    ranks, tmp_path: Path, case: Case
) -> None:
    whole = ranks(case.world_size, _run, case, tmp_path / "whole", [5])
    parts = ranks(case.world_size, _run, case, tmp_path / "parts", [2, 3, 5])
    for (losses, state), (resumed_losses, resumed_state) in zip(whole, parts, strict=True):
        assert resumed_losses == losses and len(losses) == 5
        assert_same(resumed_state, state)


def launch(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", *RUN, "--job.dump_folder", str(folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{key: row[key] for key in ("step", *COMPARED)} for row in found if "loss" in row]


def tensors(step_folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint: parameters, optimizer state, generators."""
    metadata = read_metadata(step_folder)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    read_tensors(found, step_folder, metadata, None)
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers_and_the_same_checkpoint(tmp_path: Path) -> None:
    whole = launch(tmp_path / "whole")
    killed = launch(tmp_path / "killed")
    marker = tmp_path / "killed" / "checkpoint" / "step-4" / ".complete"
    deadline = time.monotonic() + 200
    while not marker.is_file() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    output, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "killed" / "checkpoint" / "step-12").exists()
    finish(launch(tmp_path / "killed"))
    finish(whole)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, 13))
    ends = [tmp_path / name / "checkpoint" / "step-12" for name in ("killed", "whole")]
    assert_same(tensors(ends[0]), tensors(ends[1]))
    counters = [json.loads((end / "counters.json").read_text())["counters"] for end in ends]
    for name in ("step", "rows_consumed"):
        assert counters[0][name] == counters[1][name] > 0
