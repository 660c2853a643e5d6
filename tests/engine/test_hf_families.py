"""A model of each family goes through our import and export; transformers finds it unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import hf_io
from models.registry import family_for_hf
from tests.engine.test_hf_io import stored
from tests.models.tiny import random_tokens
from tests.parity.hf_cases import MODELS, SHAPE, random_model

FAMILIES = [name for name in MODELS if "model_type" in MODELS[name]]
RESOLVED = {
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "original_max_position_embeddings",
}
"""Written with every default filled in; tests/parity/test_transformers_rope.py compares them."""

WITHOUT_EFFECT = {"_name_or_path", "dtype", "max_window_layers"}
"""The last one beside layer_types."""


@pytest.mark.parametrize("name", FAMILIES)
def test_import_then_export_is_bit_equal_and_complete(name: str, tmp_path: Path) -> None:
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "in")
    hf_config = hf_io.read_hf_config(tmp_path / "in")
    family = family_for_hf(hf_config)
    sizes = family.config_from_hf(hf_config)
    ours = family.build(sizes)
    hf_io.load_into(ours, tmp_path / "in", family.key_map(sizes))
    assets = hf_io.HfAssets(
        key_map=family.key_map(sizes),
        config=family.config_to_hf(sizes),
        save_tokenizer=lambda folder: None,
    )
    hf_io.export(ours, tmp_path / "out", assets, dtype=torch.float32)

    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert family.config_from_hf(hf_io.read_hf_config(tmp_path / "out")) == sizes
    configs = [AutoConfig.from_pretrained(tmp_path / side).to_dict() for side in ("in", "out")]
    for key in configs[0].keys() - RESOLVED - WITHOUT_EFFECT:
        assert configs[1].get(key) == configs[0][key], key
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = random_tokens(1, 96, vocab_size=SHAPE["vocab_size"])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
