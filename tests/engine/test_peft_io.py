"""Adapter folders against the package peft, both ways; another model's adapter is refused."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.adapters import build_adapted, fill_adapters
from engine.checkpoint_storage import RankGroup
from engine.cli import load_config
from engine.config import JobConfig
from engine.hf_io import AdapterAssets, HfAssets
from engine.hf_weights import load_into
from engine.model import Architecture, find_architecture
from engine.peft_export import export_adapters
from engine.peft_io import AdapterFolder, fill_from, merge_into, read_adapters
from engine.verify.variants import random_model
from parallelisms.materialise import materialise
from tests.models.tiny import random_tokens

SAME_ARITHMETIC = 1e-5  # as for families: the same products, added up in another order
FAMILIES = {"llama_2": "llama3", "phi3": "phi3", "granite": "hf"}
TARGETS = {
    "llama_2": ["q_proj", "v_proj", "down_proj"],
    "phi3": ["[qkv]_proj", "o_proj", "gate_proj", "up_proj"],
    "granite": ["q_proj", "o_proj"],
}
THEIRS = {**TARGETS, "phi3": ["qkv_proj", "o_proj", "gate_up_proj"]}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a folder of each model with random weights, as transformers writes it."""
    home = tmp_path_factory.mktemp("bases")
    for variant in FAMILIES:
        random_model(variant).save_pretrained(home / variant)
    return home


def config_of(base: Path, **adapter: Any) -> JobConfig:
    options = [f"--model.name={FAMILIES[base.name]}", f"--model.hf_assets_path={base}"]
    for key, value in {"kind": "lora", "rank": 4, "alpha": 8.0, **adapter}.items():
        words = value if isinstance(value, list) else [str(value)]
        flag = f"--adapter.{key}" if value is not False else f"--adapter.no_{key}"
        options += [flag, *([] if isinstance(value, bool) else words)]
    return load_config(options)


def ours(base: Path, **adapter: Any) -> tuple[nn.Module, JobConfig, Architecture]:
    """Return the adapted model with the weights of `base`, and adapters without an effect."""
    config = config_of(base, targets=TARGETS[base.name], **adapter)
    architecture = find_architecture(config.model)
    model, _ = build_adapted(architecture, config.adapter)
    started = read_adapters(model, config, architecture)
    materialise(model, "cpu")
    load_into(model, base, architecture.family.key_map(architecture.config))
    fill_adapters(model, seed=0)
    fill_from(model, started)
    return model.eval(), config, architecture


def stir(model: nn.Module) -> None:
    """Give adapters other values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def write(
    model: nn.Module, config: JobConfig, architecture: Architecture, folder: Path
) -> dict[str, Tensor]:
    assets = HfAssets(
        key_map=architecture.family.key_map(architecture.config),
        config=architecture.family.config_to_hf(architecture.config),
        save_tokenizer=lambda target: None,
        adapters=AdapterAssets(
            specs=config.adapter.specs, base=config.model.hf_assets_path, merge=False
        ),
    )
    export_adapters(model, folder, assets, dtype=torch.float32, ranks=RankGroup())
    return load_file(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}


def logits(model: nn.Module) -> Tensor:
    tokens_BT = random_tokens(2, 24)
    with torch.no_grad():
        return model(tokens_BT, positions_BT=torch.arange(24).expand(2, 24))


def assert_close(found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= SAME_ARITHMETIC, error


def peft_logits(base: Path, folder: Path, *names: str) -> Tensor:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    first, *others = [folder / name for name in names] or [folder]
    model = peft.PeftModel.from_pretrained(model, str(first), adapter_name="default")
    for other in others:
        model.load_adapter(str(other), other.name)
    if others:
        model.base_model.set_adapter(["default", *(other.name for other in others)])
    with torch.no_grad():
        return model.eval()(random_tokens(2, 24)).logits


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_loads_what_we_write_with_our_logits_and_we_read_it_back_to_the_bit(
    folders: Path, tmp_path: Path, variant: str, kind: str
):
    base, rslora = folders / variant, kind == "lora"
    model, config, architecture = ours(base, kind=kind, use_rslora=rslora)
    stir(model)
    found = logits(model)
    write(model, config, architecture, tmp_path / "adapter")
    assert_close(found, peft_logits(base, tmp_path / "adapter"))
    again, *_ = ours(base, kind=kind, use_rslora=rslora, path=tmp_path / "adapter")
    expected = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(logits(again), found)
    plain = architecture.family.build(architecture.config)
    key_map = architecture.family.key_map(architecture.config)
    load_into(plain, base, key_map)
    merge_into(plain, AdapterFolder(tmp_path / "adapter"), key_map)
    assert_close(logits(plain.eval()), found)


@pytest.mark.parametrize("variant", FAMILIES)
def test_an_adapter_of_peft_gives_its_logits_here_and_is_written_as_it_was(
    folders: Path, tmp_path: Path, variant: str
):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = folders / variant
    theirs: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=THEIRS[variant], use_dora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, settings).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(random_tokens(2, 24)).logits
    model, config, architecture = ours(base, kind="dora", path=tmp_path / "theirs")
    assert_close(logits(model), expected)
    stored = write(model, config, architecture, tmp_path / "ours")
    if variant == "phi3":  # ours share no A, so the file joins more of them
        return
    original = load_file(tmp_path / "theirs" / WEIGHTS)
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)


def test_several_adapters_lie_in_folders_of_their_own_as_those_of_peft(
    folders: Path, tmp_path: Path
):
    base = folders / "llama_2"
    model, config, architecture = ours(
        base, more="[{name = 'second', rank = 2, alpha = 3.0, use_rslora = true}]"
    )
    stir(model)
    write(model, config, architecture, tmp_path / "both")
    assert_close(logits(model), peft_logits(base, tmp_path / "both", "", "second"))


def changed(**settings: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config.update(settings)


def without_a_module(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
        del tensors[name]


def with_another(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
        tensors[name.replace("q_proj", "o_proj")] = tensors[name].clone()


def narrower(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name][:40].clone()


def with_a_head(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)


MISTAKES: Mapping[str, tuple[Any, dict[str, Any], str]] = {
    "rank": (None, {"rank": 2}, r"its rank for .* is 4, and adapter.rank = 2; set .* = 4"),
    "alpha": (None, {"alpha": 9.0}, r"adapter.alpha = 9.*set adapter.alpha = 8 and"),
    "rslora": (None, {"use_rslora": True}, r"use_rslora = true.*use_rslora = false"),
    "kind": (None, {"kind": "dora"}, r"the other kind.*set adapter.kind = 'lora'"),
    "less": (without_a_module, {}, r"does not adapt model.layers.1.self_attn.q_proj, other than"),
    "more": (with_another, {}, r"adapts model.layers.1.self_attn.o_proj as well.*set adapter"),
    "shape": (narrower, {}, r"as a matrix of 40 x \d+, and that of this model has \d+ x \d+; give"),
    "head": (with_a_head, {}, r"base_model.model.lm_head.weight.*without other trained modules"),
    "type": (changed(peft_type="IA3"), {}, r"peft_type is 'IA3'; give an adapter of LoRA"),
    "bias": (changed(bias="all"), {}, r"bias is 'all', which is not there"),
    "start": (changed(init_lora_weights="pissa"), {}, r"'pissa', which changes the base's weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_adapter_is_refused_with_key_value_and_remedy(
    folders: Path, tmp_path: Path, mistake: str
):
    base = folders / "llama_2"
    model, config, architecture = ours(base)
    write(model, config, architecture, tmp_path / "a")
    change, settings, said = MISTAKES[mistake]
    if change is not None:
        content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "a" / WEIGHTS)
        change(content, tensors)
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(content))
        save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError) as found:
        ours(base, path=tmp_path / "a", **settings)
    message = str(found.value)
    assert message.startswith(f"adapter.path = '{tmp_path / 'a'}': ") and re.search(said, message)


def test_an_adapter_of_a_base_with_another_vocabulary_is_refused(folders: Path, tmp_path: Path):
    base = folders / "llama_2"
    model, config, architecture = ours(base)
    write(model, config, architecture, tmp_path / "a")
    larger = replace(architecture, config=replace(architecture.config, vocab_size=128))
    config = config_of(base, targets=TARGETS["llama_2"], path=tmp_path / "a")
    with pytest.raises(ValueError, match="model: vocab_size is 101 there and 128 in the run"):
        read_adapters(model, config, larger)


def test_dora_on_a_part_of_what_files_join_is_refused(folders: Path):
    base = folders / "phi3"
    config = config_of(base, kind="dora", targets=["q_proj"])
    architecture = find_architecture(config.model)
    model, _ = build_adapted(architecture, config.adapter)
    with pytest.raises(ValueError, match=r"q_proj and not .*k_proj, .*v_proj, which files of PEFT"):
        read_adapters(model, config, architecture)
