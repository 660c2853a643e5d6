"""OLMo 2, and every other model of type olmo2: norms behind attention and feed-forward."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import DecoderLM, decoder_plan
from models.decoder_config import DecoderConfig
from models.families.llama3 import FLAVORS as LLAMA
from models.hf_config import HfType, decoder_key_map
from models.layers.rope import RopeConfig
from models.registry import ModelFamily

_TYPE = HfType(
    family="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    max_position_embeddings=2048,
    norm_eps=1e-5,
    fixed={"clip_qkv": (None,)},
)

# Sizes are those of config.json in allenai/OLMo-2-0425-1B, OLMo-2-1124-7B, OLMo-2-1124-13B and
# OLMo-2-0325-32B on huggingface.co.
_OLMO = DecoderConfig(
    vocab_size=100_352,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11_008,
    rope=RopeConfig(theta=500_000.0),
    max_position_embeddings=4096,
    norm_eps=1e-6,
    norms="after",
    qk_norm="width",
    eos_token_id=100_257,
    pad_token_id=100_277,
)
FLAVORS = {
    "debugmodel": replace(LLAMA["debugmodel"], norms="after", qk_norm="width", norm_eps=1e-6),
    "1B": replace(
        _OLMO,
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        intermediate_size=8192,
    ),
    "7B": _OLMO,
    "13B": replace(
        _OLMO,
        hidden_size=5120,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        intermediate_size=13_824,
    ),
    "32B": replace(
        _OLMO,
        hidden_size=5120,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        intermediate_size=27_648,
    ),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type olmo2, written by transformers 4 or 5."""
    bias = hf.get("attention_bias", False)
    return _TYPE.read(hf, norms="after", qk_norm="width", attention_bias=bias)


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    return _TYPE.write(config, attention_bias=config.attention_bias)


FAMILY = ModelFamily(
    name="olmo2",
    hf_model_types=("olmo2",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=decoder_key_map,
)
