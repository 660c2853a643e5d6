"""Qwen3 without experts, and every other model of type qwen3: norms on queries and keys."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import DecoderConfig, DecoderLM, decoder_plan
from models.families.llama3 import FLAVORS as LLAMA
from models.hf_config import HfType, decoder_key_map, read_windows, write_windows
from models.layers.rope import RopeConfig
from models.registry import ModelFamily

_TYPE = HfType(
    family="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    max_position_embeddings=32_768,
    num_kv_heads=32,
)
_HEAD_DIM = 128  # what transformers' Qwen3Config assumes, whatever the width and the heads

# Sizes are those of config.json in Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -14B and -32B on
# huggingface.co.
_QWEN = DecoderConfig(
    vocab_size=151_936,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12_288,
    rope=RopeConfig(theta=1_000_000.0),
    max_position_embeddings=40_960,
    norm_eps=1e-6,
    qk_norm="head",
    bos_token_id=151_643,
    eos_token_id=151_645,
)
_SMALL = replace(_QWEN, num_layers=28, num_heads=16, tie_word_embeddings=True)
FLAVORS = {
    # Ours: the sizes of llama3's debugmodel with heads wider than the model over their number.
    "debugmodel": replace(LLAMA["debugmodel"], qk_norm="head", head_dim=32, norm_eps=1e-6),
    "0.6B": replace(_SMALL, hidden_size=1024, intermediate_size=3072),
    "1.7B": replace(_SMALL, hidden_size=2048, intermediate_size=6144),
    "4B": replace(_QWEN, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    "8B": _QWEN,
    "14B": replace(_QWEN, hidden_size=5120, num_layers=40, num_heads=40, intermediate_size=17_408),
    "32B": replace(_QWEN, hidden_size=5120, num_layers=64, num_heads=64, intermediate_size=25_600),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type qwen3, written by transformers 4 or 5."""
    return _TYPE.read(
        hf,
        head_dim=hf.get("head_dim") or _HEAD_DIM,
        qk_norm="head",
        attention_bias=hf.get("attention_bias", False),
        **read_windows(hf, sliding_window=4096, max_window_layers=28),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    return _TYPE.write(config, attention_bias=config.attention_bias, **write_windows(config))


FAMILY = ModelFamily(
    name="qwen3",
    hf_model_types=("qwen3",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=decoder_key_map,
)
