"""Every file of train_configs: it loads, passes the check, and holds nothing superfluous."""

import tomllib
from pathlib import Path

import pytest

from engine.cli import load_config
from engine.combinations import refusals
from engine.config import JobConfig, check
from engine.rules import gather_facts
from engine.schema import flatten, leaves

FILES = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
FILE = {path.stem: path for path in FILES}
WORLD_SIZES = {
    "debug_dpo": (1, 2, 4),
    "debug_mix": (1, 2, 4),
    "debug_model": (1, 2, 4),
    "debug_sft": (1, 2, 4),
    "gemma2_2b": (1, 8),
    "gemma2_2b_sft": (1, 8),
    "gemma3_1b": (1, 8),
    "gemma3_1b_sft": (1, 8),
    "llama3_1b": (1, 8),
    "llama3_8b": (8, 1024),
    "llama3_8b_sft": (8, 64),
    "llama3_8b_qlora": (1, 8),
    "llama3_8b_128k": (8, 512),
    "llama3_70b": (64,),
    "llama3_405b": (512,),
    "mistral_7b": (8, 64),
    "mistral_7b_orpo_lora": (1, 8),
    "mistral_7b_sft": (8, 64),
    "olmo2_1b": (1, 8),
    "olmo2_1b_sft": (1, 8),
    "phi3_mini": (2, 8),
    "phi3_mini_sft": (2, 8),
    "qwen2_1.5b": (1, 8),
    "qwen2_1.5b_sft": (1, 8),
    "qwen3_8b": (8, 64),
    "qwen3_8b_dpo": (8, 64),
    "qwen3_8b_sft": (8, 64),
}


def test_each_file_is_known_here():
    assert {path.stem for path in FILES} == set(WORLD_SIZES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_file_passes_the_check_at_its_world_sizes(path: Path, device_type: str):
    config = load_config(["--job.config_file", str(path)])
    for world_size in WORLD_SIZES[path.stem]:
        facts, problems = gather_facts(config, world_size, device_type=device_type, is_here=False)
        assert not problems + refusals(facts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_where_it_ran_and_holds_only_what_differs(path: Path):
    text = path.read_text()
    assert text.startswith("#")
    config = flatten(load_config(["--job.config_file", str(path)]))
    defaults = {key: leaf.default for key, leaf in leaves(JobConfig).items()}
    identity = {"job.config_file", "model.name", "model.flavor"}
    changed = {key for key, value in config.items() if value != defaults[key]}
    assert _keys(tomllib.loads(text), "") - identity == changed - identity


def _keys(table: dict[str, object], prefix: str) -> set[str]:
    found: set[str] = set()
    for name, value in table.items():
        found |= _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


def test_the_quick_start_sees_the_same_rows_on_one_two_and_four_ranks():
    config = load_config(["--job.config_file", str(FILE["debug_model"])])
    assert config.parallelism == JobConfig().parallelism
    for world_size in (1, 2, 4):
        check(config, world_size)
        assert config.training.rows_per_step(world_size) == 16


@pytest.mark.parametrize("names", [("debug_model", "debug_sft"), ("debug_sft", "debug_dpo")])
def test_each_run_of_the_chain_goes_on_from_what_the_one_before_it_exports(names: tuple[str, str]):
    before, after = (flatten(load_config(["--job.config_file", str(FILE[n])])) for n in names)
    assert before["checkpoint.last_save_in_hf"] and before["adapter.kind"] == "none"
    for key in ("model.name", "model.flavor", "training.seq_len", "training.global_batch_size"):
        assert after[key] == before[key]
    folder = f"{before['job.dump_folder']}/hf".removeprefix("./")
    start = f"--model.hf_assets_path {folder} --checkpoint.initial_load_in_hf"
    readme = (FILE[names[0]].parents[1] / "README.md").read_text()
    assert start in FILE[names[1]].read_text() and start in readme


def test_the_quick_start_leaves_everything_that_it_promises():
    config = load_config(["--job.config_file", str(FILE["debug_model"])])
    assert config.checkpoint.enable
    assert config.checkpoint.last_save_in_hf
    assert not config.checkpoint.last_save_model_only
    assert config.metrics.enable_tensorboard
    assert config.validation.enable
