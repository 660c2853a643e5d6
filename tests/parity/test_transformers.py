"""Packed documents and rotary angles of Llama against transformers; see also test_families.py."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.verify.variants import (
    MODELS,
    SHAPE,
    random_model,
)
from models.layers.rope import RotaryEmbedding
from models.registry import load_family
from tests.models.tiny import random_tokens
from tests.parity.same_weights import llama_config, same_in_ours

FP32_REORDERED_SUM = 1e-5  # the same products, added up in another order
ANGLES = 1e-6


def test_gemmas_norms_and_embeddings_are_rounded_to_bfloat16_as_transformers_does(tmp_path):
    theirs = random_model("gemma2", hidden_size=52)  # whose root is not a number of bf16
    ours = same_in_ours(theirs, tmp_path).bfloat16()
    theirs = theirs.bfloat16()
    tokens = random_tokens(2, 24, vocab_size=SHAPE["vocab_size"])
    seen: list[torch.Tensor] = []
    ours.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        ours(tokens, positions_BT=torch.arange(24).expand(2, -1))
        embedded = theirs.model.embed_tokens(tokens)
        assert torch.equal(seen[0], embedded)
        assert torch.equal(ours.model.norm(embedded), theirs.model.norm(embedded))


@pytest.mark.parametrize("name", ["llama_3", "llama_3_1", "llama_3_2", "linear_rope"])
def test_cosines_and_sines_equal_those_of_transformers_below_and_above_the_original_context(name):
    hf_config = llama_config({**SHAPE, **MODELS[name]})
    config = load_family("llama3").config_from_hf(hf_config.to_dict())
    positions = torch.tensor([[0, 1, 2, 31, 63, 64, 65, 127, 511, 512, 4097, 131_071, 1_000_003]])
    cos, sin = RotaryEmbedding(config.rope, config.head_dim)(positions)
    expected = LlamaRotaryEmbedding(hf_config)(torch.zeros(1), positions)
    for ours, theirs in zip((cos, sin), expected, strict=True):
        first, second = theirs.chunk(2, dim=-1)
        assert torch.equal(first, second)
        assert (ours - first).abs().max() <= ANGLES


def test_released_sizes_have_the_rotary_angles_of_transformers():
    family = load_family("llama3")
    for flavor in ("1B", "3B", "8B", "70B", "405B"):
        config = family.flavor(flavor)
        hf_config = llama_config(family.config_to_hf(config))
        positions = torch.tensor([[0, 1, 8191, 8192, 131_071]])
        cos, sin = RotaryEmbedding(config.rope, config.head_dim)(positions)
        their_cos, their_sin = LlamaRotaryEmbedding(hf_config)(torch.zeros(1), positions)
        half = config.head_dim // 2
        assert (cos - their_cos[..., :half]).abs().max() <= ANGLES
        assert (sin - their_sin[..., :half]).abs().max() <= ANGLES


@pytest.mark.parametrize("name", ["llama_3_1", "longrope", "qwen3_window_bias"])
def test_packed_documents_have_the_logits_that_transformers_gives_each_alone(name, tmp_path):
    theirs = random_model(name)
    ours = same_in_ours(theirs, tmp_path)
    lengths = [40, 1, 70, 9]
    tokens = random_tokens(1, sum(lengths), vocab_size=SHAPE["vocab_size"])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), d) for d, n in enumerate(lengths, start=1)])[None]
    logits = ours(tokens, positions_BT=positions, documents_BT=documents)[0]
    expected = [theirs(row[None]).logits[0] for row in tokens[0].split(lengths)]
    assert torch.allclose(logits, torch.cat(expected), atol=FP32_REORDERED_SUM, rtol=1e-5)
