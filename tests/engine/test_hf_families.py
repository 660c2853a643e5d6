"""Joined tensors go through import and export on several ranks; test_families.py has the rest."""

import ast
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Phi3Config, Phi3ForCausalLM

from engine import hf_io, hf_weights
from engine.model import ModelConfig, find_architecture
from engine.verify.case import Case
from engine.verify.parity import build_case
from engine.verify.subject import TINY
from engine.verify.variants import MODELS, SHAPE
from models.decoder_config import DecoderConfig
from models.families import gemma3
from models.registry import load_family
from tests.engine.test_hf_io import stored
from tests.models.tiny import random_tokens
from tests.ranks import RankPool


def _assets(family_name: str, sizes: DecoderConfig) -> hf_io.HfAssets:
    family = load_family(family_name)
    return hf_io.HfAssets(
        key_map=family.key_map(sizes),
        config=family.config_to_hf(sizes),
        save_tokenizer=lambda folder: None,
    )


def test_the_language_model_beside_a_vision_tower_is_saved_as_the_family_says(
    tmp_path: Path,
) -> None:
    text = {**SHAPE, **MODELS["gemma3"]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole: Any = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"models/families/gemma3\.py show"):
        find_architecture(ModelConfig(name="gemma3", hf_assets_path=str(tmp_path / "whole")))
    recipe = ast.get_docstring(ast.parse(Path(gemma3.__file__).read_text())) or ""
    recipe = textwrap.dedent(recipe[recipe.index("    from transformers") :])
    exec(recipe, {"FOLDER": tmp_path / "whole", "NEW_FOLDER": tmp_path / "text"})
    found = find_architecture(ModelConfig(name="gemma3", hf_assets_path=str(tmp_path / "text")))
    ours = found.family.build(found.config)
    hf_weights.load_into(ours, tmp_path / "text", found.family.key_map(found.config))
    tokens = random_tokens(1, 20, vocab_size=SHAPE["vocab_size"])
    with torch.no_grad():
        expected = whole(tokens).logits
        logits = ours(tokens, positions_BT=torch.arange(20)[None])
    assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))


JOINED = replace(TINY, family_name="phi3")
TP2 = Case(shard=2, tp=2)


def _through(rank: int, world_size: int, source: Path, target: Path) -> dict[str, Tensor]:
    """Import, export, and return the whole parameters that the model held in between."""
    model, _ = build_case(TP2, subject=JOINED)
    assets = _assets("phi3", JOINED.sizes(TP2))
    hf_weights.load_into(model, source, assets.key_map)
    hf_io.export(model, target, assets, dtype=torch.float32)
    parameters = dict(model.named_parameters()).items()
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters}


def test_joined_projections_are_cut_into_whole_heads_and_joined_again(
    ranks: RankPool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings: Any = load_family("phi3").config_to_hf(JOINED.sizes(TP2))
    Phi3ForCausalLM(Phi3Config(**settings)).save_pretrained(tmp_path / "in")
    held, *_ = ranks(4, _through, tmp_path / "in", tmp_path / "out")
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    block = "model.layers.1"
    qkv = before[f"{block}.self_attn.qkv_proj.weight"].split([64, 32, 32])
    gate_up = before[f"{block}.mlp.gate_up_proj.weight"].chunk(2)
    for name, part in zip("qkv", qkv, strict=True):
        assert torch.equal(held[f"{block}.self_attn.{name}_proj.weight"], part)
    for name, part in zip(("gate", "up"), gate_up, strict=True):
        assert torch.equal(held[f"{block}.mlp.{name}_proj.weight"], part)


def test_a_joined_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    sizes = JOINED.sizes(TP2)
    settings: Any = load_family("phi3").config_to_hf(replace(sizes, num_kv_heads=2))
    Phi3ForCausalLM(Phi3Config(**settings)).save_pretrained(tmp_path)
    model = load_family("phi3").build(sizes)
    shapes = r"layers\.0\.self_attn\.qkv_proj.* has shape \(96, 32\), the model has \(128, 32\)"
    with pytest.raises(ValueError, match=shapes):
        hf_weights.load_into(model, tmp_path, _assets("phi3", sizes).key_map)
