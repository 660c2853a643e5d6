"""Qwen2 and Qwen2.5, and every other model of type qwen2: biases on queries, keys and values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import DecoderConfig, DecoderLM, decoder_plan
from models.families.llama3 import FLAVORS as LLAMA
from models.hf_config import HfType, decoder_key_map, read_windows, write_windows
from models.layers.rope import RopeConfig
from models.registry import ModelFamily

_TYPE = HfType(
    family="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    max_position_embeddings=32_768,
    num_kv_heads=32,
)

# Sizes are those of config.json in Qwen/Qwen2.5-0.5B, -1.5B, -3B, -7B, -14B, -32B and -72B on
# huggingface.co.
_QWEN = DecoderConfig(
    vocab_size=152_064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18_944,
    rope=RopeConfig(theta=1_000_000.0),
    max_position_embeddings=131_072,
    norm_eps=1e-6,
    qkv_bias=True,
    bos_token_id=151_643,
    eos_token_id=151_643,
)
_SMALL = replace(_QWEN, vocab_size=151_936, tie_word_embeddings=True)
_LARGE = replace(_QWEN, hidden_size=5120, num_heads=40, num_kv_heads=8, norm_eps=1e-5)
FLAVORS = {
    # Ours: the sizes of llama3's debugmodel, tied as the small ones are.
    "debugmodel": replace(
        LLAMA["debugmodel"], qkv_bias=True, tie_word_embeddings=True, norm_eps=1e-6
    ),
    "0.5B": replace(
        _SMALL,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=4864,
        max_position_embeddings=32_768,
    ),
    "1.5B": replace(_SMALL, hidden_size=1536, num_heads=12, num_kv_heads=2, intermediate_size=8960),
    "3B": replace(
        _SMALL,
        hidden_size=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        intermediate_size=11_008,
        max_position_embeddings=32_768,
    ),
    "7B": _QWEN,
    "14B": replace(_LARGE, num_layers=48, intermediate_size=13_824),
    "32B": replace(_LARGE, num_layers=64, intermediate_size=27_648),
    "72B": replace(_LARGE, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=29_568),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type qwen2, written by transformers 4 or 5."""
    windows = read_windows(hf, sliding_window=4096, max_window_layers=28)
    return _TYPE.read(hf, qkv_bias=True, **windows)


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    return _TYPE.write(config, **write_windows(config))


FAMILY = ModelFamily(
    name="qwen2",
    hf_model_types=("qwen2",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=decoder_key_map,
)
