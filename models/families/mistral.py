"""Mistral 7B, Nemo and Small, and every other model of type mistral: all layers share a window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import SLIDING, DecoderConfig, DecoderLM, decoder_plan
from models.families.llama3 import FLAVORS as LLAMA
from models.hf_config import HfType, decoder_key_map
from models.layers.rope import RopeConfig
from models.registry import ModelFamily

_TYPE = HfType(
    family="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    max_position_embeddings=131_072,
    fixed={"layer_types": (None,)},
    num_kv_heads=8,
)
_WINDOW = 4096  # what transformers' MistralConfig assumes where config.json is silent

# Sizes are those of config.json in mistralai/Mistral-7B-v0.1, Mistral-7B-v0.3,
# Mistral-Nemo-Base-2407 and Mistral-Small-24B-Base-2501 on huggingface.co.
_MISTRAL = DecoderConfig(
    vocab_size=32_768,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    rope=RopeConfig(theta=1_000_000.0),
    max_position_embeddings=32_768,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
FLAVORS = {
    # Ours: the sizes of llama3's debugmodel, with a window shorter than its rows.
    "debugmodel": replace(LLAMA["debugmodel"], sliding_window=64, layer_types=(SLIDING,) * 4),
    "7B_v0.1": replace(
        _MISTRAL,
        vocab_size=32_000,
        rope=RopeConfig(theta=10_000.0),
        sliding_window=4096,
        layer_types=(SLIDING,) * 32,
    ),
    "7B": _MISTRAL,
    "12B": replace(
        _MISTRAL,
        vocab_size=131_072,
        hidden_size=5120,
        num_layers=40,
        max_position_embeddings=131_072,
    ),
    "24B": replace(
        _MISTRAL,
        vocab_size=131_072,
        hidden_size=5120,
        num_layers=40,
        intermediate_size=32_768,
        rope=RopeConfig(theta=100_000_000.0),
    ),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type mistral, written by transformers 4 or 5."""
    window, num_layers = hf.get("sliding_window", _WINDOW), hf.get("num_hidden_layers") or 0
    types = (SLIDING,) * num_layers if window else ()
    return _TYPE.read(hf, sliding_window=window, layer_types=types)


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    return _TYPE.write(config, sliding_window=config.sliding_window)


FAMILY = ModelFamily(
    name="mistral",
    hf_model_types=("mistral",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=decoder_key_map,
)
