"""The runs that `key_rows.py` asks for: small, in this process, on the CPU."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import tokenizers
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
from torch._functorch import config as functorch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from engine.build import Run, precision_of
from engine.cli import load_config
from engine.config import JobConfig, check
from engine.distributed import process_group
from engine.loop import fit
from engine.model import ModelNeeds, resolve_architecture
from engine.profiling import Profiler
from engine.schema import plain
from engine.trackers import build_trackers
from parallelisms.apply import parallelize
from parallelisms.mesh import ParallelDims
from tests.engine import key_rows
from tests.engine.config_spy import Spy, spying
from tests.engine.own_parts import TINY

Settings = dict[str, Any]

RECORDED = (
    "engine.build.NonFinitePolicy",
    "engine.batches.mix",
    "engine.checkpoint.restore",
    "engine.checkpoint.write_tensors",
    "engine.hf_weights.load_into",
    "engine.build.load_tokenizer",
    "engine.data.loader.StatefulDataLoader",
    "engine.data.sources.ConcatPacking",
    "engine.data.sources.cut_documents",
    "engine.data.sources.DummyRows",
    "engine.data.sources.LengthBatches",
    "engine.data.sources.open_token_file",
    "engine.data.sources.StreamSettings",
    "engine.evaluate.model_inputs",
    "engine.loop.build",
    "engine.loop.set_learning_rate",
    "engine.loop.start_logging",
    "engine.peft_io.read_adapter",
    "engine.profiling.schedule",
    "engine.step.clip_factor",
    "engine.step.measure",
    "gc.collect",
    "parallelisms.activation_checkpoint.checkpoint",
    "parallelisms.apply.apply_context",
    "parallelisms.apply.apply_tensor",
    "parallelisms.apply.convert_linears",
    "parallelisms.fsdp.fully_shard",
    "torch.distributed.distributed_c10d._set_pg_timeout",
    "torch.distributed.init_process_group",
    "torch.use_deterministic_algorithms",
)
"""Where settings leave our code, or are about to."""

SMALL: Settings = {
    key: key_rows.TRAIN[key].value
    for key in (
        *("job.device", "model.name", "model.flavor", "model.hf_assets_path"),
        *("model.tokenizer_path", "training.seq_len", "training.local_batch_size"),
    )
}
QUIET: Settings = {
    "job.print_config": False,
    "metrics.enable_tensorboard": False,
    "profiling.enable_profiling": False,
    "validation.enable": False,
}


LEFT_OUT: Settings = {
    "data.last_row": "keep",
    "data.stride": 0,
    "data.train_on": "assistant",
    "objective.desirable_weight": 1.0,
    "objective.gamma": 1.0,
    "objective.loss": "sigmoid",
    "objective.undesirable_weight": 1.0,
}
"""Settings of the first run that have no meaning beside pairs and dpo, at their defaults."""

QUICK: Settings = {"debug": False}


@dataclass(kw_only=True, slots=True)
class Seen:
    """What one run showed."""

    config: JobConfig
    spy: Spy
    printed: str
    folder: Path
    """Holds the files of all runs."""

    def last(self, name: str) -> dict[str, Any]:
        """Return what the last call of a recorded function was given."""
        return self.spy.calls[name][-1]

    def each(self, name: str, argument: str) -> list[Any]:
        """Return one argument of every call of a recorded function."""
        return [call[argument] for call in self.spy.calls[name]]

    @property
    def run(self) -> Run:
        """The run that was built."""
        return self.last("build")["return"]

    @property
    def group(self) -> dict[str, Any]:
        """The optimizer's settings for matrices."""
        return self.run.trainer.optimizer.param_groups[0]

    @property
    def log(self) -> str:
        """The log file of rank 0."""
        return (self.run.folder.logs / "rank-0.log").read_text()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of numbers."""
        lines = (self.run.folder.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def steps_saved(self) -> list[int]:
        """Steps in the checkpoint folder."""
        return sorted(int(p.name[5:]) for p in self.run.folder.checkpoints.glob("step-*"))

    def loaders(self, batch_size: int) -> list[dict[str, Any]]:
        """What data loaders with microbatches of this size were given."""
        calls = self.spy.calls["StatefulDataLoader"]
        return [call for call in calls if call["batch_sampler"].size == batch_size]


def words(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the command line of settings."""
    found: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            section, _, name = key.rpartition(".")
            found.append(f"--{key}" if value else f"--{section}.no_{name}")
        elif isinstance(value, list) and key.endswith((".sources", ".more")):
            found += [f"--{key}", _array_of_tables(value)]
        elif isinstance(value, list):
            found += [f"--{key}", *value]
        else:
            found.append(f"--{key}={placed(value, folder)}")
    return found


def _array_of_tables(sources: list[Any]) -> str:
    tables = [{k: v for k, v in table.items() if v is not None} for table in plain(sources)]
    inline = [", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) for table in tables]
    return f"[{', '.join(f'{{{one}}}' for one in inline)}]"


def placed(value: Any, folder: Path) -> Any:
    """Return a value of the table with its folder filled in."""
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


def settings_of(name: str) -> Settings:
    """Return every setting of a run: its own rows and what they need beside them."""
    own = {key: row.value for key, row in key_rows.RUNS[name].items()}
    train = {key: row.value for key, row in key_rows.TRAIN.items()}
    another = train | QUIET | {"job.dump_folder": f"{{folder}}/{name}"}
    beside: dict[str, Settings] = {
        "train": {},
        "resume": train | {"checkpoint.last_save_in_hf": False},
        "validate": train,
        "on_from": another | {"checkpoint.last_save_in_hf": False},
        "from_hf": another
        | {
            "checkpoint.initial_load_path": "{folder}/run/hf",
            "data.last_row": "keep",
            "data.stride": 0,
            "training.local_batch_size": 1,
            "training.dtype": "float32",
            "training.mixed_precision_reduce": "float32",
        },
        "streamed": another
        | {
            "checkpoint.enable": False,
            "data.last_row": "keep",
            "data.stride": 0,
            "training.steps": 1,
        },
        "preferred": another
        | LEFT_OUT
        | {
            "checkpoint.enable": False,
            "data.format": "preference",
            "data.long_document": "drop",
            "data.packing": "none",
            "objective.name": "dpo",
            "training.dataset_path": "{folder}/pairs.jsonl",
            "training.seq_len": 64,
            "training.steps": 1,
        },
        "compiled": another
        | {
            "activation_checkpoint.mode": "none",
            "checkpoint.enable": False,
            "training.dataset": "python_stdlib",
            "training.dataset_path": "None",
            "training.steps": 1,
            "validation.enable": True,
            "validation.dataset": "python_stdlib",
            "validation.dataset_path": "None",
        },
        "low_precision": another | {"checkpoint.enable": False, "training.steps": 1},
        "laid_out": SMALL | {"parallelism.data_parallel_shard_degree": 1},
        "overlapped": SMALL
        | {
            "activation_checkpoint.mode": "memory_budget",
            "compile.enable": True,
            "parallelism.tensor_parallel_degree": 2,
        },
        "on_cuda": {"profiling.profile_freq": 1},
    }
    return beside[name] | own


def prepare(folder: Path) -> None:
    """Write the tokenizer and the text of all runs, and an adapter of one."""
    vocabulary = {f"w{number}": number for number in range(60)} | {"?": 60, "<s>": 61, "</s>": 62}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    for name in ("assets", "tokenizer"):
        (folder / name).mkdir()
        backend.save(str(folder / name / "tokenizer.json"))
        marks = {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(marks))
    for name, num_documents in (("train", 60), ("validation", 30)):
        texts = [" ".join(f"w{i * j % 60}" for j in range(4 + i)) for i in range(num_documents)]
        lines = [json.dumps({"body": one}) + "\n" for one in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    _write_adapter(folder / "peft")
    pairs = [{"prompt": f"w{n}", "chosen": f"w{n} w1", "rejected": "w2"} for n in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))


def _write_adapter(folder: Path) -> None:
    """Write a DoRA of rank 3 for the keys of `own_parts.TINY`, as PEFT does."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_rslora": True, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    width, outputs = TINY.hidden_size, TINY.num_kv_heads * TINY.head_dim
    sizes = {"lora_A.weight": (3, width), "lora_B.weight": (outputs, 3)}
    sizes |= {"lora_magnitude_vector": (outputs,)}
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.k_proj.{part}": torch.ones(size)
        for layer in range(TINY.num_layers)
        for part, size in sizes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def drive(name: str, folder: Path) -> Seen:
    """Take one run of the table, with a spy on every key."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, _restored(), spying(patch) as spy:
        for place in RECORDED:
            spy.record(patch, place)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            config = load_config(words(settings_of(name), folder))
            DRIVERS.get(name, _fit)(config, folder, spy, patch)
    return Seen(config=config, spy=spy, printed=printed.getvalue(), folder=folder)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Give back what a run sets for its whole process."""
    before, was_deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    try:
        with functorch.patch(activation_memory_budget=1.0, visualize_memory_budget_pareto=False):
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def _fit(config: JobConfig, folder: Path, spy: Spy, patch: pytest.MonkeyPatch) -> None:
    fit(config)


def _fit_with_wandb(config: JobConfig, folder: Path, spy: Spy, patch: pytest.MonkeyPatch) -> None:
    # Its debugging looks up the C++ stack of every operation, which takes minutes.
    place = "parallelisms.activation_checkpoint.checkpoint"
    spy.record(patch, place, lambda *args, **options: checkpoint(*args, **options | QUICK))
    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.__dict__["init"] = lambda **options: MagicMock()
    patch.setitem(sys.modules, "wandb", fake)
    spy.record(patch, "wandb.init")
    fit(config)


def _fit_compiled(config: JobConfig, folder: Path, spy: Spy, patch: pytest.MonkeyPatch) -> None:
    spy.record(patch, "torch.compile", lambda forward, **options: forward)
    fit(config)


def _lay_out(config: JobConfig, world_size: int) -> None:
    """Do what `engine.build.build` does to a model, as the first of many ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        architecture = resolve_architecture(config.model, ModelNeeds(device_type="cpu"))
        parallelize(
            architecture.build_meta(),
            architecture.plan,
            ParallelDims.of(config.parallelism, world_size).build("cpu"),
            parallel=config.parallelism,
            precision=precision_of(config),
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile,
        )
    finally:
        dist.destroy_process_group()


def _lay_out_on_eight(config: JobConfig, folder: Path, spy: Spy, patch: pytest.MonkeyPatch) -> None:
    check(config, 8)
    _lay_out(config, 8)


def _overlap_on_four(config: JobConfig, folder: Path, spy: Spy, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    spy.record(patch, "torch.compile", lambda forward, **options: forward)
    spy.record(patch, "parallelisms.apply.overlap_tensor_parallel", lambda mesh: None)
    spy.record(patch, "parallelisms.fsdp.gather_by_copy_engine", lambda modules, mesh: None)
    _lay_out(config, 4)
    spy.calls["functorch"] = [
        {
            "budget": functorch.activation_memory_budget,
            "visualize": functorch.visualize_memory_budget_pareto,
        }
    ]


def _take_parts(config: JobConfig, folder: Path, spy: Spy, patch: pytest.MonkeyPatch) -> None:
    join = dist.init_process_group
    patch.setattr(dist, "init_process_group", lambda backend, **options: join("gloo", **options))
    patch.setattr(torch.cuda, "set_device", lambda device: None)
    with process_group(config.comm, torch.device("cuda", 0), folder):
        names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
        spy.calls["environment"] = [{name: os.environ[name] for name in names}]
    if dist.is_initialized():  # with a GPU the context leaves the group to the next line
        dist.destroy_process_group()
    patch.setattr("models.layers.liger.unsupported_reason", lambda device_type: None)
    architecture = resolve_architecture(config.model, ModelNeeds(device_type="cuda"))
    spy.calls["architecture"] = [{"sizes": architecture.config}]
    patch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: None)
    patch.setattr(torch.cuda.memory, "_snapshot", dict)
    with Profiler(config.profiling, folder, rank=0, device_type="cuda") as profiler:
        profiler.after_step()
    trackers = build_trackers(config.metrics, folder, rank=1, total_steps=1)
    trackers.write(1, {"loss": 1.0})
    trackers.close()


DRIVERS: dict[str, Callable[[JobConfig, Path, Spy, pytest.MonkeyPatch], None]] = {
    "on_from": _fit_with_wandb,
    "compiled": _fit_compiled,
    "laid_out": _lay_out_on_eight,
    "overlapped": _overlap_on_four,
    "on_cuda": _take_parts,
}
"""Runs that are more than `fit`, or less."""
