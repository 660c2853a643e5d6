"""Configurations and models of transformers, and ours of the same weights, for the tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from engine.verify.variants import named_as_ours
from models.decoder import DecoderLM
from models.registry import family_for_hf


def llama_config(settings: Mapping[str, Any]) -> LlamaConfig:
    """Return transformers' configuration; it gets a copy, since it changes what it is given."""
    copy: dict[str, Any] = json.loads(json.dumps(settings))
    return LlamaConfig(**copy)


def same_in_ours(theirs: Any, folder: Path) -> DecoderLM:
    """Return our model built from the config.json that transformers writes, weights copied."""
    theirs.config.save_pretrained(folder)
    hf_config = json.loads((folder / "config.json").read_text())
    family = family_for_hf(hf_config)
    ours = family.build(family.config_from_hf(hf_config))
    weights = named_as_ours(dict(theirs.named_parameters()), ours, family.key_map(ours.config))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights, f"transformers has parameters that we lack: {sorted(weights)}"
    return ours
