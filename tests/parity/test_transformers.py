"""Each family against transformers': logits, every gradient, and rotary angles of Llama."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.layers.rope import RotaryEmbedding
from models.registry import load_family
from tests.models.tiny import gradients, random_tokens, worst_error
from tests.parity.hf_cases import (
    MODELS,
    SHAPE,
    llama_config,
    named_as_ours,
    random_model,
    same_in_ours,
)

FP32_REORDERED_SUM = 1e-5  # the same products, added up in another order
ANGLES = 1e-6
ROWS, TOKENS = 2, 96  # longer than the original context of the llama3 rotary cases


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_those_of_transformers(name, tmp_path):
    theirs = random_model(name)
    ours = same_in_ours(theirs, tmp_path)
    tokens = random_tokens(ROWS, TOKENS, vocab_size=SHAPE["vocab_size"])
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[0, :5] = -100
    positions = torch.arange(TOKENS).expand(ROWS, -1)

    expected = theirs(tokens, use_cache=False).logits
    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()

    logits = ours(tokens, positions_BT=positions)
    logps = ours(tokens, positions_BT=positions, labels_BT=labels)
    our_loss = -logps.sum() / (labels != -100).sum()
    our_loss.backward()

    assert (logits - expected).abs().max() <= FP32_REORDERED_SUM * expected.abs().max()
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    their_gradients = {n: p.grad for n, p in theirs.named_parameters()}
    expected_gradients = named_as_ours(their_gradients, ours, theirs.config.model_type)
    assert worst_error(gradients(ours), expected_gradients) <= FP32_REORDERED_SUM


def test_gemmas_norms_and_embeddings_are_rounded_to_bfloat16_as_transformers_does(tmp_path):
    theirs = random_model("gemma2", hidden_size=52)  # whose root is not a number of bf16
    ours = same_in_ours(theirs, tmp_path).bfloat16()
    theirs = theirs.bfloat16()
    tokens = random_tokens(ROWS, TOKENS, vocab_size=SHAPE["vocab_size"])
    seen: list[torch.Tensor] = []
    ours.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        ours(tokens, positions_BT=torch.arange(TOKENS).expand(ROWS, -1))
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
