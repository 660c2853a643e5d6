"""Files of torchtitan 0.2 train here, in a size that fits a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TITAN_FILES = Path(__file__).parent / "titan_files"
SMALL_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("llama3_8b", []),
        # Eight rows of 8,192 tokens take two minutes on a CPU, so this one is shorter too.
        ("llama3_70b", ["--parallelism.tensor_parallel_degree=1", "--training.seq_len=512"]),
    ],
)
def test_a_file_of_torchtitan_trains_two_steps(name: str, degrees: list[str], tmp_path: Path):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "config.json").write_text(json.dumps(SMALL_LLAMA))
    words = ["--job.config_file", str(TITAN_FILES / f"{name}.toml"), *degrees]
    words += [f"--model.hf_assets_path={assets}", "--training.dataset=dummy", "--training.steps=2"]
    words += [f"--job.dump_folder={tmp_path}", "--job.device=cpu"]
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
    assert rows[-1]["tokens"] == (2 * 8192 if name == "llama3_8b" else 2 * 8 * 512)
    assert all(0 < row["loss"] < 12 for row in rows)
    assert (tmp_path / "config.toml").is_file()
    assert (tmp_path / "tb").is_dir()
