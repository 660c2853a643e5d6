"""The quick start, shortened: what it leaves behind, how it goes on, and on how many nodes."""

import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.conftest import Launcher
from tests.end_to_end.launch import SHORT, complete_steps, free_port, losses, rows, torchrun

# The learning rate depends on the number of steps; during warm-up it does not.
WARM_UP = ("--lr_scheduler.total_steps", "6")
# As many rows on one rank as `validation.steps` of the short run are on two.
ON_ONE_RANK = ("--validation.steps", "4")
REORDERED_SUM = 1e-5  # another layout: only the order of sums differs
pytestmark = pytest.mark.timeout(600)

ShortRun = tuple[Path, str]


def test_the_run_folder_holds_what_the_readme_names(short_run: ShortRun) -> None:
    folder, _ = short_run
    assert (folder / "config.toml").is_file()
    assert complete_steps(folder)[-1] == 6
    curves = EventAccumulator(str(folder / "tb")).Reload().Tags()["scalars"]
    assert any("loss" in name for name in curves)
    written = rows(folder)
    assert [row["step"] for row in written] == [1, 2, 3, 4, 5, 6]
    keys = {"loss", "grad_norm", "lr", "tokens", "tokens_per_second_per_device", "mfu"}
    assert keys | {"peak_memory_gib", "step_seconds"} <= set(written[-1])
    assert math.isfinite(written[-1]["validation_loss"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert model.config.vocab_size >= len(tokenizer)


def test_the_last_lines_say_how_to_go_on_look_and_generate(short_run: ShortRun) -> None:
    folder, text = short_run
    last_lines = "\n".join(text.splitlines()[-12:])
    assert f"--job.config_file {folder}" in last_lines
    assert f"tensorboard --logdir {folder}" in last_lines
    assert "scripts/generate.py --model" in last_lines
    assert "number formats: compute float32, master float32, reduce float32" in text
    assert "ranks: dp_replicate 1 x dp_shard 2 x tp 1" in text and "torch 2." in text


def test_more_steps_go_on_where_the_run_stopped(
    short_run: ShortRun, launch: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short_run[0], folder)
    before = losses(folder)
    options = ("--job.dump_folder", str(folder), "--training.steps", "9")
    run = launch([*torchrun("--nproc_per_node=2"), *SHORT, *options])
    assert run.wait() == 0, run.text
    after = losses(folder)
    assert list(after) == [1, 2, 3, 4, 5, 6, 7, 8, 9], "the step axis has a gap or a repeat"
    assert {step: after[step] for step in before} == before
    assert complete_steps(folder)[-1] == 9


def test_two_nodes_of_one_rank_give_the_losses_of_one_node(
    short_run: ShortRun, launch: Launcher, tmp_path: Path
) -> None:
    meeting = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    node = torchrun("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", meeting)
    options = ("--job.dump_folder", str(tmp_path / "run"), "--training.steps", "6")
    nodes = [launch([*node, *SHORT, *options]) for _ in range(2)]
    for one in nodes:
        assert one.wait() == 0, "\n".join(node.text for node in nodes)
    assert losses(tmp_path / "run") == losses(short_run[0])


def test_one_process_without_a_launcher_trains_the_same_file(
    short_run: ShortRun, launch: Launcher, tmp_path: Path
) -> None:
    options = ("--job.dump_folder", str(tmp_path / "run"), "--training.steps", "6")
    run = launch([sys.executable, "train.py", *SHORT, *options])
    assert run.wait() == 0, run.text
    expected = losses(short_run[0])
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(expected[step], rel=REORDERED_SUM)


def test_four_ranks_train_the_same_file(
    short_run: ShortRun, launch: Launcher, tmp_path: Path
) -> None:
    options = ("--job.dump_folder", str(tmp_path / "run"), "--training.steps", "2")
    one_row = ("--training.local_batch_size", "1", "--validation.no_enable")
    run = launch([*torchrun("--nproc_per_node=4"), *SHORT, *options, *one_row, *WARM_UP])
    assert run.wait() == 0, run.text
    expected = losses(short_run[0])
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(expected[step], rel=REORDERED_SUM)


def test_validation_alone_repeats_the_last_validation_and_writes_nothing(
    short_run: ShortRun, launch: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short_run[0], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.toml")}
    options = ("--job.dump_folder", str(folder), "--validation.only", "--training.steps", "6")
    no_data = ("--training.dataset", "jsonl", "--training.dataset_path", "not there")
    run = launch([sys.executable, "train.py", *SHORT, *options, *no_data, *ON_ONE_RANK])
    assert run.wait() == 0, run.text
    found = re.search(r"validation loss (\S+) over", run.text)
    assert found is not None, run.text
    last = rows(short_run[0])[-1]["validation_loss"]
    assert float(found.group(1)) == pytest.approx(last, abs=1e-4)
    assert rows(folder) == rows(short_run[0]) and complete_steps(folder)[-1] == 6
    assert {path: path.read_bytes() for path in folder.rglob("*.toml")} == before


def test_the_resolved_configuration_repeats_the_run(
    short_run: ShortRun, launch: Launcher, tmp_path: Path
) -> None:
    resolved = ("--job.config_file", str(short_run[0] / "config.toml"))
    folder = ("--job.dump_folder", str(tmp_path / "run"))
    run = launch([*torchrun("--nproc_per_node=2"), *resolved, *folder])
    assert run.wait() == 0, run.text
    assert losses(tmp_path / "run") == losses(short_run[0])


def test_training_starts_from_a_hugging_face_folder_that_decides_the_architecture(
    short_run: ShortRun, launch: Launcher, tmp_path: Path
) -> None:
    folder, hf = tmp_path / "run", str(short_run[0] / "hf")
    options = ("--job.dump_folder", str(folder), "--training.steps", "1", *WARM_UP)
    start = ("--model.hf_assets_path", hf, "--model.flavor", "8B", "--optimizer.lr", "0.0")
    weights = ("--checkpoint.initial_load_path", hf, "--checkpoint.initial_load_in_hf")
    run = launch([sys.executable, "train.py", *SHORT, *options, *start, *weights, *ON_ONE_RANK])
    assert run.wait() == 0, run.text
    assert "config.json (model.flavor is ignored)" in run.text
    last = rows(short_run[0])[-1]["validation_loss"]
    assert rows(folder)[-1]["validation_loss"] == pytest.approx(last, rel=REORDERED_SUM)


def test_generation_continues_a_prompt_as_transformers_does(
    short_run: ShortRun, launch: Launcher
) -> None:
    hf = short_run[0] / "hf"
    asked = ("--model", str(hf), "--prompt", "def ", "--max_new_tokens", "16")
    greedy = ("--temperature", "0")
    run = launch([sys.executable, "-m", "scripts.generate", *asked, *greedy])
    assert run.wait() == 0, run.text
    tokenizer = AutoTokenizer.from_pretrained(hf)
    model: Any = AutoModelForCausalLM.from_pretrained(hf)
    prompt = tokenizer("def ", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() in run.text
