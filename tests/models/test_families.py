"""Sizes of the families beside Llama, and what their config.json may say."""

from dataclasses import replace

import pytest

from models.decoder import FULL, SLIDING
from models.flops import parameter_counts
from models.layers.rope import RopeConfig
from models.registry import load_family

BILLIONS = {
    "qwen2": {
        "0.5B": 0.494,
        "1.5B": 1.544,
        "3B": 3.086,
        "7B": 7.616,
        "14B": 14.770,
        "32B": 32.764,
        "72B": 72.706,
    },
    "qwen3": {"0.6B": 0.596, "1.7B": 1.721, "4B": 4.022, "8B": 8.191, "14B": 14.768, "32B": 32.762},
    "olmo2": {"1B": 1.485, "7B": 7.299, "13B": 13.716, "32B": 32.234},
    "phi3": {"mini_4k": 3.821, "medium_4k": 13.960, "phi4": 14.660},
    "gemma2": {"2B": 2.614, "9B": 9.242, "27B": 27.227},
    # From 4B on less the vision tower, of which each has 0.417, and its projection.
    "gemma3": {"270M": 0.268, "1B": 1.000, "4B": 3.880, "12B": 11.766, "27B": 27.009},
    "mistral": {"7B_v0.1": 7.242, "7B": 7.248, "12B": 12.248, "24B": 23.572},
}
"""Numbers of parameters that huggingface.co counts in the files of the released models."""

QWEN2 = load_family("qwen2").config_to_hf(load_family("qwen2").flavor("0.5B"))
GEMMA2 = load_family("gemma2").config_to_hf(load_family("gemma2").flavor("2B"))
GEMMA3 = load_family("gemma3").config_to_hf(load_family("gemma3").flavor("4B"))
MISTRAL = load_family("mistral").config_to_hf(load_family("mistral").flavor("7B"))


@pytest.mark.parametrize("name", BILLIONS)
def test_flavors_have_the_published_number_of_parameters(name):
    family = load_family(name)
    assert family.flavors.keys() - {"debugmodel"} == BILLIONS[name].keys()
    for flavor, billions in BILLIONS[name].items():
        counted = parameter_counts(family.flavor(flavor))[0]
        assert counted / 1e9 == pytest.approx(billions, abs=1e-3), flavor


@pytest.mark.parametrize("name", BILLIONS)
def test_each_flavor_is_read_from_the_config_that_it_writes(name):
    family = load_family(name)
    for flavor, config in family.flavors.items():
        assert family.config_from_hf(family.config_to_hf(config)) == config, flavor


def test_qwens_windows_are_read_from_the_spelling_of_both_versions():
    read = load_family("qwen2").config_from_hf
    window = {**QWEN2, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 20}
    by_number = read({k: v for k, v in window.items() if k != "layer_types"})
    assert by_number.layer_types == (FULL,) * 20 + (SLIDING,) * 4
    assert by_number.sliding_window == 32
    by_name = read({**window, "layer_types": [SLIDING, FULL] * 12})
    assert by_name.layer_types == (SLIDING, FULL) * 12
    unused = {**window, "use_sliding_window": False, "layer_types": None}
    assert read(unused) == read(QWEN2)
    beyond = {**window, "max_window_layers": 24, "layer_types": None}
    assert read(beyond) == read(QWEN2)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"layer_types": [SLIDING] * 24}, "use_sliding_window = False"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu', which the qwen2 family"),
        ("qwen2", {"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ("qwen2", {"model_type": "qwen3"}, "model_type = 'qwen3'"),
        ("mistral", {"layer_types": [FULL] * 32}, "layer_types = .* mistral family"),
        ("mistral", {"partial_rotary_factor": 0.5}, "type mistral rotate whole heads"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu', which the gemma2"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "logit_softcap = -1"),
        ("gemma2", {"sliding_window": None}, "sliding_window = None"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50"),
        ("gemma3", {"rope_local_base_freq": 5e3}, "contradicts itself: rope_theta = 5000"),
        ("gemma3", {"model_type": "gemma3"}, "beside a vision tower.*save the language model"),
    ],
)
def test_a_config_that_the_family_cannot_reproduce_is_refused(family, change, message):
    given = {"qwen2": QWEN2, "mistral": MISTRAL, "gemma2": GEMMA2, "gemma3": GEMMA3}[family]
    with pytest.raises(ValueError, match=message):
        load_family(family).config_from_hf({**given, **change})


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    silent = {k: v for k, v in MISTRAL.items() if k not in ("sliding_window", "head_dim")}
    config = load_family("mistral").config_from_hf(silent)
    assert (config.sliding_window, config.layer_types) == (4096, (SLIDING,) * 32)
    assert config.head_dim == 128
    qwen3 = load_family("qwen3")
    sizes = replace(qwen3.flavor("0.6B"), num_heads=4, num_kv_heads=4)
    silent = {k: v for k, v in qwen3.config_to_hf(sizes).items() if k != "head_dim"}
    assert qwen3.config_from_hf(silent) == sizes  # not hidden_size / num_heads


def test_gemma_2_without_caps_takes_the_usual_backend_and_silence_means_what_transformers_assumes():
    read = load_family("gemma2").config_from_hf
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "layer_types", "sliding_window")
    silent = {k: v for k, v in GEMMA2.items() if k not in (*keys, "tie_word_embeddings")}
    assert read(silent) == load_family("gemma2").flavor("2B")
    without = read({**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (without.attention_softcap, without.logit_softcap) == (None, None)
    assert (without.attention, read(GEMMA2).attention) == ("sdpa", "eager")


def test_gemma_3_is_read_from_the_spelling_of_both_versions():
    family = load_family("gemma3")
    released = {  # text_config of the released 4B: all else is what transformers assumes
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    assert family.config_from_hf(released) == family.flavor("4B")
    spelling = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")
    new = {k: v for k, v in GEMMA3.items() if k not in spelling}
    old = {k: v for k, v in GEMMA3.items() if k not in ("rope_parameters", "layer_types")}
    changed = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3}
    assert family.config_from_hf(new) == family.config_from_hf(old) == family.flavor("4B")
    other = family.config_from_hf({**old, **changed})
    assert other.sliding_rope == RopeConfig(theta=2e4)
    assert other.rope == replace(family.flavor("4B").rope, theta=5e5)
    assert other.layer_types == ((SLIDING, SLIDING, FULL) * 12)[:34]
    assert family.config_from_hf(family.config_to_hf(other)) == other
