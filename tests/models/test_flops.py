"""Counted operations agree with what torch's own counter sees in forward and backward."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.adapters import AdapterSpec, adapt, adapter_weights
from models.decoder import DecoderLM, decoder_plan
from models.families.hf import FAMILY
from models.flops import (
    attention_train_flops,
    linear_train_flops_per_token,
    parameter_counts,
    train_flops_per_token,
)
from models.layers.lora import adapter_of
from models.registry import load_family
from parallelisms.materialise import materialise
from tests.models.tiny import TINY, fill, random_tokens
from tests.parity.wrapped_cases import MODELS

WITHIN = 0.01
ADAPTER = AdapterSpec(name="default", kind="lora", rank=8, alpha=8.0)
SHAPES = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"num_kv_heads": 4, "head_dim": 16},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "qkv_bias_and_head_norms": {"qkv_bias": True, "qk_norm": "head"},
    "norms_on_both_sides": {"norms": "both", "zero_centered_norm": True, "attention_softcap": 5.0},
    "norms_after_and_across_heads": {"norms": "after", "qk_norm": "width"},
}


def counted_flops(model: nn.Module, lengths: list[int], vocab_size: int = 97) -> int:
    """Return torch's count for these documents, each in a row of its own."""
    counter = FlopCounterMode(display=False)
    with counter:
        for length in lengths:
            tokens = random_tokens(1, length, vocab_size=vocab_size)
            positions = torch.arange(length)[None]
            model(tokens, positions_BT=positions, labels_BT=tokens).sum().backward()
    return counter.get_total_flops()


def eager_model(**overrides) -> DecoderLM:
    # Written-out attention: the counter sees its products, and nothing is recomputed.
    return fill(DecoderLM(replace(TINY, attention="eager", **overrides)))


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_a_row_agree_with_torchs_counter(shape):
    model = eager_model(**SHAPES[shape])
    expected = train_flops_per_token(model.config, 48) * 48
    assert counted_flops(model, [48]) == pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize("name", ["gpt2", "granite"])
def test_operations_of_a_wrapped_model_agree_with_torchs_counter(name):
    sizes = replace(FAMILY.config_from_hf(MODELS[name]), attention="eager")
    model = FAMILY.build(sizes).float()
    expected = train_flops_per_token(sizes, 48) * 48
    assert counted_flops(model, [48], vocab_size=61) == pytest.approx(expected, rel=WITHIN)


def test_operations_of_documents_follow_their_squared_lengths():
    model = eager_model()
    lengths = [5, 1, 40, 18]
    squares = sum(n * n for n in lengths)
    expected = linear_train_flops_per_token(model.config) * sum(lengths)
    expected += attention_train_flops(
        model.config, squares, longest_tokens=max(lengths), causal=False
    )
    assert counted_flops(model, lengths) == pytest.approx(expected, rel=WITHIN)


def test_the_causal_figure_counts_half_of_the_square():
    whole = attention_train_flops(TINY, 100, longest_tokens=10, causal=False)
    assert attention_train_flops(TINY, 100, longest_tokens=10) == whole / 2


@pytest.mark.parametrize(
    "frozen",
    [
        ("model.embed_tokens",),
        ("model.embed_tokens", "model.layers.0"),
        ("model.layers.1",),
        ("model.embed_tokens", "model.layers", "model.norm"),
    ],
    ids=" ".join,
)
def test_frozen_parts_are_counted_by_their_real_backward(frozen):
    model = eager_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    length = 4  # so short that attention hardly counts
    counted = counted_flops(model, [length])
    expected = linear_train_flops_per_token(
        model.config, is_trainable=lambda name: not name.startswith(frozen)
    )
    attention = attention_train_flops(model.config, length**2, longest_tokens=length, causal=False)
    assert expected * length <= counted <= (expected * length + attention) * (1 + WITHIN)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_as_the_model_has_them(shape):
    model = DecoderLM(replace(TINY, **SHAPES[shape]))
    everything = sum(p.numel() for p in model.parameters())
    embedding = model.model.embed_tokens.weight.numel()
    without = everything if model.config.tie_word_embeddings else everything - embedding
    assert parameter_counts(model.config) == (everything, without)


def test_a_window_leaves_the_scores_that_its_mask_lets_through():
    window, length = 12, 48
    config = replace(
        TINY, sliding_window=window, layer_types=("full_attention", "sliding_attention")
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = int(((distance >= 0) & (distance < window)).sum())
    per_pair = 12 * config.num_heads * config.head_dim
    linear = linear_train_flops_per_token(config)
    found = train_flops_per_token(config, length) - linear
    # Twice the masked count, but for the diagonal, which the convention halves too.
    assert found * length == pytest.approx(per_pair * (length**2 + 2 * seen), rel=0.03)
    packed = attention_train_flops(config, length**2, longest_tokens=length)
    assert packed == pytest.approx(found * length / 2)
    within = attention_train_flops(config, window**2, longest_tokens=window)
    assert within == attention_train_flops(TINY, window**2, longest_tokens=window)


def test_the_usual_convention_gives_the_known_figure_for_8b():
    config = load_family("llama3").flavor("8B")
    conventional = 6 * parameter_counts(config)[1] + 12 * 32 * 4096 * 8192
    assert train_flops_per_token(config, 8192) == pytest.approx(conventional, rel=1e-4)


def test_adapters_cost_all_three_products_and_the_frozen_weights_beside_them_two():
    model = eager_model(num_layers=8)
    with torch.device("meta"):
        adapt(model, decoder_plan(model.config), [ADAPTER])
    materialise(model, "cpu")
    named = dict(model.named_parameters())
    fill(model)
    expected = train_flops_per_token(
        model.config,
        48,
        is_trainable=lambda name: adapter_of(name) is not None,
        adapters=adapter_weights((name, p.numel()) for name, p in named.items()),
    )
    # Keys and values of the first block are said to pass a gradient on, which nothing takes.
    assert counted_flops(model, [48]) == pytest.approx(expected * 48, rel=WITHIN)
