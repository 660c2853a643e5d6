"""Llama's sizes, and its config.json in the spelling of both versions of transformers."""

from dataclasses import replace

import pytest
import torch

from models.flops import parameter_counts
from models.layers.rope import RopeConfig
from models.registry import load_family
from tests.models.tiny import TINY
from tests.parity.same_weights import llama_config

FAMILY = load_family("llama3")
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES = {
    "default": RopeConfig(theta=500_000.0),
    "linear": RopeConfig(theta=10_000.0, kind="linear", factor=4.0),
    "llama3": RopeConfig(theta=500_000.0, kind="llama3", **LLAMA3_SCALING),
}
VERSION_4 = {
    "default": {"rope_theta": 500_000.0, "rope_scaling": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING},
    },
}
VERSION_5 = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "linear": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    },
    "llama3": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3_SCALING},
    },
}


@pytest.mark.parametrize(
    ("flavor", "billions"),
    [("1B", 1.236), ("3B", 3.213), ("8B", 8.030), ("70B", 70.554), ("405B", 405.854)],
)
def test_flavors_have_the_published_number_of_parameters(flavor, billions):
    config = FAMILY.flavor(flavor)
    with torch.device("meta"):
        model = FAMILY.build(config)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameter_counts(config)[0]
    assert counted / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("spelling", [VERSION_4, VERSION_5], ids=["version_4", "version_5"])
def test_rotary_settings_are_read_in_the_spelling_of_both_versions(kind, spelling):
    assert FAMILY.config_from_hf({**SHAPE, **spelling[kind]}).rope == ROPES[kind]


@pytest.mark.parametrize("kind", ROPES)
def test_an_exported_config_is_read_alike_from_either_spelling_alone(kind):
    config = replace(TINY, rope=ROPES[kind])
    exported = FAMILY.config_to_hf(config)
    old = {k: v for k, v in exported.items() if k != "rope_parameters"}
    new = {k: v for k, v in exported.items() if k not in ("rope_theta", "rope_scaling")}
    for spelling in (exported, old, new):
        assert FAMILY.config_from_hf(spelling) == config


@pytest.mark.parametrize("kind", ROPES)
def test_transformers_reads_an_exported_config_with_nothing_left_over(kind):
    config = replace(
        TINY, rope=ROPES[kind], attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        norm_eps=2e-5, initializer_range=0.03, bos_token_id=1, eos_token_id=(2, 3), pad_token_id=4,
    )  # fmt: skip
    exported = FAMILY.config_to_hf(config)
    theirs = llama_config(exported)
    for key in exported.keys() - {"rope_theta", "rope_scaling", "architectures", "model_type"}:
        assert getattr(theirs, key) == exported[key], key
    assert FAMILY.config_from_hf(theirs.to_dict()) == config


def test_a_config_without_rotary_settings_is_refused():
    with pytest.raises(ValueError, match=r"neither rope_theta nor rope_parameters.*10000"):
        FAMILY.config_from_hf(SHAPE)


@pytest.mark.parametrize("kind", ["su", "made_up"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_rotary_type_is_refused(kind, key):
    with pytest.raises(
        ValueError,
        match=rf"config.json has {key}.rope_type = '{kind}'.*default, linear, .*, llama3",
    ):
        FAMILY.config_from_hf({**SHAPE, key: {"rope_type": kind, "factor": 2.0}})


def test_rotary_settings_that_contradict_each_other_are_refused():
    both = {**VERSION_4["linear"], **VERSION_5["llama3"]}
    with pytest.raises(ValueError, match="contradicts itself"):
        FAMILY.config_from_hf({**SHAPE, **both})
    with pytest.raises(ValueError, match="contradicts itself"):
        FAMILY.config_from_hf({**SHAPE, "rope_theta": 1e4, **VERSION_5["default"]})


def test_rotary_settings_that_are_incomplete_or_unknown_are_refused():
    incomplete = {"rope_type": "llama3", "factor": 8.0}
    with pytest.raises(ValueError, match="low_freq_factor"):
        FAMILY.config_from_hf({**SHAPE, "rope_theta": 1e4, "rope_scaling": incomplete})
    unknown = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        FAMILY.config_from_hf({**SHAPE, "rope_parameters": unknown})


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"quantization_config": {"bits": 4}},
        {"num_key_value_heads": 3},
        {"vocab_size": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_the_family_cannot_reproduce_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change)).replace("key_value", "kv")):
        FAMILY.config_from_hf({**SHAPE, **VERSION_4["default"], **change})


def test_missing_optional_keys_take_the_defaults_of_transformers():
    ours = FAMILY.config_from_hf({**SHAPE, "rope_theta": 1e4, "num_key_value_heads": None})
    theirs = llama_config({**SHAPE, "num_key_value_heads": None})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.to_dict()["rope_parameters"]["rope_theta"]


def test_a_tied_head_is_not_stored_and_rotary_tables_carry_nothing():
    tied, untied = (FAMILY.key_map(replace(TINY, tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.to_hf("lm_head.weight") is None
    assert tied.from_hf("lm_head.weight") is None
    assert untied.to_hf("lm_head.weight") == "lm_head.weight"
    assert untied.from_hf("model.layers.3.self_attn.rotary_emb.inv_freq") is None
    assert untied.from_hf("model.norm.weight") == "model.norm.weight"
