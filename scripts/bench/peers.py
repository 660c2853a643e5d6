"""The same rows trained by other engines: torchtitan, and transformers' Trainer.

Each runs in processes of its own, on the very tokens that our run of the row reads, where it is
installed; else the record says that it is not. What they can be told of a row is told: model,
batch, length, degrees, activation checkpointing; both have fp32 masters and compute in bf16.
"""

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from engine.batches import open_training_rows
from engine.build import open_tokenizer
from engine.cli import load_config
from engine.config import JobConfig
from engine.model import Architecture, find_architecture
from models.decoder_config import DecoderConfig
from parallelisms.mesh import ParallelDims
from scripts.bench.measure import log_file, outcome, run_logged, torchrun, training_steps
from scripts.bench.suites import BenchRow

LOGGED_EVERY_STEPS = 5
"""torchtitan waits for the device where it logs; so that it may queue the steps between."""

TITAN_LINE = re.compile(
    r"step:\s*(\d+)\s.*?loss:\s*([\d.]+).*?memory:\s*([\d.]+)GiB.*?tps:\s*([\d,]+).*?mfu:\s*([\d.]+)%"
)
PACKAGES = {
    "torchtitan": ("torchtitan", "torchdata", "tyro"),
    "transformers": ("transformers", "accelerate"),
    "transformers-liger": ("transformers", "accelerate", "liger_kernel"),
}
"""What a peer needs, itself first. torchtitan also imports datasets, which no row of ours uses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRow:
    """A row, as a peer is told of it."""

    row: BenchRow
    config: JobConfig
    architecture: Architecture

    @classmethod
    def of(cls, row: BenchRow) -> "PeerRow":
        """Read a row's configuration."""
        config = load_config([f"--job.config_file={row.config_file}", *row.overrides])
        return cls(row=row, config=config, architecture=find_architecture(config.model))

    @property
    def has_documents(self) -> bool:
        """Whether attention must tell documents of a row apart."""
        return self.config.training.dataset != "dummy"

    def write_rows(self, folder: Path) -> None:
        """Write the tokens and labels of every row of every step, in the order they are read."""
        training = self.config.training
        degree = ParallelDims.of(self.config.parallelism, self.row.gpus).batch_degree
        source = open_training_rows(self.config, open_tokenizer(self.config), batch_degree=degree)
        read = range(training.rows_per_step(degree) * training_steps(self.row))
        rows = [source.row(number) for number in read]
        for name in ("tokens", "labels"):
            np.save(folder / f"{name}.npy", np.stack([getattr(r, f"{name}_T") for r in rows]))


def missing(peer: str) -> list[str]:
    """Return the packages of a peer that are not installed."""
    return [name for name in PACKAGES[peer] if find_spec(name) is None]


def peers_of(told: PeerRow) -> list[str]:
    """Return the peers that can train the same as a row, each with the attention it is to use."""
    config, sizes = told.config, told.architecture.config
    is_told_whole = (
        not config.adapter.specs
        and config.objective.name == "pretrain"
        and config.optimizer.name == "AdamW"
    )
    if not is_told_whole:
        return []
    names = ["torchtitan sdpa"]
    if told.has_documents and config.parallelism.context_parallel_degree == 1:
        names = ["torchtitan flex", "torchtitan varlen"]
    if config.model.name != "llama3" or sizes.tie_word_embeddings:
        names = []  # torchtitan's Llama has a head of its own
    if told.row.gpus == 1 and not told.has_documents and not config.model.converters:
        names += ["transformers", "transformers-liger"]
    return names


def titan_config(told: PeerRow, folder: Path) -> dict[str, Any]:
    """Return torchtitan's configuration of a row, by section."""
    config, training = told.config, told.config.training
    parallel = config.parallelism
    return {
        "job": {"dump_folder": str(folder / "titan")},
        "metrics": {"log_freq": LOGGED_EVERY_STEPS, "disable_color_printing": True},
        "model": {
            **{"name": "bench", "flavor": "row", "hf_assets_path": str(folder)},
            "converters": ["quantize.linear.float8"] if config.model.converters else [],
        },
        "quantize": {"linear": {"float8": _float8_settings(config)}},
        "optimizer": {"name": "AdamW", "lr": config.optimizer.lr, "implementation": "fused"},
        "lr_scheduler": {"warmup_steps": config.lr_scheduler.warmup_steps},
        "training": {
            "local_batch_size": training.local_batch_size,
            "global_batch_size": training.global_batch_size,
            "seq_len": training.seq_len,
            "steps": training_steps(told.row),
            "dtype": training.dtype,
            "mixed_precision_param": training.mixed_precision_param,
            "mixed_precision_reduce": training.mixed_precision_reduce,
        },
        "parallelism": {
            name: getattr(parallel, name)
            for name in (
                *("data_parallel_replicate_degree", "data_parallel_shard_degree"),
                *("tensor_parallel_degree", "context_parallel_degree"),
                *("fsdp_reshard_after_forward", "enable_async_tensor_parallel"),
            )
        },
        "activation_checkpoint": {
            "mode": config.activation_checkpoint.mode,
            "selective_ac_option": config.activation_checkpoint.selective_ac_option,
        },
        "compile": {"enable": True, "components": ["model", "loss"]},
        "checkpoint": {"enable": False},
    }


def _float8_settings(config: JobConfig) -> dict[str, Any]:
    """Return what the row says of float8, in torchtitan's own words; the head stays in bf16."""
    told = asdict(config).get("quantize", {}).get("linear", {}).get("float8", {})
    names = ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")
    shared = {name: told[name] for name in (*names, "recipe_name") if told.get(name) is not None}
    return {**shared, "filter_fqns": ["output"]}


def titan_model(sizes: DecoderConfig, attention: str) -> dict[str, Any]:
    """Return torchtitan's arguments of a Llama of these sizes.

    Its feed-forward width is rounded up to `multiple_of` from a multiple of the model's: half of
    what is wanted, rounded up to it.
    """
    hidden = sizes.intermediate_size
    return {
        "dim": sizes.hidden_size,
        "n_layers": sizes.num_layers,
        "n_heads": sizes.num_heads,
        "n_kv_heads": sizes.num_kv_heads,
        "vocab_size": sizes.vocab_size,
        "multiple_of": hidden,
        "ffn_dim_multiplier": hidden / (8 * sizes.hidden_size / 3) / 2,
        "norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope.theta,
        "attn_type": attention,
        "attn_mask_type": "causal" if attention == "sdpa" else "block_causal",
    }


def titan_summary(log_text: str, warmup_steps: int) -> dict[str, Any]:
    """Return the median of what torchtitan logged after warm-up, and its largest memory."""
    found = [match.groups() for match in TITAN_LINE.finditer(log_text)]
    steady = [values for values in found if int(values[0]) > warmup_steps]
    if not steady:
        return {"outcome": "failed", "error": f"no step was logged: {log_text[-2000:]}"}
    speeds = [float(tps.replace(",", "")) for *_, tps, _ in steady]
    return {
        "steps_measured": int(steady[-1][0]) - warmup_steps,
        "tokens_per_second_per_gpu": statistics.median(speeds),
        "slowest_and_fastest": [min(speeds), max(speeds)],
        "mfu": statistics.median(float(mfu) for *_, mfu in steady) / 100,
        "peak_memory_gib": max(float(gib) for _, _, gib, _, _ in found),
        "first_and_last_loss": [float(found[0][1]), float(found[-1][1])],
    }


def titan_command(told: PeerRow, attention: str, folder: Path) -> list[str]:
    """Write what torchtitan reads of a row, and return the command line."""
    model = titan_model(told.architecture.config, attention)
    eos_id = open_tokenizer(told.config).eos_id
    (folder / "model.json").write_text(json.dumps({"eos_id": eos_id, "arguments": model}))
    file = folder / "titan.toml"
    file.write_text(tomli_w.dumps(titan_config(told, folder)))
    module = "scripts.bench.titan_peer"
    return torchrun(told.row.gpus, "-m", module, f"--job.config_file={file}")


def trainer_command(told: PeerRow, folder: Path, *, uses_liger: bool) -> list[str]:
    """Write what the Trainer reads of a row, and return the command line."""
    family, training = told.architecture.family, told.config.training
    settings = {
        "model": family.config_to_hf(told.architecture.config),
        "local_batch_size": training.local_batch_size,
        "steps": training_steps(told.row),
        "warmup_steps": told.row.warmup_steps,
        "lr": told.config.optimizer.lr,
        "uses_liger": uses_liger,
    }
    (folder / "trainer.json").write_text(json.dumps(settings))
    return [sys.executable, "-m", "scripts.bench.trainer_peer", str(folder)]


def run_peer(
    told: PeerRow, name: str, folder: Path, log_folder: Path, timeout_seconds: float
) -> dict[str, Any]:
    """Train a row by a peer; what keeps it from training is recorded, not raised."""
    peer, _, attention = name.partition(" ")
    record: dict[str, Any] = {"row": told.row.name, "gpus": told.row.gpus, "peer": name}
    if absent := missing(peer):
        return {**record, "outcome": "not installed", "missing": absent}
    record["version"] = version(PACKAGES[peer][0])
    if peer == "torchtitan":
        arguments = titan_command(told, attention, folder)
    else:
        arguments = trainer_command(told, folder, uses_liger=peer == "transformers-liger")
    log = log_file(log_folder, f"{told.row.name} {name}")
    more = {"TESSERA_PEER_FOLDER": str(folder), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    started = time.perf_counter()
    code = run_logged(arguments, log, timeout_seconds, **more)
    record |= {"seconds": round(time.perf_counter() - started, 1), "exit_code": code}
    record |= outcome(code, log)
    if code != 0:
        return record
    if peer == "torchtitan":
        return record | titan_summary(log.read_text(errors="replace"), told.row.warmup_steps)
    return record | json.loads((folder / "result.json").read_text())


def run_peers(
    row: BenchRow, log_folder: Path, timeout_seconds: float, beginning: str = ""
) -> list[dict[str, Any]]:
    """Train a row by every peer that can, and whose name begins so, one after the other."""
    told = PeerRow.of(row)
    names: Sequence[str] = [name for name in peers_of(told) if name.startswith(beginning)]
    with tempfile.TemporaryDirectory() as folder:
        if any(not missing(name.partition(" ")[0]) for name in names):
            told.write_rows(Path(folder))
        return [run_peer(told, name, Path(folder), log_folder, timeout_seconds) for name in names]
