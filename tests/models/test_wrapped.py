"""A wrapped model is transformers' own: logits, buffers, documents, initial values, refusals."""

from typing import Any

import pytest
import torch

from models.adapters import AdapterSpec, adapt
from models.families.hf import FAMILY
from models.layers.lora import adapted_linears
from models.registry import load_family
from models.wrapped.generate import longest_row
from tests.parity.wrapped_cases import (
    LENGTHS,
    MODELS,
    SEED,
    SHAPE,
    alone,
    packed_rows,
    plain,
    wrapped,
)

FP32_REORDERED_SUM = 1e-5  # rows of other lengths, so sums in another order


@pytest.mark.parametrize("name", MODELS)
def test_logits_buffers_and_documents_are_those_of_the_plain_module(name: str) -> None:
    ours, theirs, rows = wrapped(MODELS[name]), plain(MODELS[name]), packed_rows()
    tokens_BT = rows["tokens_BT"]
    found, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], b) and found[n].dtype == b.dtype for n, b in expected.items())
    with torch.no_grad():
        whole_BT = torch.arange(16).expand(2, 16)
        logits = theirs(tokens_BT).logits
        assert torch.equal(ours.train()(tokens_BT, positions_BT=whole_BT), logits)
        logps_BT = ours(**rows)
        assert not logps_BT[rows["labels_BT"] < 0].any()
        scored = torch.cat(alone(theirs, rows))
        torch.testing.assert_close(
            logps_BT[rows["labels_BT"] >= 0], scored, atol=FP32_REORDERED_SUM, rtol=0
        )
        changed = tokens_BT.clone()
        changed[0, : LENGTHS[0][0]] = (changed[0, : LENGTHS[0][0]] + 1) % 61
        again_BT = ours(**{**rows, "tokens_BT": changed})
        assert torch.equal(again_BT[0, LENGTHS[0][0] :], logps_BT[0, LENGTHS[0][0] :])
        assert not torch.equal(again_BT[0, :4], logps_BT[0, :4])


def test_adapters_drop_again_after_an_evaluation_and_the_model_s_own_modules_never_do() -> None:
    sizes = FAMILY.config_from_hf(MODELS["granite"])
    with torch.device("meta"):
        model = FAMILY.build(sizes)
    spec = AdapterSpec(name="default", kind="lora", rank=2, alpha=1.0, dropout=0.5)
    adapt(model, sizes.plan, [spec])
    linears = {linear for _, linear in adapted_linears(model)}
    was_training = model.training
    assert was_training and all(linear.training for linear in linears)
    assert not any(module.training for module in model.eval().modules())
    model.train(was_training)
    assert {module for module in model.modules() if module.training} == {model, *linears}


def test_initial_values_are_those_of_transformers_and_owe_nothing_to_the_global_generator() -> None:
    before = torch.get_rng_state()
    ours, other = wrapped(MODELS["gpt2"]), wrapped(MODELS["gpt2"], seed=SEED + 1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif ".ln_" in name:
            assert (parameter == 1).all()
        else:
            # Radford et al. 2019, section 2.3: smaller where the result joins the residual stream.
            std = 0.2 / 2 if name.endswith("c_proj.weight") else 0.2
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
            assert not torch.equal(parameter, other.get_parameter(name))


SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"model_type": "mine", "auto_map": {}}, "code of its own, which is never run"),
    "no_type": ({}, "model_type = None"),
    "not_causal": ({"model_type": "t5"}, "no causal language model"),
    "two_streams": ({"model_type": "bart"}, "more than one stream"),
    "experts": ({"model_type": "mixtral", **SMALL}, "it has experts"),
    "recurrent": ({"model_type": "mamba", **SMALL}, "recurrent state"),
    "quantised": ({"model_type": "gpt2", "quantization_config": {"bits": 4}}, "quantised"),
    "bad_sizes": ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, "cannot build .*divisible"),
    "no_plain_head": ({"model_type": "opt", **SMALL, "num_attention_heads": 2}, "in its own way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_wrapped_is_refused_with_the_reason(case: str) -> None:
    hf, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        FAMILY.config_from_hf(hf)


def test_limits_have_reasons_and_sizes_need_a_folder() -> None:
    gpt2, olmo = (FAMILY.config_from_hf(MODELS[name]) for name in ("gpt2", "olmo"))
    assert gpt2.refusal("tensor_parallel") == "transformers declares no plan for it"
    assert olmo.refusal("tensor_parallel") is None
    assert (gpt2.longest_row, olmo.longest_row) == (64, None)
    clipped = FAMILY.config_from_hf({**MODELS["olmo"], "clip_qkv": 0.5})
    assert "in place (clip_qkv)" in str(clipped.refusal("tensor_parallel"))
    falcon = {**SMALL, "model_type": "falcon", "num_attention_heads": 2}
    limits = FAMILY.config_from_hf(falcon).limits
    assert "masks of its own" in limits["packed_documents"]
    lfm2 = {**SMALL, "model_type": "lfm2", "num_attention_heads": 2, "layer_types": ["conv"]}
    assert "type conv" in FAMILY.config_from_hf(lfm2).limits["packed_documents"]
    with pytest.raises(ValueError, match=r"set model\.hf_assets_path"):
        load_family("hf").flavor("debugmodel")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "olmo", "is_causal": False}, "see those behind them"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "see those behind"),
        (
            {"model_type": "olmo", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "type dynamic depends on the longest row",
        ),
        ({"model_type": "git"}, "more than one stream"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_what_would_read_its_labels_or_other_rows_is_refused(settings: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FAMILY.config_from_hf({**SHAPE, **settings})


def test_only_learned_positions_limit_what_can_be_generated() -> None:
    assert longest_row(plain(MODELS["gpt2"])) == 64
    assert longest_row(plain(MODELS["olmo"])) is None
