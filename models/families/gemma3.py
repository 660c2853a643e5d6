"""Gemma 3 for text, and every other model of type gemma3_text: five layers with a window to one.

The released models from 4B on have a vision tower beside the language model, which is saved by
itself with transformers 5:

    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    whole = Gemma3ForConditionalGeneration.from_pretrained(FOLDER)
    text = Gemma3ForCausalLM(whole.config.text_config)
    text.load_state_dict(whole.model.language_model.state_dict(prefix="model."), strict=False)
    text.save_pretrained(NEW_FOLDER)
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import FULL, SLIDING, DecoderConfig, DecoderLM, decoder_plan
from models.families.gemma2 import GELU, GEMMA
from models.families.llama3 import FLAVORS as LLAMA
from models.hf_config import HfType, decoder_key_map
from models.layers.rope import RopeConfig
from models.layers.rope_settings import ropes_from_hf
from models.registry import ModelFamily

_WITH_VISION = "gemma3"
_TYPE = HfType(
    family="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    max_position_embeddings=131_072,
    tie_word_embeddings=True,
    activation=GELU,
    fixed={
        "hidden_activation": (GELU, None),
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),
    },
)
_SILENT = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""What transformers' Gemma3TextConfig assumes where config.json is silent."""


def _pattern(num_layers: int, every: int) -> tuple[str, ...]:
    """Return the types of layers of which each `every`-th sees all tokens."""
    return tuple(SLIDING if layer % every else FULL for layer in range(1, num_layers + 1))


# Sizes are those of config.json in google/gemma-3-270m and gemma-3-1b-pt, and of its text_config in
# gemma-3-4b-pt, gemma-3-12b-pt and gemma-3-27b-pt on huggingface.co.
_SMALL = DecoderConfig(
    vocab_size=262_144,
    hidden_size=1152,
    num_layers=26,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    intermediate_size=6912,
    rope=RopeConfig(theta=1_000_000.0),
    sliding_rope=RopeConfig(theta=10_000.0),
    max_position_embeddings=32_768,
    norm_eps=1e-6,
    tie_word_embeddings=True,
    qk_norm="head",
    query_pre_attn_scalar=256,
    sliding_window=512,
    layer_types=_pattern(26, 6),
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    **GEMMA,
)
_LARGE = replace(
    _SMALL,
    vocab_size=262_208,
    hidden_size=2560,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    intermediate_size=10_240,
    rope=RopeConfig(theta=1_000_000.0, kind="linear", factor=8.0),
    max_position_embeddings=131_072,
    sliding_window=1024,
    layer_types=_pattern(34, 6),
)
FLAVORS = {
    # Ours: the sizes of llama3's debugmodel, with a window shorter than its rows.
    "debugmodel": replace(
        LLAMA["debugmodel"],
        norm_eps=1e-6,
        tie_word_embeddings=True,
        rope=RopeConfig(theta=1_000_000.0, kind="linear", factor=8.0),
        sliding_rope=RopeConfig(theta=10_000.0),
        qk_norm="head",
        query_pre_attn_scalar=24,
        sliding_window=64,
        layer_types=_pattern(4, 4),
        **GEMMA,
    ),
    "270M": replace(
        _SMALL, hidden_size=640, num_layers=18, intermediate_size=2048, layer_types=_pattern(18, 6)
    ),
    "1B": _SMALL,
    "4B": _LARGE,
    "12B": replace(
        _LARGE,
        hidden_size=3840,
        num_layers=48,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=15_360,
        layer_types=_pattern(48, 6),
    ),
    "27B": replace(
        _LARGE,
        hidden_size=5376,
        num_layers=62,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        intermediate_size=21_504,
        query_pre_attn_scalar=168,
        layer_types=_pattern(62, 6),
    ),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type gemma3_text, written by transformers 4 or 5."""
    if hf.get("model_type") == _WITH_VISION:
        raise ValueError(
            f"config.json has model_type = {_WITH_VISION!r}, a language model beside a vision "
            "tower, which is not built here; save the language model by itself, as the first lines "
            "of models/families/gemma3.py show, and use that folder"
        )
    hf = {**_SILENT, **hf}
    types = hf.get("layer_types")
    if types is None:
        types = _pattern(hf["num_hidden_layers"], hf["sliding_window_pattern"])
    ropes = ropes_from_hf(_with_thetas(hf))
    return _TYPE.read(
        hf,
        rope=ropes[FULL],
        sliding_rope=ropes[SLIDING],
        qk_norm="head",
        attention_bias=hf.get("attention_bias", False),
        query_pre_attn_scalar=hf["query_pre_attn_scalar"],
        logit_softcap=hf.get("final_logit_softcapping"),
        sliding_window=hf["sliding_window"],
        layer_types=tuple(types),
        **GEMMA,
    )


def _with_thetas(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return it with the rotary bases that it has by type, or else not at all, as version 4 does.

    Those that are not there are what Gemma3TextConfig assumes.
    """
    parts = hf.get("rope_parameters") or {}
    full, sliding = parts.get(FULL, parts) or {}, parts.get(SLIDING) or {}
    known = {
        "rope_theta": full.get("rope_theta", 1_000_000.0),
        "rope_local_base_freq": sliding.get("rope_theta", 10_000.0),
    }
    return {**known, **hf}


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    types, num_layers = config.attention_types, config.num_layers
    patterns = [n for n in range(1, num_layers + 2) if _pattern(num_layers, n) == types]
    return _TYPE.write(
        config,
        hidden_activation=GELU,
        attention_bias=config.attention_bias,
        query_pre_attn_scalar=config.query_pre_attn_scalar,
        final_logit_softcapping=config.logit_softcap,
        attn_logit_softcapping=None,
        sliding_window=config.sliding_window,
        layer_types=list(types),
        # What transformers before 4.53 reads instead of the types.
        **({"sliding_window_pattern": patterns[0]} if patterns else {}),
    )


FAMILY = ModelFamily(
    name="gemma3",
    hf_model_types=(_TYPE.model_type, _WITH_VISION),  # of the latter to say what to do
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=decoder_key_map,
)
