"""Rotary angles of every kind equal those of transformers, from either spelling of the settings."""

import json
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from models.layers.rope import (
    RopeConfig,
    RotaryEmbedding,
    document_lengths,
    inverse_frequencies,
    rotate,
)
from models.layers.rope_settings import rope_from_hf, rope_to_hf, ropes_from_hf
from models.registry import load_family
from tests.models.tiny import packed

FP32_ROUNDING = 1e-6
HEAD_DIM, CONTEXT, ORIGINAL = 16, 256, 64
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
}
SHORT, LONG = [1.0 + 0.25 * i for i in range(8)], [1.0 + 1.5 * i for i in range(8)]
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
STARTS_FROM = {"original_max_position_embeddings": ORIGINAL}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {**YARN, **STARTS_FROM},
    "yarn_of_the_context": YARN,
    "yarn_with_everything": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 8,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
        **STARTS_FROM,
    },
    "yarn_attention_factor": {**YARN, "attention_factor": 1.25},
    "longrope": {**LONGROPE, **STARTS_FROM},
    "longrope_factor": {**LONGROPE, "factor": 8.0, **STARTS_FROM},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **STARTS_FROM,
    },
}


def version_4(name: str) -> dict[str, Any]:
    scaling = {("type" if k == "rope_type" else k): v for k, v in SETTINGS[name].items()}
    return {**SHAPE, "rope_theta": 5e4, "rope_scaling": scaling}


def version_5(name: str) -> dict[str, Any]:
    return {**SHAPE, "rope_parameters": {**SETTINGS[name], "rope_theta": 5e4}}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_kind_has_the_frequencies_and_angles_of_transformers(name):
    ours = rope_from_hf(version_5(name))
    assert ours == rope_from_hf(version_4(name))
    theirs = LlamaConfig(**json.loads(json.dumps(version_5(name))))
    make = ROPE_INIT_FUNCTIONS[ours.kind]
    for length in (None, ORIGINAL, ORIGINAL + 1):
        expected, attention_factor = make(theirs, torch.device("cpu"), seq_len=length)
        is_long = length is not None and length > ORIGINAL
        assert torch.equal(inverse_frequencies(ours, HEAD_DIM, is_long=is_long), expected)
        assert ours.attention_factor == attention_factor
    rotary = RotaryEmbedding(ours, HEAD_DIM)
    for length in (ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT):
        positions = torch.arange(length)[None]
        their_angles = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
        for found, expected in zip(rotary(positions), their_angles, strict=True):
            assert torch.equal(found, expected[..., : HEAD_DIM // 2])


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_written_are_read_alike_from_either_spelling_alone(name):
    config = rope_from_hf(version_5(name))
    written = {**SHAPE, **json.loads(json.dumps(rope_to_hf(config)))}
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    for spelling in (written, old, new):
        assert rope_from_hf(spelling) == config
    theirs = LlamaConfig(**written)
    assert rope_from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize("kind", ["default", "longrope"])
def test_a_part_of_each_head_is_rotated_as_transformers_does(kind):
    rope: dict[str, Any] = {"rope_type": "default"}
    if kind == "longrope":
        rope = {"rope_type": "longrope", "short_factor": SHORT[:6], "long_factor": LONG[:6]}
    hf = {**SHAPE, **STARTS_FROM, "partial_rotary_factor": 0.75}
    theirs = Phi3Config(**json.loads(json.dumps({**hf, "rope_parameters": rope})))
    config = rope_from_hf(theirs.to_dict(), is_partial=True)
    assert config == rope_from_hf({**hf, "rope_theta": 1e4, "rope_scaling": rope}, is_partial=True)
    for length in (ORIGINAL, 2 * ORIGINAL):
        positions = torch.arange(length)[None]
        found = RotaryEmbedding(config, HEAD_DIM)(positions)
        expected = Phi3RotaryEmbedding(theirs)(torch.zeros(1), positions)
        for ours, other in zip(found, expected, strict=True):
            assert torch.equal(ours, other[..., :6])
        heads = torch.randn(1, length, 2, HEAD_DIM)
        rotated = rotate(heads, found)
        assert torch.equal(rotated[..., 12:], heads[..., 12:])
        assert torch.equal(rotated[..., :12], rotate(heads[..., :12], found))
    with pytest.raises(ValueError, match=r"partial_rotary_factor = 0\.75.*whole heads"):
        rope_from_hf(hf | {"rope_theta": 1e4})


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_document_is_rotated_alike_alone_and_packed(name):
    rotary = RotaryEmbedding(rope_from_hf(version_5(name)), HEAD_DIM)
    lengths = [5, CONTEXT + 40, 1, ORIGINAL + 3, ORIGINAL]
    positions, _ = packed(lengths)
    assert document_lengths(positions)[0].tolist() == [n for n in lengths for _ in range(n)]
    alone = [rotary(torch.arange(n)[None])[0] for n in lengths]
    assert torch.equal(rotary(positions)[0], torch.cat(alone, dim=1))
    last = torch.tensor([[CONTEXT + 39]])  # one token, the others in a cache
    assert torch.equal(rotary(last)[0], alone[1][:, -1:])


def test_layers_with_their_own_settings_are_read_by_their_type():
    by_type = {
        "full_attention": {**SETTINGS["linear"], "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert ropes_from_hf({**SHAPE, "rope_parameters": by_type}) == {
        "full_attention": RopeConfig(theta=1e6, kind="linear", factor=3.0),
        "sliding_attention": RopeConfig(theta=1e4),
    }
    with pytest.raises(ValueError, match="rope_parameters that differ by type of layer"):
        rope_from_hf({**SHAPE, "rope_parameters": by_type})
    alike = dict.fromkeys(by_type, by_type["full_attention"])
    assert rope_from_hf({**SHAPE, "rope_parameters": alike}).theta == 1e6


def test_gemma_3_has_the_angles_of_transformers_in_both_types_of_layer():
    family = load_family("gemma3")
    written = family.config_to_hf(family.flavor("4B"))
    theirs = Gemma3TextConfig(**json.loads(json.dumps(written)))
    config = family.config_from_hf(theirs.to_dict())
    positions = torch.tensor([[0, 1, 1023, 1024, 131_071]])
    angles = Gemma3RotaryEmbedding(theirs)
    ropes = {"full_attention": config.rope, "sliding_attention": config.sliding_rope}
    for kind, rope in ropes.items():
        expected = angles(torch.zeros(1), positions, kind)
        for found, other in zip(RotaryEmbedding(rope, 256)(positions), expected, strict=True):
            assert torch.equal(found, other[..., :128])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, r"rope_scaling\.type = 'ntk'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "without short_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "mscale_x": 2.0, "factor": 1.0}}, "mscale_x"),
    ],
)
def test_settings_that_are_not_known_or_not_complete_are_refused(change, message):
    with pytest.raises(ValueError, match=rf"config\.json has .*{message}"):
        rope_from_hf({"rope_theta": 1e4, **change})


def test_channels_that_cannot_be_paired_are_refused():
    longrope = RopeConfig(theta=1e4, kind="longrope", short_factor=(1.0,), long_factor=(1.0,))
    with pytest.raises(ValueError, match="1 numbers in short_factor, but rotates 8 pairs"):
        inverse_frequencies(longrope, 16)
    with pytest.raises(ValueError, match=r"partial_rotary_factor = 0\.2.*rotates 3 channels"):
        inverse_frequencies(RopeConfig(theta=1e4, partial_rotary_factor=0.2), 16)
