"""Which architecture and attention backend a configuration means."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cli import load_config
from engine.model import ModelConfig, ModelNeeds, find_architecture, resolve_architecture
from engine.rules import model_needs
from models.registry import load_family


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    family = load_family("llama3")
    content = family.config_to_hf(family.flavor("debugmodel"))
    (tmp_path / "config.json").write_text(json.dumps({**content, "hidden_size": 64}))
    return tmp_path


def test_a_config_json_decides_the_sizes_and_the_flavor_is_ignored(hf_folder: Path) -> None:
    found = find_architecture(ModelConfig(hf_assets_path=str(hf_folder), flavor="8B"))
    assert found.config.hidden_size == 64 and found.config.vocab_size == 4096
    assert "model.flavor is ignored" in found.origin


def test_a_config_json_of_another_family_is_refused(hf_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.name = 'qwen3', .* set model\.name = 'llama3'"):
        find_architecture(ModelConfig(name="qwen3", hf_assets_path=str(hf_folder)))


def test_a_config_json_that_cannot_be_read_is_named(hf_folder: Path) -> None:
    (hf_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        find_architecture(ModelConfig(hf_assets_path=str(hf_folder)))


def test_a_family_that_is_not_there_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"^model\.name = 'lama3'.*did you mean 'llama3'"):
        find_architecture(ModelConfig(name="lama3"))


def test_a_folder_that_is_not_there_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"model\.hf_assets_path = 'nowhere'"):
        find_architecture(ModelConfig(hf_assets_path="nowhere"))


@pytest.mark.parametrize(
    ("flavor", "attention", "device_type", "training", "backend"),
    [
        ("debugmodel", "auto", "cpu", True, "sdpa"),
        ("debugmodel", "auto", "cuda", True, "flex"),
        ("debugmodel", "sdpa", "cuda", True, "sdpa"),
        ("debugmodel_flex", "auto", "cpu", False, "flex"),
    ],
)
def test_the_attention_backend_is_the_one_asked_for(
    flavor: str, attention, device_type: str, training: bool, backend: str
) -> None:
    config = ModelConfig(flavor=flavor, attention=attention)
    needs = ModelNeeds(device_type=device_type, training=training)
    found = resolve_architecture(config, needs)
    assert found.config.attention == backend


def test_a_backend_that_cannot_run_is_refused_and_never_replaced() -> None:
    with pytest.raises(ValueError, match=r"model\.attention = 'flex' .*no backward on CPU"):
        resolve_architecture(ModelConfig(attention="flex"), ModelNeeds(device_type="cpu"))


@pytest.mark.parametrize(
    ("changes", "is_installed", "backend"),
    [
        ({}, True, "cudnn"),
        ({}, False, "flex"),
        ({"whole_rows": False}, True, "flex"),
        ({"dtype": torch.float32}, True, "flex"),
    ],
)
def test_auto_takes_cudnn_on_gpus_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_installed: bool, backend: str
) -> None:
    monkeypatch.setattr("engine.model.find_spec", lambda name: is_installed or None)
    needs = ModelNeeds(device_type="cuda", **{"dtype": torch.bfloat16, **changes})
    found = resolve_architecture(ModelConfig(flavor="8B"), needs)
    assert found.config.attention == backend


@pytest.mark.parametrize(
    ("changes", "refusal", "kernels"),
    [
        ({"separate_operations": True}, None, "liger"),
        ({"separate_operations": True}, "not installed", "torch"),
        ({}, None, "torch"),
    ],
)
def test_auto_takes_ligers_kernels_where_nothing_fuses_and_they_can_run(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], refusal: str | None, kernels: str
) -> None:
    monkeypatch.setattr("models.layers.liger.unsupported_reason", lambda device_type: refusal)
    needs = ModelNeeds(device_type="cuda", dtype=torch.bfloat16, **changes)
    found = resolve_architecture(ModelConfig(flavor="8B"), needs)
    assert found.config.kernels == kernels


def test_a_compiled_or_tensor_parallel_run_leaves_fusing_to_the_compiler() -> None:
    def needs(*options: str) -> bool:
        return model_needs(load_config(list(options)), "cuda").separate_operations

    assert needs()
    assert not needs("--compile.enable")
    assert not needs("--parallelism.tensor_parallel_degree=2")
