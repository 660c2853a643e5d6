"""The real configuration: every key, its default, and files of torchtitan 0.2.

What each key does is shown in `test_keys_reach_their_consumers.py`.
"""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from engine import titan
from engine.cli import load_config, to_toml
from engine.config import JobConfig, check
from engine.schema import Leaf, flatten, leaves, value_of

TITAN_FILES = Path(__file__).parent / "titan_files"
SCHEMA = leaves(JobConfig)

OUR_DEFAULTS = {
    "training.dataset": "python_stdlib",
    "validation.dataset": "python_stdlib",
    "model.hf_assets_path": "",
}
"""The only defaults that differ from torchtitan 0.2."""

NOT_ALONE = {
    "checkpoint.initial_load_in_hf_quantized": ["--checkpoint.enable"],
    "data.sources": ["--data.sources", '[{name = "a", dataset = "dummy", weight = 1.0}]'],
    "validation.sources": ["--validation.sources", '[{name = "a", dataset = "dummy"}]'],
    "data.chat_template": ["--data.format=chat"],
    "data.train_on": ["--data.format=chat"],
    "data.system_prompts": ["--data.format=chat"],
    "data.system_prompt_rate": ["--data.format=chat"],
    "data.long_document": ["--data.packing=none"],
    "objective.beta": ["--objective.name=dpo"],
    "objective.loss": ["--objective.name=dpo"],
    "objective.label_smoothing": ["--objective.name=dpo"],
    "objective.nll_weight": ["--objective.name=simpo"],
    "objective.gamma": ["--objective.name=simpo"],
    "objective.desirable_weight": ["--objective.name=kto"],
    "objective.undesirable_weight": ["--objective.name=kto"],
    "objective.reference": ["--objective.name=dpo"],
    "objective.reference_path": ["--objective.name=dpo"],
    "data.shuffle_buffer_size": ["--data.streaming"],
    "data.batch_tokens": ["--data.packing=none"],
    "data.pad_to_multiple": ["--data.packing=none", "--data.batch_tokens=64"],
    "data.largest_batch_first": ["--data.packing=none", "--data.batch_tokens=64"],
    "data.stride": ["--data.stride", "5"],
    **{
        f"adapter.{key}": ["--adapter.kind=lora"]
        for key in (
            "name",
            "rank",
            "alpha",
            "use_rslora",
            "dropout",
            "targets",
            "path",
            "merge_export",
        )
    },
    "adapter.more": ["--adapter.more", '[{name = "b"}]'],
    "experimental.custom_import": ["--experimental.custom_import", "json"],
    "job.custom_config_module": ["--job.custom_config_module", "engine.config"],
    "training.dataloader.persistent_workers": ["--training.dataloader.num_workers", "1"],
    "training.dataloader.prefetch_factor": ["--training.dataloader.num_workers", "1"],
    "validation.dataloader.persistent_workers": ["--validation.dataloader.num_workers", "1"],
    "validation.dataloader.prefetch_factor": ["--validation.dataloader.num_workers", "1"],
    "activation_checkpoint.selective_ac_option": ["--activation_checkpoint.selective_ac_option=3"],
    "activation_checkpoint.determinism_check": ["--activation_checkpoint.determinism_check=none"],
    "checkpoint.exclude_from_loading": ["--checkpoint.exclude_from_loading", "optimizer"],
    "compile.components": ["--compile.components", "loss"],
}
"""Options that a key needs beside it, or its own value where a made-up one is refused."""

REFUSED = {
    "comm.mode",
    "experimental.custom_args_module",
    "optimizer.early_step_in_backward",
    "parallelism.pipeline_parallel_degree",
    "parallelism.expert_parallel_degree",
    "parallelism.expert_tensor_parallel_degree",
    "checkpoint.initial_load_in_hf_quantized",
}
"""Keys whose own section refuses every other value than the default."""


CHANGEABLE = [
    key
    for key, leaf in SCHEMA.items()
    if key != "job.config_file" and leaf.hint != Literal["mxfp8"]
]
"""All keys but the file's own name and those that offer one choice."""


def _titan_defaults() -> dict[str, Any]:
    def flat(table: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in table.items():
            key = prefix + name
            found |= flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
        return found

    values = flat(tomllib.loads((TITAN_FILES / "defaults.toml").read_text()), "")
    return {key: None if value == "None" else value for key, value in values.items()}


TITAN_DEFAULTS = _titan_defaults()


def test_every_key_of_torchtitan_is_known_with_its_default():
    assert len(TITAN_DEFAULTS) > 140
    ours = {key: leaf.default for key, leaf in SCHEMA.items()}
    assert {k: ours.get(k, "missing") for k in TITAN_DEFAULTS} == TITAN_DEFAULTS | OUR_DEFAULTS


def test_a_file_that_spells_out_every_default_loads():
    load_config(["--job.config_file", str(TITAN_FILES / "defaults.toml")])


def _other_value(leaf: Leaf) -> tuple[list[str], object]:
    """Return command-line words that change a key, and the value that they mean."""
    parts = get_args(leaf.hint) if get_origin(leaf.hint) not in (list, Literal) else (leaf.hint,)
    hint = next((p for p in parts or (leaf.hint,) if p is not type(None)), leaf.hint)
    name, default = leaf.key, leaf.default
    if hint is bool:
        section, _, last = name.rpartition(".")
        return [f"--{section}.no_{last}" if default else f"--{name}"], not default
    if get_origin(hint) is Literal:
        value = next(choice for choice in get_args(hint) if choice != default)
    elif get_origin(hint) is list:
        nested = get_origin(get_args(hint)[0]) is list
        return [f"--{name}", "changed"], [["changed"]] if nested else ["changed"]
    elif hint is float:
        value = 0.25 if default is None else default / 2 or 0.25
    elif hint is int:
        value = (default or 0) + 2
    else:
        value = "changed"
    return [f"--{name}={value}"], value


@pytest.mark.parametrize("key", CHANGEABLE)
def test_every_key_arrives_from_the_command_line(key: str):
    words, value = _other_value(SCHEMA[key])
    extra = NOT_ALONE.get(key, [])
    if any(word.startswith(f"--{key}") for word in extra):
        words, extra = extra, []
        value = None
    if key in REFUSED:
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            load_config([*extra, *words])
        return
    config = load_config([*extra, *words])
    arrived = value_of(config, key)
    assert arrived != SCHEMA[key].default
    assert value is None or arrived == value
    others = {k for k, v in flatten(config).items() if v != SCHEMA[k].default}
    assert others - {key} <= {word[2:].partition("=")[0] for word in extra}


def test_a_resolved_configuration_loads_to_the_same_one(tmp_path: Path):
    words = ["--training.steps=7", "--parallelism.context_parallel_load_balancer=None"]
    config = load_config(words)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    again = load_config(["--job.config_file", str(path)])
    assert replace(again, job=replace(again.job, config_file=None)) == config


@pytest.mark.parametrize(("name", "world_size"), [("llama3_8b", 8), ("llama3_70b", 64)])
def test_a_file_of_torchtitan_parses_and_passes_the_check_at_its_world_size(
    name: str, world_size: int, tmp_path: Path
):
    words = ["--job.config_file", str(TITAN_FILES / f"{name}.toml")]
    check(load_config([*words, f"--model.hf_assets_path={tmp_path}"]), world_size)


def test_a_missing_assets_folder_is_named_with_its_key():
    config = load_config(["--job.config_file", str(TITAN_FILES / "llama3_8b.toml")])
    with pytest.raises(ValueError, match=r"model\.hf_assets_path = '\./assets/hf/Llama-3\.1-8B'"):
        check(config, 8)


def test_settings_of_features_that_are_off_are_kept():
    words = ["--quantize.linear.float8.recipe_name=rowwise", "--fault_tolerance.replica_id=3"]
    words += ["--parallelism.pipeline_parallel_schedule=Interleaved1F1B"]
    words += ["--parallelism.enable_async_tensor_parallel"]
    config = load_config(words)
    check(config, 1)
    table = tomllib.loads(to_toml(config))
    assert table["quantize"]["linear"]["float8"]["recipe_name"] == "rowwise"
    assert table["fault_tolerance"]["replica_id"] == 3
    assert table["parallelism"]["pipeline_parallel_schedule"] == "Interleaved1F1B"


def test_every_answer_to_an_older_spelling_names_a_key_that_exists():
    for old, answer in titan.RENAMED.items():
        key = answer.split(" ")[0].rstrip(",")
        assert key in SCHEMA, answer
        assert old not in SCHEMA
