"""Joined tensors go through import and export on several ranks; test_families.py has the rest."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Phi3Config, Phi3ForCausalLM

from engine import hf_io, hf_weights
from engine.verify.case import Case
from engine.verify.parity import build_case
from engine.verify.subject import TINY
from models.decoder_config import DecoderConfig
from models.registry import load_family
from tests.engine.test_hf_io import stored
from tests.ranks import RankPool


def _assets(family_name: str, sizes: DecoderConfig) -> hf_io.HfAssets:
    family = load_family(family_name)
    return hf_io.HfAssets(
        key_map=family.key_map(sizes),
        config=family.config_to_hf(sizes),
        save_tokenizer=lambda folder: None,
    )


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
