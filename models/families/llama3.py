"""Llama 2, 3, 3.1, 3.2 and 3.3, and every other model of type llama, such as SmolLM."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import DecoderConfig, DecoderLM, decoder_plan
from models.layers.rope import RopeConfig
from models.layers.rope_settings import rope_from_hf, rope_to_hf
from models.registry import ModelFamily
from models.weights import KeyMap


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
    _refuse_what_differs(hf)
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        if hf.get(key) is None
    ]
    if missing or hf.get("intermediate_size") is None:
        raise ValueError(f"config.json lacks {', '.join(missing or ['intermediate_size'])}")
    heads, eos = hf["num_attention_heads"], hf.get("eos_token_id")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        intermediate_size=hf["intermediate_size"],
        rope=rope_from_hf(hf),
        # What a config.json leaves out has the default of transformers' LlamaConfig.
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        initializer_range=hf.get("initializer_range", 0.02),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=hf.get("pad_token_id"),
    )


def _refuse_what_differs(hf: Mapping[str, Any]) -> None:
    same: dict[str, tuple[object, ...]] = {
        "model_type": ("llama",),
        "architectures": (["LlamaForCausalLM"], None),
        "hidden_act": ("silu", None),
        "attention_dropout": (0, None),
        "rope_interleaved": (False, None),
        "quantization_config": (None,),
    }
    for key, values in same.items():
        if hf.get(key) not in values:
            raise ValueError(
                f"config.json has {key} = {hf.get(key)!r}, which the llama3 family cannot "
                f"reproduce; use a model with {values[0]!r}"
            )


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    eos = config.eos_token_id
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        **rope_to_hf(config.rope),
    }


def key_map(config: DecoderConfig) -> KeyMap:
    """Return the identity; a tied head is not stored."""
    return KeyMap(
        not_stored=frozenset({"lm_head.weight"} if config.tie_word_embeddings else ()),
        ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )


FAMILY = ModelFamily(
    name="llama3",
    hf_model_types=("llama",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=key_map,
)
