"""Gemma 2, and every other model of type gemma2: soft caps, and every other layer with a window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import FULL, SLIDING, DecoderConfig, DecoderLM, decoder_plan
from models.families.llama3 import FLAVORS as LLAMA
from models.hf_config import HfType, decoder_key_map
from models.layers.rope import RopeConfig
from models.registry import ModelFamily

GELU = "gelu_pytorch_tanh"
_TYPE = HfType(
    family="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    max_position_embeddings=8192,
    num_kv_heads=4,
    tie_word_embeddings=True,
    activation=GELU,
    fixed={"hidden_activation": (GELU, None), "use_bidirectional_attention": (False, None)},
)
_SILENT = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""What transformers' Gemma2Config assumes where config.json is silent."""

GEMMA: dict[str, Any] = {
    "norms": "both",
    "zero_centered_norm": True,
    "scaled_embedding": True,
    "activation": GELU,
}
"""Fields of `DecoderConfig` that all models of types gemma2 and gemma3_text share."""


def _alternating(num_layers: int) -> tuple[str, ...]:
    return tuple(FULL if layer % 2 else SLIDING for layer in range(num_layers))


# Sizes are those of config.json in google/gemma-2-2b, gemma-2-9b and gemma-2-27b on huggingface.co.
_GEMMA = DecoderConfig(
    vocab_size=256_000,
    hidden_size=2304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    intermediate_size=9216,
    rope=RopeConfig(theta=10_000.0),
    max_position_embeddings=8192,
    norm_eps=1e-6,
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    attention_softcap=50.0,
    logit_softcap=30.0,
    sliding_window=4096,
    layer_types=_alternating(26),
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    attention="eager",
    **GEMMA,
)
FLAVORS = {
    # Ours: the sizes of llama3's debugmodel, with a window shorter than its rows.
    "debugmodel": replace(
        LLAMA["debugmodel"],
        norm_eps=1e-6,
        tie_word_embeddings=True,
        query_pre_attn_scalar=24,
        attention_softcap=50.0,
        logit_softcap=30.0,
        sliding_window=64,
        layer_types=_alternating(4),
        attention="eager",
        **GEMMA,
    ),
    "2B": _GEMMA,
    "9B": replace(
        _GEMMA,
        hidden_size=3584,
        num_layers=42,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=14_336,
        layer_types=_alternating(42),
    ),
    "27B": replace(
        _GEMMA,
        hidden_size=4608,
        num_layers=46,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        intermediate_size=36_864,
        query_pre_attn_scalar=144,
        layer_types=_alternating(46),
    ),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type gemma2, written by transformers 4 or 5."""
    hf = {**_SILENT, **hf}
    softcap = hf["attn_logit_softcapping"]
    return _TYPE.read(
        hf,
        attention_bias=hf.get("attention_bias", False),
        query_pre_attn_scalar=hf["query_pre_attn_scalar"],
        attention_softcap=softcap,
        logit_softcap=hf["final_logit_softcapping"],
        sliding_window=hf["sliding_window"],
        layer_types=tuple(hf.get("layer_types") or _alternating(hf.get("num_hidden_layers") or 0)),
        attention="sdpa" if softcap is None else "eager",
        **GEMMA,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    return _TYPE.write(
        config,
        hidden_activation=GELU,
        attention_bias=config.attention_bias,
        query_pre_attn_scalar=config.query_pre_attn_scalar,
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap,
        sliding_window=config.sliding_window,
        layer_types=list(config.attention_types),
    )


FAMILY = ModelFamily(
    name="gemma2",
    hf_model_types=("gemma2",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=decoder_key_map,
)
