"""Tiny models of transformers that no family of ours builds, ours around them, and packed rows."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from models.families.hf import FAMILY
from models.wrapped.initial import initial_values
from models.wrapped.module import WrappedLM
from parallelisms.materialise import fill, materialise

SEED = 3
IGNORED = -100
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    **NO_TOKENS,
}
MODELS: dict[str, dict[str, Any]] = {
    # Tied, learned positions, no plan for tensor parallelism, transposed weights, dropout.
    "gpt2": {
        **{"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4},
        **{"n_positions": 64, "initializer_range": 0.2, **NO_TOKENS},
    },
    "olmo": {**SHAPE, "model_type": "olmo"},
    # Divides its logits.
    "granite": {**SHAPE, "model_type": "granite", "logits_scaling": 3.0, "attention_bias": True},
    # Tied, biases, windows that cut documents.
    "starcoder2": {**SHAPE, "model_type": "starcoder2", "sliding_window": 4},
}
LENGTHS = ((7, 9), (4, 10))
"""Of the documents in each row of 16 tokens; the rest of a row is padding."""


def wrapped(hf: Mapping[str, Any], seed: int = SEED) -> WrappedLM:
    """Return our model of a config.json at its initial values, made as a run makes it."""
    sizes = FAMILY.config_from_hf(hf)
    with torch.device("meta"):
        model = FAMILY.build(sizes)
    materialise(model, "cpu")
    fill(model, initial_values(model, sizes, seed=seed))
    return model


def plain(hf: Mapping[str, Any]) -> Any:
    """Return transformers' module as it makes it itself, with the same parameters."""
    config = AutoConfig.for_model(**hf)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    theirs.load_state_dict(wrapped(hf).state_dict())
    return theirs


def packed_rows() -> dict[str, Tensor]:
    """Return two rows of two documents each, the second padded; labels are shifted."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(61, (2, 16), generator=generator)
    documents_BT, positions_BT = torch.zeros_like(tokens_BT), torch.zeros_like(tokens_BT)
    labels_BT = torch.full_like(tokens_BT, IGNORED)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for number, length in enumerate(lengths, 1):
            end = begin + length
            documents_BT[row, begin:end] = number
            positions_BT[row, begin:end] = torch.arange(length)
            labels_BT[row, begin : end - 1] = tokens_BT[row, begin + 1 : end]
            begin = end
    return {
        "tokens_BT": tokens_BT,
        "documents_BT": documents_BT,
        "positions_BT": positions_BT,
        "labels_BT": labels_BT,
    }


def alone(theirs: Any, rows: dict[str, Tensor]) -> list[Tensor]:
    """Return the log-probabilities of each document's labels, read alone by transformers."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            tokens_T = rows["tokens_BT"][row, begin : begin + length]
            logits_TV = theirs(tokens_T.unsqueeze(0)).logits[0, :-1].float()
            found.append(-F.cross_entropy(logits_TV, tokens_T[1:], reduction="none"))
            begin += length
    return found
