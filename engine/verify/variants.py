"""Random tiny models of transformers, several of each family, and their tensors by our names.

A family comes into `python -m engine.verify families` with an entry in `MODELS`.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.registry import family_for_hf
from models.weights import KeyMap

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 3.0, 8.0, 20.0],
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
WINDOW = {"use_sliding_window": True, "sliding_window": 10}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
QWEN3 = {**QWEN2, "model_type": "qwen3"}
NO_PAD = {"pad_token_id": None}  # else transformers gives the padding token no gradient
PHI3 = {"model_type": "phi3", "rope_theta": 1e4, **NO_PAD}
MISTRAL = {"model_type": "mistral", "rope_theta": 1e4}
# Caps so low that every score and logit feels them.
GEMMA2 = {
    "model_type": "gemma2",
    "rope_theta": 1e4,
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": 7,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 0.7,
    **NO_PAD,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    **NO_PAD,
}
# The released models differ in these settings; sizes are tiny.
MODELS: dict[str, dict[str, Any]] = {
    "llama_2": {"num_key_value_heads": 4, "rope_scaling": None, "rms_norm_eps": 1e-6},
    "llama_2_70b": {"rope_scaling": None},
    "llama_3": {"rope_theta": 500_000.0},
    "llama_3_1": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3_SCALING},
    "llama_3_2": {
        "rope_theta": 500_000.0,
        "rope_scaling": {**LLAMA3_SCALING, "factor": 32.0},
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "llama_3_3": {
        "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3_SCALING,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 6,
    },
    "linear_rope": {"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "attention_bias": {"rope_theta": 10_000.0, "attention_bias": True},
    "longrope": {"rope_theta": 1e4, "rope_scaling": LONGROPE, "head_dim": 8},
    "mlp_bias_tied": {"rope_theta": 1e4, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {**QWEN2, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2_tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen2_window": {**QWEN2, **WINDOW, "max_window_layers": 1, "rope_scaling": YARN},
    "qwen3": {**QWEN3, "tie_word_embeddings": True, "head_dim": 16},
    "qwen3_window_bias": {
        **QWEN3,
        **WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
        "head_dim": 8,
    },
    "mistral": {**MISTRAL, "sliding_window": None, "head_dim": 16},
    "mistral_window": {**MISTRAL, "sliding_window": 7},
    "gemma2": GEMMA2,
    "gemma2_untied_bias": {**GEMMA2, "attention_bias": True, "tie_word_embeddings": False},
    "gemma3": {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3_plain": {**GEMMA3, "num_key_value_heads": 1, "final_logit_softcapping": 0.7},
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5, **NO_PAD},
    # No family of their own: transformers' modules. The last has learned positions and is tied.
    "granite": {"model_type": "granite", "logits_scaling": 3.0, "attention_bias": True, **NO_PAD},
    "olmo": {"model_type": "olmo", **NO_PAD},
    "gpt2": {"model_type": "gpt2", "num_key_value_heads": None, **NO_PAD},
    "phi3": {**PHI3, "sliding_window": 9},
    "phi3_longrope": {
        **PHI3,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": LONGROPE["short_factor"],
            "long_factor": LONGROPE["long_factor"],
        },
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.7,
        "tie_word_embeddings": True,
    },
}


def family_of(name: str) -> str:
    """Return the family of one of `MODELS`."""
    model_type = MODELS[name].get("model_type", "llama")
    return family_for_hf({"model_type": model_type}, or_any=True).name


def random_model(name: str, **overrides: Any) -> Any:
    """Return transformers' model with random weights in fp32, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = json.loads(json.dumps({**SHAPE, **MODELS[name], **overrides}))
    config = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
    config._attn_implementation = "eager"
    model: Any = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def named_as_ours(
    theirs: Mapping[str, Tensor], ours: nn.Module, key_map: KeyMap
) -> dict[str, Tensor]:
    """Return tensors of transformers by our names, joined ones in their parts."""
    sizes = {name: len(parameter) for name, parameter in ours.named_parameters()}
    joined = key_map.joined
    parts: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        names = joined.get(name, (name,))
        rows = [sizes[n] for n in names] if name in joined else [len(tensor)]
        parts |= dict(zip(names, tensor.split(rows), strict=True))
    return parts
