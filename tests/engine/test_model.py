"""Which architecture and attention backend a configuration means."""

import json
from pathlib import Path

import pytest

from engine.model import ModelConfig, find_architecture, resolve_architecture
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
    found = resolve_architecture(config, device_type=device_type, training=training)
    assert found.config.attention == backend


def test_a_backend_that_cannot_run_is_refused_and_never_replaced() -> None:
    with pytest.raises(ValueError, match=r"model\.attention = 'flex' .*no backward on CPU"):
        resolve_architecture(ModelConfig(attention="flex"), device_type="cpu", training=True)
