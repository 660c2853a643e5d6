"""A run of a tiny Llama: its Hugging Face folder, dummy tokens or packed documents."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
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
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="word0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.save(str(folder / "tokenizer.json"))
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


def packed_documents(folder: Path) -> tuple[str, ...]:
    """Write documents of 2 to 22 tokens; return the options that read them, held out ones too.

    Each row of 13 tokens holds other documents than the one before it.
    """
    for name, numbers in (("train", range(60)), ("validation", range(100, 116))):
        texts = [
            " ".join(f"word{(n * n + 7 * k) % SIZES.vocab_size}" for k in range(2 + n % 21))
            for n in numbers
        ]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return (
        *("--training.dataset=jsonl", f"--training.dataset_path={folder / 'train.jsonl'}"),
        *("--validation.dataset=jsonl", f"--validation.dataset_path={folder / 'validation.jsonl'}"),
        *("--training.seq_len=13", "--validation.seq_len=13", "--data.num_processes=1"),
    )


def rows_of_run(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of numbers that the run in `folder` wrote."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
