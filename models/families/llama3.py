"""Llama 2, 3, 3.1, 3.2 and 3.3, and every other model of type llama, such as SmolLM."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import DecoderConfig, DecoderLM, decoder_plan
from models.hf_config import HfType, decoder_key_map
from models.layers.rope import RopeConfig
from models.registry import ModelFamily

_TYPE = HfType(
    family="llama3",
    model_type="llama",
    architecture="LlamaForCausalLM",
    max_position_embeddings=2048,
)


def _rope(factor: float) -> RopeConfig:
    return RopeConfig(theta=500_000.0, kind="llama3", factor=factor)


# Sizes are those of config.json in meta-llama/Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B,
# Llama-3.1-70B and Llama-3.1-405B on huggingface.co.
_LLAMA = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    rope=_rope(factor=8.0),
    max_position_embeddings=131_072,
    bos_token_id=128_000,
    eos_token_id=128_001,
)
_SIZES = {
    # Ours: learns the built-in text on two CPU cores in minutes; heads split over 1, 2 or 4 ranks.
    "debugmodel": DecoderConfig(
        vocab_size=4096,
        hidden_size=128,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        intermediate_size=384,
        rope=RopeConfig(theta=10_000.0),
        max_position_embeddings=2048,
    ),
    "1B": replace(
        _LLAMA,
        hidden_size=2048,
        num_layers=16,
        head_dim=64,
        intermediate_size=8192,
        rope=_rope(factor=32.0),
        tie_word_embeddings=True,
    ),
    "3B": replace(
        _LLAMA,
        hidden_size=3072,
        num_layers=28,
        num_heads=24,
        intermediate_size=8192,
        rope=_rope(factor=32.0),
        tie_word_embeddings=True,
    ),
    "8B": _LLAMA,
    "70B": replace(_LLAMA, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28_672),
    "405B": replace(
        _LLAMA, hidden_size=16_384, num_layers=126, num_heads=128, intermediate_size=53_248
    ),
}
_FLEX = {f"{name}_flex": replace(size, attention="flex") for name, size in _SIZES.items()}
_VARLEN = {f"{name}_varlen": replace(size, attention="varlen") for name, size in _SIZES.items()}
FLAVORS = {
    **_SIZES,
    **_FLEX,
    **_VARLEN,
    "debugmodel_flex_attn": _FLEX["debugmodel_flex"],
    "debugmodel_varlen_attn": _VARLEN["debugmodel_varlen"],
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type llama, written by transformers 4 or 5."""
    return _TYPE.read(
        hf,
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    return _TYPE.write(config, attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)


FAMILY = ModelFamily(
    name="llama3",
    hf_model_types=("llama",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=decoder_key_map,
)
