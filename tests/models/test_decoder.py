"""The decoder's contract with those that drive it: meta start, dtypes, names and plan."""

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from models.decoder import DECODER_PLAN, DecoderLM, decoder_plan
from models.layers.norm import RMSNorm
from models.layers.rope import RopeConfig, RotaryEmbedding, inverse_frequencies, rotate
from tests.models.tiny import TINY, fill, packed, random_tokens, tiny_model

POSITIONS = torch.arange(12)[None]


def test_a_model_built_on_the_meta_device_runs_once_it_is_filled():
    with torch.device("meta"):
        model = DecoderLM(TINY)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    fill(model.to_empty(device="cpu"), spread=5.0)
    tokens = random_tokens(1, 12)
    expected = tiny_model()(tokens, positions_BT=POSITIONS)
    assert torch.equal(model(tokens, positions_BT=POSITIONS), expected)


def test_tied_weights_are_one_parameter():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert decoder_plan(model.config).tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert decoder_plan(TINY).tied == ()


@pytest.mark.parametrize("bias", [True, False])
def test_the_plan_names_only_what_exists_and_covers_every_parameter(bias):
    model = tiny_model(attention_bias=bias, mlp_bias=bias)
    modules = [name for name, _ in model.named_modules()]
    plan = DECODER_PLAN
    patterns = [*plan.first, *plan.blocks, *plan.last, *plan.attention, *plan.tensor]
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in modules), pattern
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0]
        assert any(fnmatchcase(owner, pattern) for pattern in plan.tensor), name


def test_hidden_states_have_the_dtype_of_the_embedding_and_angles_are_fp32():
    model = tiny_model().bfloat16()
    seen = []
    model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].dtype, kwargs["rotary"])),
        with_kwargs=True,
    )
    logits = model(random_tokens(1, 12), positions_BT=POSITIONS)
    ((hidden, (cos, sin)),) = seen
    assert (hidden, logits.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)


def test_angles_are_exact_at_positions_that_bfloat16_cannot_hold():
    model = tiny_model().bfloat16()
    cos, sin = model.rotary(torch.tensor([[100_001]]))
    angles = 100_001 * inverse_frequencies(TINY.rope, TINY.head_dim)
    assert torch.equal(cos[0, 0], angles.cos())
    assert torch.equal(sin[0, 0], angles.sin())


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    rotary = RotaryEmbedding(RopeConfig(theta=10_000.0), 8)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(position_q: int, position_k: int) -> float:
        turned = [
            rotate(x, rotary(torch.tensor([[p]]))) for x, p in ((q, position_q), (k, position_k))
        ]
        assert torch.allclose(turned[0].norm(), q.norm())
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 8), abs=1e-3)


def test_the_norm_is_taken_in_fp32():
    norm = RMSNorm(64, eps=1e-5).bfloat16()
    x = (torch.randn(4, 64) * 300).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())


def test_a_block_takes_its_activation_by_position_and_the_rest_by_keyword():
    model = tiny_model()
    calls = []
    for name in ("model.layers.0", "model.layers.0.self_attn", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(len(args)), with_kwargs=True
        )
    model(random_tokens(1, 12), positions_BT=POSITIONS, labels_BT=random_tokens(1, 12))
    assert calls == [1, 1, 1]


def test_blocks_compile_without_graph_breaks_and_give_the_same_gradients():
    positions, documents = packed([5, 7])
    results = []
    for is_compiled in (False, True):
        model = tiny_model()
        for block in model.model.layers:
            if is_compiled:
                block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
        tokens = random_tokens(1, 12)
        logps = model(tokens, positions_BT=positions, documents_BT=documents, labels_BT=tokens)
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    tokens = random_tokens(1, 12)
    model(tokens, positions_BT=POSITIONS, labels_BT=tokens).sum().backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(("model.embed_tokens", "model.layers.0."))
        assert (parameter.grad is None) is is_frozen, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 does not divide"),
        ({"head_dim": 7}, "head_dim = 7; rotary embedding needs an even number"),
        ({"num_layers": 0}, "num_layers = 0; give at least 1"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_modules_without_parameters_print_what_they_do():
    assert "(core): AttentionCore(sdpa)" in str(tiny_model())
    assert isinstance(tiny_model().masks, nn.Module)
