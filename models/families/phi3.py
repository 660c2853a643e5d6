"""Phi-3, Phi-3.5 and Phi-4, and every other model of type phi3: projections that files join.

Here queries, keys, values, gates and ups have projections of their own, so that tensor parallelism
cuts each into whole heads; files hold `qkv_proj` and `gate_up_proj`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.decoder import SLIDING, DecoderConfig, DecoderLM, decoder_plan
from models.families.llama3 import FLAVORS as LLAMA
from models.hf_config import HfType, decoder_key_map
from models.layers.rope import RopeConfig
from models.layers.rope_settings import rope_to_hf
from models.registry import ModelFamily
from models.weights import KeyMap

_TYPE = HfType(
    family="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    max_position_embeddings=4096,
    norm_eps=1e-5,
    fixed={
        "resid_pdrop": (0.0, None),
        "embd_pdrop": (0.0, None),
        "attention_bias": (False, None),
    },
)
_ORIGINAL = "original_max_position_embeddings"

# Sizes are those of config.json in microsoft/Phi-3-mini-4k-instruct, Phi-3-medium-4k-instruct and
# phi-4 on huggingface.co.
_MINI = DecoderConfig(
    vocab_size=32_064,
    hidden_size=3072,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=96,
    intermediate_size=8192,
    rope=RopeConfig(theta=10_000.0),
    max_position_embeddings=4096,
    norm_eps=1e-5,
    sliding_window=2047,
    layer_types=(SLIDING,) * 32,
    bos_token_id=1,
    eos_token_id=32_000,
    pad_token_id=32_000,
)
_MEDIUM = replace(
    _MINI,
    hidden_size=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=10,
    head_dim=128,
    intermediate_size=17_920,
    layer_types=(SLIDING,) * 40,
)
FLAVORS = {
    # Ours: the sizes of llama3's debugmodel, rotated in a part of each head as Phi-4-mini is.
    "debugmodel": replace(
        LLAMA["debugmodel"], rope=RopeConfig(theta=10_000.0, partial_rotary_factor=0.75)
    ),
    "mini_4k": _MINI,
    "medium_4k": _MEDIUM,
    "phi4": replace(
        _MEDIUM,
        vocab_size=100_352,
        rope=RopeConfig(theta=250_000.0),
        max_position_embeddings=16_384,
        sliding_window=None,
        layer_types=(),
        bos_token_id=100_257,
        eos_token_id=100_265,
        pad_token_id=100_349,
    ),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json of type phi3, written by transformers 4 or 5."""
    hf = {_ORIGINAL: 4096, **hf}  # what transformers' Phi3Config assumes
    scaling = hf.get("rope_scaling")
    if scaling and scaling.get("type") in ("su", "yarn"):  # earlier names of the same, as there
        hf = {**hf, "rope_scaling": {**scaling, "type": "longrope"}}
    window, num_layers = hf.get("sliding_window"), hf.get("num_hidden_layers") or 0
    return _TYPE.read(
        hf,
        rope=_TYPE.read_rope(hf, is_partial=True),
        sliding_window=window,
        layer_types=(SLIDING,) * num_layers if window else (),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, object]:
    """Write a config.json that transformers 4 and 5 read alike."""
    rope, keys = config.rope, rope_to_hf(config.rope)
    original = config.max_position_embeddings
    if rope.kind == "longrope":
        original = rope.original_max_position_embeddings
        lists = {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
        # Version 4 refuses more than these three; where they do not say all, only 5 can read it.
        short = {"rope_theta": rope.theta, "rope_scaling": {"type": "longrope", **lists}}
        length = {"max_position_embeddings": config.max_position_embeddings, _ORIGINAL: original}
        fraction = {"partial_rotary_factor": rope.partial_rotary_factor}
        if _TYPE.read_rope({**short, **length, **fraction}, is_partial=True) == rope:
            keys["rope_scaling"] = short["rope_scaling"]
    elif rope.kind == "default":
        keys["rope_scaling"] = None
    return _TYPE.write(
        config,
        sliding_window=config.sliding_window,
        partial_rotary_factor=rope.partial_rotary_factor,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        **{**keys, _ORIGINAL: original},
    )


def key_map(config: DecoderConfig) -> KeyMap:
    """Return the identity but for the joined projections of each block."""
    joined: dict[str, tuple[str, ...]] = {}
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}"
        joined[f"{block}.self_attn.qkv_proj.weight"] = tuple(
            f"{block}.self_attn.{name}_proj.weight" for name in "qkv"
        )
        joined[f"{block}.mlp.gate_up_proj.weight"] = tuple(
            f"{block}.mlp.{name}_proj.weight" for name in ("gate", "up")
        )
    return replace(decoder_key_map(config), joined=joined)


FAMILY = ModelFamily(
    name="phi3",
    hf_model_types=("phi3",),
    flavors=FLAVORS,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=DecoderLM,
    plan=decoder_plan,
    key_map=key_map,
)
