"""Files of torchtitan 0.2 train here, in a size that fits a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TITAN_FILES = Path(__file__).parent / "titan_files"
FITTING = ["--model.flavor=debugmodel", "--model.hf_assets_path=", "--training.dataset=dummy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("llama3_8b", []),
        # Eight rows of 8,192 tokens take minutes on a CPU, so this one is shorter too.
        ("llama3_70b", ["--parallelism.tensor_parallel_degree=1", "--training.seq_len=512"]),
    ],
)
def test_a_file_of_torchtitan_trains_two_steps(name: str, degrees: list[str], tmp_path: Path):
    words = ["--job.config_file", str(TITAN_FILES / f"{name}.toml"), *FITTING, *degrees]
    words += ["--training.steps=2", f"--job.dump_folder={tmp_path}", "--job.device=cpu"]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 12 for row in rows)
    assert (tmp_path / "config.toml").is_file()
    assert (tmp_path / "tb").is_dir()
