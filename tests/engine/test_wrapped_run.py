"""Runs of `model.name = "hf"`: weights in and out, resumed, frozen, converted, completed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from engine.cli import run_command
from engine.convert import checkpoint_to_hf, compare_logits, find_step, hf_to_checkpoint
from engine.loop import fit
from engine.reference import build_reference
from engine.rules import gather_facts
from scripts.generate import main as generate
from tests.engine.test_preference_run import run as run_on_pairs
from tests.engine.test_preference_run import write as write_pairs
from tests.engine.tiny_run import SIZES, packed_documents, rows_of_run, tiny_config, tiny_folder
from tests.parity.wrapped_cases import MODELS, wrapped

GPT2 = {**MODELS["gpt2"], "vocab_size": SIZES.vocab_size}
PREFIX = "transformer."
FROZEN = ("--model.freeze", "transformer.wte", "blocks:bottom:1")
CONSTANT_RATE = ("--lr_scheduler.warmup_steps=0", "--lr_scheduler.decay_ratio=0.0")


def folder_without_prefix(folder: Path) -> dict[str, Tensor]:
    """Write GPT-2 as its authors did: no name of the base model, and masks beside parameters."""
    tiny_folder(folder)
    (folder / "config.json").write_text(json.dumps(GPT2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPT2))
    weights = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(2)}
    save_file({**weights, **masks}, folder / "model.safetensors")
    return {PREFIX + name: tensor for name, tensor in weights.items()}


def run(folder: Path, *options: str) -> list[dict[str, Any]]:
    settings = ("--model.name=hf", "--checkpoint.enable", "--checkpoint.last_save_in_hf")
    settings += ("--metrics.log_freq=1", "--checkpoint.interval=2", *CONSTANT_RATE)
    data = packed_documents(folder)
    fit(tiny_config(folder, *settings, *data, *options))
    return rows_of_run(folder)


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "hf" / "model.safetensors")


def test_weights_come_back_bit_equal_with_all_that_transformers_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder_without_prefix(tmp_path / "hf")
    loaded = ("--checkpoint.initial_load_in_hf", "--training.steps=1", "--optimizer.lr=0")
    rows = run(tmp_path, *loaded, "--validation.enable", "--validation.freq=1")
    assert rows[0]["validation_loss"] == pytest.approx(rows[0]["loss"], rel=0.2)
    found, out = exported(tmp_path), tmp_path / "run" / "hf"
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in GPT2} == GPT2
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 5}
    assert (out / "tokenizer.json").is_file()
    theirs: Any = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight

    hf_to_checkpoint(tmp_path / "hf", tmp_path / "dcp" / "step-0", torch.float32)
    step = find_step(tmp_path / "dcp")
    checkpoint_to_hf(step, tmp_path / "again", torch.float32)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert compare_logits(step, tmp_path / "again", torch.float32).max_abs == 0.0

    arguments = ["--model", str(out), "--prompt", "word1 word2", "--max_new_tokens", "3"]
    capsys.readouterr()
    assert run_command(generate, arguments) == 0
    completed: Any = theirs.generate(
        torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    words = [f"word{number}" for number in completed[0].tolist()]
    assert capsys.readouterr().out.split() == words


def test_a_resumed_run_with_frozen_layers_is_the_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        tiny_folder(tmp_path / name / "hf")
        (tmp_path / name / "hf" / "config.json").write_text(json.dumps(GPT2))
    whole = run(tmp_path / "whole", "--training.steps=4", *FROZEN)
    run(tmp_path / "parts", "--training.steps=2", "--checkpoint.no_last_save_model_only", *FROZEN)
    parts = run(tmp_path / "parts", "--training.steps=4", *FROZEN)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    first, last = exported(tmp_path / "whole"), exported(tmp_path / "parts")
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())
    log = (tmp_path / "whole" / "run" / "logs" / "rank-0.log").read_text()
    assert "trained without its dropout (" in log and "resid_pdrop = 0.1" in log
    start = dict(wrapped(GPT2, seed=42).named_parameters())
    moved = {name for name, tensor in first.items() if not torch.equal(tensor, start[name])}
    assert moved == {n for n in start if ".wte." not in n and ".h.0." not in n}


def test_the_reference_of_a_wrapped_model_starts_as_it_does_and_may_be_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[torch.nn.Module] = []

    def kept(*args: Any) -> torch.nn.Module:
        built.append(build_reference(*args))
        return built[-1]

    monkeypatch.setattr("engine.reference.build_reference", kept)
    # As among several ranks: one holds frozen parameters whole, and gathers none.
    monkeypatch.setattr("parallelisms.fsdp._whole_frozen", lambda *args: set())
    folder_without_prefix(tmp_path / "hf")
    write_pairs(tmp_path / "pairs.jsonl", range(6))
    write_pairs(tmp_path / "held_out.jsonl", range(6, 9))
    once = ("--model.name=hf", "--training.seq_len=60", "--training.steps=1")
    rows = run_on_pairs(tmp_path, "run", *once, "--validation.no_enable")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # The tied embedding is of the model's own unit, which FSDP leaves gathered in a forward pass.
    assert all(isinstance(one, DTensor) for one in built[0].parameters())
    named = ("--model.name=hf", "--objective.name=dpo")
    named += (f"--objective.reference_path={tmp_path / 'hf'}",)
    facts, _ = gather_facts(tiny_config(tmp_path, *named), 1)
    assert facts.reference_difference is None
    for changes, said in (
        ({"resid_pdrop": 0.3, "activation_function": "gelu_new"}, None),
        ({"activation_function": "relu"}, "activation_function is 'relu' there and 'gelu_new'"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**GPT2, **changes}))
        found = facts.reference_difference
        assert (said in (found or "")) if said else found is None, found
