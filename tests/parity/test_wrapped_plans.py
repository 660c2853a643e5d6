"""Wrapped models on two ranks give the loss and the gradients of transformers' module alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from engine.loop import fit
from engine.verify.parity import checkpoint_config
from models.families.hf import FAMILY
from models.wrapped.initial import initial_values
from parallelisms import ParallelConfig, ParallelDims
from parallelisms.apply import parallelize
from parallelisms.compile import CompileConfig
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import fill, materialise
from tests.end_to_end.launch import free_port
from tests.engine.tiny_run import SIZES, packed_documents, rows_of_run, tiny_config, tiny_folder
from tests.parity.wrapped_cases import MODELS, SEED, alone, packed_rows, plain, wrapped
from tests.ranks import RankPool, leave_process_group

FP32_REORDERED_SUM = 1e-5  # documents alone against packed rows, relative to the largest gradient
FSDP = {"data_parallel_shard_degree": 2}
TP = {"tensor_parallel_degree": 2, "sequence_parallel": False}
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("gpt2", FSDP, "full", ""),
    ("granite", FSDP, "2", "aot_eager"),
    ("olmo", TP, "op", ""),
    ("granite", TP, "none", ""),
    ("starcoder2", TP, "full", ""),
]
"""Model, layout, checkpointing and backend of the compiler."""


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parallel_model(
    name: str, layout: dict[str, Any], checkpointing: str, backend: str
) -> tuple[nn.Module, ParallelDims]:
    sizes = FAMILY.config_from_hf(MODELS[name])
    parallel = ParallelConfig(**layout)
    dims = ParallelDims.of(parallel, 2).build("cpu")
    with torch.device("meta"):
        model = FAMILY.build(sizes)
    parallelize(
        model,
        sizes.plan,
        dims,
        parallel=parallel,
        precision=PrecisionConfig(param_dtype=torch.float32),
        activation_checkpoint=checkpoint_config(checkpointing),
        compile=CompileConfig(enable=bool(backend), backend=backend or "inductor"),
    )
    materialise(model, "cpu")
    fill(model, initial_values(model, sizes, seed=SEED))
    return model, dims


def differences(case: tuple[str, dict[str, Any], str, str]) -> dict[str, float]:
    """Return how far loss and gradients are apart, relative to the largest value of each."""
    name, *_ = case
    model, dims = parallel_model(*case)
    for parameter_name, expected in wrapped(MODELS[name]).named_parameters():
        assert torch.equal(whole(model.get_parameter(parameter_name)), expected), parameter_name
    rows = packed_rows()
    num_labels = (rows["labels_BT"] >= 0).sum()
    mine = {key: value.chunk(dims.batch_degree)[dims.batch_rank] for key, value in rows.items()}
    (-model(mine.pop("tokens_BT"), **mine).sum() / num_labels).backward()
    theirs = plain(MODELS[name])
    (-torch.cat(alone(theirs, rows)).sum() / num_labels).backward()
    errors = {}
    for parameter_name, parameter in theirs.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name
        found = whole(model.get_parameter(parameter_name).grad)
        scale = parameter.grad.abs().max()
        errors[parameter_name] = ((found - parameter.grad).abs().max() / scale).item()
    return errors


def folder_of(name: str, folder: Path) -> Path:
    """Write config.json, tokenizer and documents of one of `MODELS`, with the words of a run."""
    folder.mkdir()
    tiny_folder(folder / "hf")
    hf = {**MODELS[name], "vocab_size": SIZES.vocab_size}
    (folder / "hf" / "config.json").write_text(json.dumps(hf))
    return folder


def train(folder: Path, *options: str) -> list[dict[str, Any]]:
    settings = ("--model.name=hf", "--training.global_batch_size=4", "--metrics.log_freq=1")
    fit(tiny_config(folder, *settings, *packed_documents(folder), *options))
    return rows_of_run(folder)


def on_two_ranks(rank: int, world_size: int, port: int, folder: Path) -> Any:
    found = [differences(case) for case in CASES]
    leave_process_group()  # the run joins one as torchrun's ranks do
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return found, train(folder, "--training.steps=5")


def test_two_ranks_give_the_losses_and_gradients_of_one(ranks: RankPool, tmp_path: Path) -> None:
    two, one = (folder_of("gpt2", tmp_path / name) for name in ("two", "one"))
    (found, rows), _ = ranks(2, on_two_ranks, free_port(), two, timeout_seconds=280)
    for case, errors in zip(CASES, found, strict=True):
        far = {name: error for name, error in errors.items() if error > FP32_REORDERED_SUM}
        assert not far, (case, far)
    expected = train(one, "--training.steps=5")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
