"""Every key, set to another value on the command line, reaches the code that acts on it.

`key_rows.py` holds the table, `key_runs.py` the runs, `config_spy.py` what watches them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy

from engine import titan
from engine.adapters import OneAdapterConfig
from engine.cli import load_config, to_toml
from engine.config import JobConfig, check
from engine.data.chat_templates import template_text
from engine.data.config import SourceConfig
from engine.manifest import read_manifest, step_folder
from engine.run_folder import resolved
from engine.schema import leaves
from models.layers.lora import adapted_linears
from tests.engine import own_parts
from tests.engine.config_spy import spying
from tests.engine.idle_keys import READ_AS_TEXT, REFUSED, WITHOUT_EFFECT
from tests.engine.key_rows import RUNS, Row
from tests.engine.key_runs import Seen, drive, placed, prepare, words

SCHEMA = leaves(JobConfig)
RUN_OF = {key: name for name, rows in RUNS.items() for key in rows}
ROWS: dict[str, Row] = {key: RUNS[name][key] for key, name in RUN_OF.items()}
IGNORED = {key for keys in WITHOUT_EFFECT.values() for key in keys}
SAYS_SO = re.compile(r"no effect|does nothing|ignore|accepted for|nothing here", re.IGNORECASE)
CURVE = [0.5, 1.0, 1.0, 1.0, 0.625, 0.25]
"""Two steps up, two of five down along a cosine to a quarter, and a sixth at the end of it."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """Return what each run of the table showed; later ones start from files of the first."""
    folder = tmp_path_factory.mktemp("keys")
    prepare(folder)
    done: dict[str, Seen] = {}

    def seen(name: str) -> Seen:
        for one in ("train", name):
            if one not in done:
                done[one] = drive(one, folder)
        return done[name]

    return seen


@pytest.mark.parametrize("key", SCHEMA)
def test_every_key_has_exactly_one_row(key: str):
    places = [*(n for n, rows in RUNS.items() if key in rows), *(key in REFUSED) * ["refused"]]
    places += (key in READ_AS_TEXT) * ["text"] + (key in IGNORED) * ["without effect"]
    assert len(places) == 1, f"{key}: give it a row in key_rows.py; it has {places}"


def test_every_row_is_a_key_with_another_value_than_its_default():
    assert ROWS.keys() | REFUSED.keys() | READ_AS_TEXT | IGNORED == SCHEMA.keys()
    assert not [k for k, row in ROWS.items() if row.value == SCHEMA[k].default]


@pytest.mark.parametrize("key", ROWS)
def test_every_key_is_read_by_its_consumer(key: str, seen: Callable[[str], Seen]):
    run, row = seen(RUN_OF[key]), ROWS[key]
    readers = run.spy.readers(run.config, key)
    assert row.reader in readers, f"{key} is read by {sorted(readers) or 'nothing'}"
    assert readers[row.reader] == placed(row.value, run.folder)


ARRIVALS: dict[str, Callable[[Seen], object]] = {
    "job.dump_folder": lambda s: str(s.run.folder.path),
    "job.device": lambda s: s.run.world.device.type,
    "job.print_config": lambda s: to_toml(s.config) in s.printed,
    "job.description": lambda s: "all keys at once" if "all keys at once" in s.log else s.log,
    "job.save_config_file": lambda s: next(s.run.folder.path.glob("*.json")).name,
    "profiling.enable_profiling": lambda s: s.run.folder.profile.is_dir(),
    "profiling.save_traces_folder": lambda s: next(s.run.folder.profile.iterdir()).name,
    "profiling.profile_freq": lambda s: sum(
        s.last("schedule")[part] for part in ("wait", "warmup", "active")
    ),
    "profiling.profiler_active": lambda s: s.last("schedule")["active"],
    "profiling.profiler_warmup": lambda s: s.last("schedule")["warmup"],
    "metrics.log_freq": lambda s: next(
        row["step"] for row in s.rows if row["step"] > 1 and "validation_loss" not in row
    ),
    "metrics.enable_tensorboard": lambda s: bool([*s.run.folder.path.glob("*/events*")]),
    "metrics.save_tb_folder": lambda s: next(s.run.folder.path.glob("*/events*")).parent.name,
    "metrics.disable_color_printing": lambda s: not s.last("start_logging")["use_color"],
    "metrics.enable_wandb": lambda s: len(s.spy.calls["init"]) == 1,
    "metrics.save_for_all_ranks": lambda s: (s.folder / "metrics-rank-1.jsonl").is_file(),
    "model.tokenizer_path": lambda s: s.last("load_tokenizer")["folder"],
    "model.flavor": lambda s: (
        "tiny" if vars(s.run.trainer.model)["config"].hidden_size == 16 else "other"
    ),
    "model.attention": lambda s: vars(s.run.trainer.model)["config"].attention,
    "model.kernels": lambda s: s.last("architecture")["sizes"].kernels,
    "model.freeze": lambda s: (
        ["model.layers.0.mlp.*.weight"]
        if {n for n, p in s.run.trainer.model.named_parameters() if not p.requires_grad}
        == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        else []
    ),
    "model.converters": lambda s: ["float8"] * len(s.spy.calls["convert_linears"]),
    "model.print_after_conversion": lambda s: "Float8Linear(" in s.log,
    "quantize.linear.float8.recipe_name": lambda s: s.last("convert_linears")["float8"].recipe,
    "quantize.linear.float8.enable_fsdp_float8_all_gather": lambda s: (
        s.last("convert_linears")["float8"].gathers_float8
    ),
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": lambda s: (
        len(vars(s.run.trainer.optimizer)["_optimizer_step_post_hooks"]) == 1
    ),
    "quantize.linear.float8.filter_fqns": lambda s: list(
        s.last("convert_linears")["float8"].left_out
    ),
    "quantize.linear.float8.emulate": lambda s: s.last("convert_linears")["float8"].emulates,
    "adapter.kind": lambda s: "dora" if adapted(s, "k_proj").lora_magnitude_vector else "lora",
    "adapter.name": lambda s: next(iter(adapted(s, "k_proj").scales)),
    "adapter.rank": lambda s: adapted(s, "k_proj").lora_A["own"].weight.shape[0],
    "adapter.alpha": lambda s: adapted(s, "k_proj").scales["own"] * 3**0.5,
    "adapter.use_rslora": lambda s: adapted(s, "k_proj").scales["own"] != 6.0 / 3,
    "adapter.dropout": lambda s: adapted(s, "k_proj").dropouts["own"],
    "adapter.targets": lambda s: sorted(
        {name.rpartition(".")[2] for name, _ in adapted_linears(s.run.trainer.model)} - {"v_proj"}
    ),
    "adapter.path": lambda s: str(s.last("read_adapter")["folder"].folder),
    "adapter.merge_export": lambda s: vars(s.run.checkpointer)["_hf"].adapters.merge,
    "adapter.more": lambda s: [
        OneAdapterConfig(
            name="other",
            rank=adapted(s, "v_proj").lora_A["other"].weight.shape[0],
            targets=["v_proj"],
        )
    ],
    "objective.name": lambda s: type(s.run.trainer.objective).__module__,
    "objective.beta": lambda s: vars(s.run.trainer.objective)["_beta"],
    "objective.label_smoothing": lambda s: vars(s.run.trainer.objective)["_smoothing"],
    "objective.nll_weight": lambda s: s.run.trainer.objective.coefficients["nll"],
    "objective.loss": lambda s: (
        "ipo" if others(s)[0]["_loss"](torch.tensor(0.0)).item() == 25.0 else "other"
    ),
    "objective.gamma": lambda s: others(s)[1]["_gamma"],
    "objective.desirable_weight": lambda s: others(s)[2]["_weights"][0],
    "objective.undesirable_weight": lambda s: others(s)[2]["_weights"][1],
    "objective.reference": lambda s: (
        "precomputed" if s.each("measure", "batch")[0].reference_logps_BP2 is not None else "online"
    ),
    "objective.reference_path": lambda s: str(s.last("load_into")["folder"]),
    "optimizer.name": lambda s: type(s.run.trainer.optimizer).__name__,
    "optimizer.lr": lambda s: s.group["initial_lr"],
    "optimizer.beta1": lambda s: s.group["betas"][0],
    "optimizer.beta2": lambda s: s.group["betas"][1],
    "optimizer.eps": lambda s: s.group["eps"],
    "optimizer.weight_decay": lambda s: s.group["weight_decay"],
    "optimizer.implementation": lambda s: (
        "for-loop" if (s.group["foreach"], s.group["fused"]) == (False, False) else s.group
    ),
    "training.dataset": lambda s: source(s, 0)[0],
    "training.dataset_path": lambda s: source(s, 0)[1],
    "validation.dataset": lambda s: source(s, 1)[0],
    "validation.dataset_path": lambda s: source(s, 1)[1],
    "training.steps": lambda s: s.rows[-1]["step"],
    "training.seq_len": lambda s: s.each("measure", "batch")[0].tokens_BT.shape[1],
    "training.local_batch_size": lambda s: s.each("measure", "batch")[0].tokens_BT.shape[0],
    "training.global_batch_size": lambda s: 2 * len(s.each("measure", "batch")) // 6,
    "training.max_norm": lambda s: s.last("clip_factor")["max_norm"],
    "training.dtype": lambda s: name_of(next(s.run.trainer.model.parameters()).dtype),
    "training.mixed_precision_param": lambda s: mixed(s, "param_dtype"),
    "training.mixed_precision_reduce": lambda s: mixed(s, "reduce_dtype"),
    "training.enable_cpu_offload": lambda s: isinstance(
        s.last("fully_shard")["offload_policy"], CPUOffloadPolicy
    ),
    "training.on_nonfinite": lambda s: s.run.trainer.nonfinite.action,
    "training.neftune_noise_alpha": lambda s: getattr(s.run.trainer.noise, "alpha", 0.0),
    "training.gc_freq": lambda s: 6 // s.each("collect", "generation").count(1),
    "training.gc_debug": lambda s: "gc: step 6 freed" in s.log,
    "training.dataloader.num_workers": lambda s: s.loaders(2)[0]["num_workers"],
    "training.dataloader.prefetch_factor": lambda s: s.loaders(2)[0]["prefetch_factor"],
    "validation.dataloader.num_workers": lambda s: s.loaders(3)[0]["num_workers"],
    "validation.dataloader.prefetch_factor": lambda s: s.loaders(3)[0]["prefetch_factor"],
    "data.format": lambda s: recipe(s, "format"),
    "data.text_field": lambda s: recipe(s, "text_field"),
    "data.bos": lambda s: recipe(s, "add_bos"),
    "data.eos": lambda s: recipe(s, "add_eos"),
    "data.chat_template": lambda s: (
        "chatml" if recipe(s, "chat_template") == template_text("chatml") else "other"
    ),
    "data.train_on": lambda s: recipe(s, "train_on"),
    "data.system_prompts": lambda s: list(cast("tuple[str, ...]", recipe(s, "system_prompts"))),
    "data.system_prompt_rate": lambda s: recipe(s, "system_prompt_rate"),
    "data.on_bad_record": lambda s: recipe(s, "on_bad_record"),
    "data.cache_folder": lambda s: str(s.last("open_token_file")["root"]),
    "data.num_processes": lambda s: s.last("open_token_file")["num_processes"],
    "data.packing": lambda s: "none" if s.spy.calls["LengthBatches"] else "other",
    "data.batch_tokens": lambda s: s.last("LengthBatches")["batch_tokens"],
    "data.pad_to_multiple": lambda s: s.last("LengthBatches")["pad_to_multiple"],
    "data.largest_batch_first": lambda s: s.last("LengthBatches")["num_largest_first"] == 4,
    "data.long_document": lambda s: s.last("cut_documents")["long_document"],
    "data.stride": lambda s: s.last("ConcatPacking")["stride"],
    "data.last_row": lambda s: "keep" if s.last("ConcatPacking")["keep_last"] else "drop",
    "data.sources": lambda s: s.last("mix")["sources"],
    "validation.sources": lambda s: [
        SourceConfig(name=name, dataset="dummy") for name in s.run.validation_names
    ],
    "data.streaming": lambda s: len(s.spy.calls["StreamSettings"]) == 1,
    "data.shuffle_buffer_size": lambda s: s.last("StreamSettings")["buffer_size"],
    "data.dummy_tokens": lambda s: s.last("DummyRows")["num_tokens"],
    "parallelism.data_parallel_replicate_degree": lambda s: mesh_sizes(s)[0],
    "parallelism.context_parallel_degree": lambda s: s.last("apply_context")["dims"].cp,
    "parallelism.context_parallel_mode": lambda s: s.last("apply_context")["mode"],
    "parallelism.context_parallel_load_balancer": lambda s: (
        "headtail" if s.last("apply_context")["dims"].balanced else None
    ),
    "parallelism.tensor_parallel_degree": lambda s: s.last("apply_tensor")["mesh"].size(),
    "parallelism.sequence_parallel": lambda s: s.last("apply_tensor")["sequence_parallel"],
    "parallelism.disable_loss_parallel": lambda s: not s.last("apply_tensor")["loss_parallel"],
    "parallelism.enable_async_tensor_parallel": lambda s: (
        len(s.spy.calls["overlap_tensor_parallel"]) == 1
    ),
    "parallelism.fsdp_reshard_after_forward": lambda s: (
        "never" if set(s.each("fully_shard", "reshard_after_forward")) == {False} else "other"
    ),
    "parallelism.fsdp_copy_engine": lambda s: len(s.spy.calls["gather_by_copy_engine"]) == 1,
    "checkpoint.folder": lambda s: step_folder(s.run.folder.path / "saved", 6).parent.name,
    "checkpoint.interval": lambda s: s.steps_saved[-1] - s.steps_saved[-2],
    "checkpoint.keep_latest_k": lambda s: len(s.steps_saved),
    "checkpoint.enable_first_step_checkpoint": lambda s: "saved step 1 (full)" in s.log,
    "checkpoint.last_save_model_only": lambda s: (
        read_manifest(step_folder(s.run.folder.checkpoints, 6)).contents == "model"
    ),
    "checkpoint.last_save_in_hf": lambda s: (s.run.folder.hf / "config.json").is_file(),
    "checkpoint.export_dtype": lambda s: name_of(
        load_file(s.run.folder.hf / "model.safetensors")["model.norm.weight"].dtype
    ),
    "checkpoint.async_mode": lambda s: (
        "async"
        if all(name.startswith("checkpoint") for name in s.each("write_tensors", "thread"))
        else "disabled"
    ),
    "checkpoint.load_step": lambda s: 6 - len(s.spy.calls["set_learning_rate"]),
    "checkpoint.load_only": lambda s: s.log.count("saved step 6 (full)") == 1,
    "checkpoint.exclude_from_loading": lambda s: sorted(
        {"optimizer", "dataloader", "train_state", "rng"} - s.last("restore")["parts"]
    ),
    "checkpoint.initial_load_path": lambda s: str(s.last("restore")["folder"]),
    "checkpoint.initial_load_model_only": lambda s: len(s.spy.calls["set_learning_rate"]) == 6,
    "checkpoint.initial_load_in_hf": lambda s: len(s.spy.calls["load_into"]) == 1,
    "checkpoint.initial_load_allow": lambda s: s.last("load_into")["allowed"],
    "checkpoint.create_seed_checkpoint": lambda s: s.steps_saved == [0],
    "activation_checkpoint.early_stop": lambda s: s.last("checkpoint")["early_stop"],
    "activation_checkpoint.preserve_rng_state": lambda s: s.last("checkpoint")[
        "preserve_rng_state"
    ],
    "activation_checkpoint.determinism_check": lambda s: s.last("checkpoint")["determinism_check"],
    "activation_checkpoint.debug": lambda s: s.last("checkpoint")["debug"],
    "activation_checkpoint.memory_budget": lambda s: s.last("functorch")["budget"],
    "activation_checkpoint.visualize_memory_budget_pareto": lambda s: s.last("functorch")[
        "visualize"
    ],
    "compile.enable": lambda s: bool(s.spy.calls["compile"]),
    "compile.components": lambda s: ["model"] if len(s.spy.calls["compile"]) == 2 else [],
    "compile.backend": lambda s: s.last("compile")["backend"],
    "comm.init_timeout_seconds": lambda s: s.last("init_process_group")["timeout"].seconds,
    "comm.train_timeout_seconds": lambda s: s.last("_set_pg_timeout")["timeout"].seconds,
    "comm.trace_buf_size": lambda s: int(s.last("environment")["TORCH_FR_BUFFER_SIZE"]),
    "comm.save_traces_folder": lambda s: dumps(s).parent.name,
    "comm.save_traces_file_prefix": lambda s: dumps(s).name,
    "profiling.save_memory_snapshot_folder": lambda s: (
        next(s.folder.glob("*/step-1/rank-0.pickle")).parents[1].name
    ),
    "validation.enable": lambda s: any("validation_loss" in row for row in s.rows),
    "validation.only": lambda s: not s.spy.calls["measure"],
    "validation.freq": lambda s: next(r["step"] for r in s.rows if "validation_loss" in r),
    "validation.local_batch_size": lambda s: s.last("model_inputs")["batch"].tokens_BT.shape[0],
    "validation.seq_len": lambda s: s.last("model_inputs")["batch"].tokens_BT.shape[1],
    "validation.steps": lambda s: len(s.spy.calls["model_inputs"]) // 2,
    "debug.seed": lambda s: s.each("ConcatPacking", "seed")[0],
    "debug.deterministic": lambda s: s.each("use_deterministic_algorithms", "mode")[0],
    "debug.deterministic_warn_only": lambda s: s.each("use_deterministic_algorithms", "warn_only")[
        0
    ],
}
"""What a key's consumer did or was given, as the key's value."""


def adapted(seen: Seen, projection: str) -> Any:
    """The adapted projection of the first block."""
    return seen.run.trainer.model.get_submodule(f"model.layers.0.self_attn.{projection}")


def others(seen: Seen) -> list[dict[str, Any]]:
    """What the objectives beside the run's own one have kept of the settings."""
    return [vars(one) for one in vars(seen.run.trainer.objective)["others"]]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mixed(seen: Seen, part: str) -> str:
    return name_of(getattr(seen.last("fully_shard")["mp_policy"], part))


def recipe(seen: Seen, part: str) -> object:
    return getattr(seen.last("open_token_file")["recipe"], part)


def source(seen: Seen, number: int) -> list[str]:
    """Dataset, path and split of the training rows (0) or the validation rows (1)."""
    return seen.each("open_token_file", "name")[number].split()


def mesh_sizes(seen: Seen) -> tuple[int, ...]:
    return tuple(seen.last("fully_shard")["mesh"].shape)


def dumps(seen: Seen) -> Path:
    return Path(seen.last("environment")["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])


@pytest.mark.parametrize("key", ARRIVALS)
def test_the_consumer_acts_on_the_value(key: str, seen: Callable[[str], Seen]):
    run = seen(RUN_OF[key])
    assert ARRIVALS[key](run) == placed(ROWS[key].value, run.folder)


def test_the_curve_of_the_learning_rate_is_the_one_asked_for(seen: Callable[[str], Seen]):
    assert seen("train").each("set_learning_rate", "factor") == pytest.approx(CURVE)


def test_the_keys_that_are_read_as_text_take_effect(tmp_path: Path):
    path = tmp_path / "own.toml"
    path.write_text("[own]\nkey = 7\n")
    module = own_parts.__name__
    config = load_config([f"--job.config_file={path}", f"--job.custom_config_module={module}"])
    assert isinstance(config, own_parts.JobConfig)
    assert config.own.key == 7


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_may_not_change_is_refused_by_name(key: str, tmp_path: Path):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        beside = {"checkpoint.enable": True} if key.startswith("checkpoint.") else {}
        check(load_config(words(beside | {key: REFUSED[key]}, tmp_path)), 1)


def test_the_keys_without_effect_are_those_that_say_so():
    assert IGNORED == titan.WITHOUT_EFFECT
    for phrase, keys in WITHOUT_EFFECT.items():
        for key in keys:
            assert phrase.lower() in SCHEMA[key].sentence.lower(), key
    others = {"checkpoint.enable", "model.flavor"}  # these speak of other keys
    assert {k for k, leaf in SCHEMA.items() if SAYS_SO.search(leaf.sentence)} - others == IGNORED


@pytest.mark.parametrize("name", RUNS)
def test_nothing_reads_a_key_without_effect(name: str, seen: Callable[[str], Seen]):
    run = seen(name)
    read = {key: found for key in IGNORED if (found := run.spy.readers(run.config, key))}
    assert not read, "these have an effect now: give them rows of their own"


def test_checking_printing_and_comparing_a_configuration_consumes_no_key():
    with pytest.MonkeyPatch.context() as patch, spying(patch) as spy:
        config = load_config(["--training.steps=7"])
        check(config, 1)
        to_toml(config)
        resolved(config, 1)
    assert {read.reader for read in spy.reads} == {"engine/cli.py:load_config"}
