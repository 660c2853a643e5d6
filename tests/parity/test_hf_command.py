"""`python -m engine.verify hf`: equal folders, and planted faults named with block and part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.hf_weights import HfWeights
from engine.verify import hf_command
from engine.verify.__main__ import main
from engine.verify.variants import random_model
from models.decoder import DecoderConfig
from models.registry import ModelFamily, family_for_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model("qwen3_window_bias").save_pretrained(path)
    return path


def verify(folder: Path, *arguments: str) -> int:
    return main(["hf", "--model", str(folder), "--device", "cpu", *arguments])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_equal_folder_is_equal_to_its_last_state(folder: Path, dtype: str, capsys) -> None:
    assert verify(folder, "--dtype", dtype, "--tokens", "96") == 0
    printed = capsys.readouterr().out
    assert f"{dtype}, 96 tokens, 89 states compared" in printed
    assert "equal to" in printed


def reading_otherwise(
    change: Callable[[DecoderConfig], DecoderConfig],
) -> Callable[..., ModelFamily]:
    def wrong(hf_config: dict[str, object]) -> ModelFamily:
        family = family_for_hf(hf_config)
        return replace(family, config_from_hf=lambda hf: change(family.config_from_hf(hf)))

    return wrong


OTHER_SETTINGS = {
    "rope": (
        lambda c: replace(c, rope=replace(c.rope, theta=c.rope.theta / 2)),
        "input of model.layers.0.self_attn.o_proj (attention)",
        "look at rotary embedding",
    ),
    "window": (
        lambda c: replace(c, layer_types=("full_attention", *c.layer_types[1:])),
        "input of model.layers.0.self_attn.o_proj (attention)",
        "window",
    ),
    "epsilon": (
        lambda c: replace(c, norm_eps=1e-3),
        "output of model.layers.0.input_layernorm (norm)",
        "look at its weights and settings",
    ),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_setting_that_we_read_otherwise_is_traced_to_what_uses_it(
    name: str, folder: Path, monkeypatch, capsys
) -> None:
    change, place, hint = OTHER_SETTINGS[name]
    monkeypatch.setattr(hf_command, "family_for_hf", reading_otherwise(change))
    assert verify(folder) == 1
    printed = capsys.readouterr().out
    assert f"different: the hidden states part at the {place}" in printed
    assert hint in printed


WRONG_WEIGHTS = {
    "model.embed_tokens": "embedding",
    "model.layers.1.self_attn.v_proj": "attention",
    "model.layers.1.self_attn.k_norm": "norm",
    "model.layers.2.post_attention_layernorm": "norm",
    "model.layers.2.mlp.down_proj": "feed-forward",
    "lm_head": "head",
}


@pytest.mark.parametrize(("module", "part"), WRONG_WEIGHTS.items())
def test_a_weight_that_we_read_wrong_is_named(
    module: str, part: str, folder: Path, monkeypatch, capsys
) -> None:
    read = HfWeights.read

    def wrong(self: HfWeights, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        tensor = read(self, name, slices)
        return tensor * 1.01 if name == f"{module}.weight" else tensor

    monkeypatch.setattr(HfWeights, "read", wrong)
    assert verify(folder) == 1
    printed = capsys.readouterr().out
    assert f"part at the output of {module} ({part})" in printed
    blocks_before = int(module.split(".")[2]) if ".layers." in module else 0
    assert (f"the {blocks_before + 1} block inputs before are equal" in printed) == bool(
        ".layers." in module
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0: give at least 1"),
        (["--prompt", "def "], "holds no tokenizer; leave it out"),
        (["--model", "no_such_folder"], "--model no_such_folder is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], message: str, folder: Path, capsys
) -> None:
    assert verify(folder, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_weights_of_another_model_are_refused_before_anything_is_computed(
    folder: Path, tmp_path: Path, capsys
) -> None:
    random_model("qwen3").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert verify(tmp_path) == 2
    assert "has shape (64, 48), the model has (32, 48)" in capsys.readouterr().err
    assert torch.is_grad_enabled()
