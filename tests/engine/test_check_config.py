"""The plan of a run, looked at without a GPU."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.cli import run_command
from scripts.check_config import main
from tests.ranks import forget_meshes

REPOSITORY = Path(__file__).parents[2]
TITAN_FILES = Path(__file__).parent / "titan_files"
LLAMA_8B = ["--job.config_file", str(REPOSITORY / "train_configs" / "llama3_8b.toml")]
PARAMETERS_8B = 8_030_261_248


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a program that ended has shown."""

    returncode: int
    stdout: str
    stderr: str


def start(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does, in a process of its own."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "check_config.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Run the script's `main` here, which spares a start of Python and an import of torch."""

    def run(*words: str) -> Done:
        code = run_command(main, list(words))
        printed = capsys.readouterr()
        return Done(returncode=code, stdout=printed.out, stderr=printed.err)

    yield run
    forget_meshes()


def held(text: str, name: str) -> int:
    found = re.search(rf"{name}.*?([\d,]+) bytes", text)
    assert found, text
    return int(found[1].replace(",", ""))


def table_mib(text: str) -> float:
    """Return the sum of the plan table's last column."""
    table = text[text.index("pattern") :].split("\n\n")[0]
    cells = [line.split()[-1].replace(",", "") for line in table.splitlines()[1:]]
    return sum(float(cell) for cell in cells if cell != "-")


def assert_8b_is_laid_out(done: Any, placement: str, share: int) -> None:
    assert done.returncode == 0, done.stderr
    assert placement in done.stdout
    parameters = held(done.stdout, "parameters")
    # Norms stay whole under tp, and small tensors fill their last shard with padding.
    assert parameters == pytest.approx(4 * PARAMETERS_8B / share, rel=2e-3)
    assert table_mib(done.stdout) == pytest.approx(parameters / 2**20, rel=2e-3)
    assert held(done.stdout, "gradients") == parameters
    assert held(done.stdout, "optimizer") == 2 * parameters


def test_8b_on_1024_ranks_is_laid_out_within_a_minute():
    started = time.perf_counter()
    done = start(*LLAMA_8B, "--world_size", "1024")
    seconds = time.perf_counter() - started
    assert_8b_is_laid_out(done, "fsdp: dim 0 / 1024", 1024)
    assert seconds < 60


@pytest.mark.parametrize(
    ("degrees", "placement", "share"),
    [
        (["--parallelism.data_parallel_replicate_degree=8"], "copies: 8", 128),
        (["--parallelism.tensor_parallel_degree=8"], "tp: dim 0 / 8, fsdp: dim 0 / 128", 1024),
        (["--parallelism.context_parallel_degree=8"], "fsdp: dim 0 / 1024", 1024),
    ],
    ids=["hsdp", "tp", "cp"],
)
def test_8b_on_1024_ranks_is_laid_out_as_asked(
    degrees: list[str], placement: str, share: int, run: Callable[..., Done]
):
    started = time.perf_counter()
    done = run(*LLAMA_8B, "--world_size", "1024", *degrees)
    seconds = time.perf_counter() - started
    assert_8b_is_laid_out(done, placement, share)
    assert seconds < 60


def test_ranks_that_share_rows_are_counted_once(run: Callable[..., Done]):
    words = ["--world_size=16", "--training.seq_len=8192", "--parallelism.tensor_parallel_degree=2"]
    words += ["--parallelism.context_parallel_degree=4", "--parallelism.context_parallel_mode=ring"]
    done = run(*LLAMA_8B, *words)
    assert "ranks:   16 = dp_replicate 1 x dp_shard 2 x cp 4 x tp 2" in done.stdout, done.stderr
    assert "2 rows = 1 x 2 data-parallel ranks x 1 microbatches" in done.stdout


def test_what_needs_gpus_is_laid_out_without_them(run: Callable[..., Done]):
    words = ["--world_size=8", "--compile.enable", "--parallelism.tensor_parallel_degree=2"]
    for key in ("enable_async_tensor_parallel", "fsdp_copy_engine"):
        done = run(*LLAMA_8B, *words, f"--parallelism.{key}")
        assert done.returncode == 0, done.stderr
        assert "fsdp: dim 0 / 4" in done.stdout


def test_rows_and_tokens_of_a_step_are_shown(run: Callable[..., Done]):
    words = ["--world_size=8", "--training.global_batch_size=32", "--training.seq_len=8192"]
    done = run(*LLAMA_8B, *words)
    assert "32 rows = 1 x 8 data-parallel ranks x 4 microbatches" in done.stdout
    assert "262,144 tokens" in done.stdout


@pytest.mark.parametrize(("name", "world_size"), [("llama3_8b", 8), ("llama3_70b", 64)])
def test_a_file_of_torchtitan_passes_without_its_assets_which_are_noted(
    name: str, world_size: int, run: Callable[..., Done]
):
    words = ["--job.config_file", str(TITAN_FILES / f"{name}.toml"), f"--world_size={world_size}"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "note: model.hf_assets_path = './assets/hf/Llama-3.1-" in done.stdout


def test_what_would_be_refused_is_refused_here_with_code_2(run: Callable[..., Done]):
    done = start(*LLAMA_8B, "--world_size=6", "--parallelism.tensor_parallel_degree=4")
    assert done.returncode == 2
    assert done.stderr.startswith("error: parallelism.data_parallel_replicate_degree = 1 and ")
    assert "does not divide the 6 ranks" in done.stderr
    assert not done.stdout
    assert run(*LLAMA_8B, "--world_size=0").returncode == 2
