"""A run in the test's own process: a Hugging Face folder of a tiny Llama, dummy tokens."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import tokenizers
from safetensors.torch import save_file
from tokenizers import models
from torch import Tensor

from engine.cli import load_config
from engine.config import JobConfig
from models.registry import load_family
from tests.parity.cases import Case, model_config

SIZES = replace(model_config(Case()), num_layers=1)


def tiny_folder(folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write config.json and tokenizer of the tiny Llama, and its weights where they are given."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(load_family("llama3").config_to_hf(SIZES)))
    words = {f"word{number}": number for number in range(SIZES.vocab_size)}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="word0")).save(
        str(folder / "tokenizer.json")
    )
    if weights is not None:
        save_file(dict(weights), folder / "model.safetensors")
    return folder


def tiny_config(folder: Path, *options: str) -> JobConfig:
    """Return the configuration of a run on dummy tokens in `folder`/run, of the model in `folder`.

    `folder` must hold `tiny_folder(folder / "hf")`.
    """
    return load_config(
        [
            f"--job.dump_folder={folder / 'run'}",
            f"--model.hf_assets_path={folder / 'hf'}",
            f"--data.cache_folder={folder / 'cache'}",
            *("--job.device=cpu", "--training.mixed_precision_param=float32"),
            "--activation_checkpoint.mode=none",
            *("--training.dataset=dummy", "--training.seq_len=16", "--training.local_batch_size=1"),
            *options,
        ]
    )
