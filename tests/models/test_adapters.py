"""Adapted linears against PEFT and against their merged weight; which linears can be adapted."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.adapters import AdapterConfig, OneAdapterConfig, fill_adapters, local_row_lengths
from models.adapters import AdapterSpec, adapt
from models.decoder import DecoderLM, decoder_plan
from models.layers.lora import (
    LowRank,
    adapted_linears,
    adapter_of,
    adapters_disabled,
    merged_weight,
)
from parallelisms.materialise import materialise
from tests.models.tiny import TINY, random_tokens, tiny_model

ANOTHER_ORDER = 5e-6  # the same products in fp32, added in another order
TOKENS = random_tokens(2, 12)
POSITIONS = torch.arange(12).expand(2, 12)
BIASED = {"attention_bias": True, "mlp_bias": True}
LORA = AdapterSpec(name="default", kind="lora", rank=4, alpha=8.0)
RSLORA = AdapterSpec(name="rs", kind="lora", rank=3, alpha=6.0, use_rslora=True)
DORA = AdapterSpec(name="default", kind="dora", rank=4, alpha=8.0)
SOME = AdapterSpec(name="some", kind="dora", rank=2, alpha=2.0, targets=("*.self_attn.[qv]_proj",))


def adapted(*specs: AdapterSpec, **overrides: Any) -> DecoderLM:
    """Return the tiny model with new adapters."""
    base = tiny_model(**overrides)
    with torch.device("meta"):
        model = DecoderLM(base.config)
    adapt(model, decoder_plan(base.config), specs)
    materialise(model, "cpu")
    model.load_state_dict(base.state_dict(), strict=False)
    fill_adapters(model, seed=1)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Give every parameter of an adapter a value that has an effect."""
    generator = torch.Generator().manual_seed(2)
    for parameter in trained(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, positions_BT=POSITIONS)


@pytest.mark.parametrize("spec", [LORA, RSLORA], ids=["lora", "rslora"])
def test_a_new_lora_changes_no_bit(spec: AdapterSpec) -> None:
    assert torch.equal(logits(adapted(spec, **BIASED)), logits(tiny_model(**BIASED)))


def test_a_new_dora_changes_no_more_than_rounding_does() -> None:
    model, base = adapted(DORA, SOME, **BIASED), tiny_model(**BIASED)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-5)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    for magnitude in linear.lora_magnitude_vector.parameters():  # pyright: ignore
        assert torch.equal(magnitude, local_row_lengths(linear.weight))  # pyright: ignore


def test_only_adapters_get_gradients_and_every_one_does() -> None:
    model = adapted(DORA, RSLORA)
    move(model)
    logits(model).square().sum().backward()
    parts = {"lora_A": 28, "lora_B": 28, "lora_magnitude_vector": 14}
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == (adapter_of(name) is not None), name
    names = [name.split(".")[-3] for name in trained(model)]
    assert {part: names.count(part) for part in parts} == parts


def test_without_adapters_the_model_is_the_base_to_the_bit() -> None:
    model = adapted(DORA, RSLORA, **BIASED)
    move(model)
    before = logits(model)
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(tiny_model(**BIASED)))
    assert torch.equal(logits(model), before)
    assert not torch.allclose(before, logits(tiny_model(**BIASED)), atol=0.1)


def test_dropout_acts_in_training_alone() -> None:
    model = adapted(AdapterSpec(name="d", kind="dora", rank=4, alpha=8.0, dropout=0.5))
    move(model)
    torch.manual_seed(3)
    first = logits(model)
    torch.manual_seed(3)
    assert torch.equal(logits(model), first)
    assert not torch.equal(logits(model), first)
    assert torch.equal(logits(model.eval()), logits(model))


def test_the_merged_weight_does_what_base_and_adapters_do() -> None:
    model = adapted(DORA, RSLORA, SOME, **BIASED)
    move(model)
    merged = tiny_model(**BIASED)
    for name, linear in adapted_linears(model):
        adapters = [
            LowRank(
                a=linear.lora_A[one].weight,  # pyright: ignore
                b=linear.lora_B[one].weight,  # pyright: ignore
                scale=scale,
                magnitude=linear.lora_magnitude_vector[one].weight  # pyright: ignore
                if one in linear.lora_magnitude_vector
                else None,
            )
            for one, scale in linear.scales.items()
        ]
        with torch.no_grad():
            merged.get_parameter(f"{name}.weight").copy_(merged_weight(linear.weight, adapters))
    size = logits(merged).abs().max()
    assert (logits(merged) - logits(model)).abs().max() / size < ANOTHER_ORDER


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("specs", [(LORA, RSLORA), (DORA,)], ids=["lora and rslora", "dora"])
def test_logits_and_gradients_are_those_of_peft(specs: tuple[AdapterSpec, ...]) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is the oracle, and is not installed")
    ours = adapted(*specs, **BIASED)
    move(ours)
    theirs: Any = tiny_model(**BIASED)
    for spec in specs:
        config = peft.LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            use_rslora=spec.use_rslora,
            use_dora=spec.kind == "dora",
            target_modules=r".*\.(self_attn|mlp)\.\w+_proj",
        )
        theirs = peft.inject_adapter_in_model(config, theirs, adapter_name=spec.name)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter([spec.name for spec in specs])
    theirs.load_state_dict(
        {
            name if adapter_of(name) else _in_peft(name, theirs): value
            for name, value in ours.state_dict().items()
        }
    )
    assert (logits(theirs) - logits(ours)).abs().max() / logits(theirs).abs().max() < ANOTHER_ORDER
    for model in (ours, theirs):
        logits(model).square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert expected.keys() == trained(ours).keys()
    for name, parameter in trained(ours).items():
        found, wanted = parameter.grad, expected[name]
        assert found is not None and wanted is not None, name
        assert (found - wanted).abs().max() / wanted.abs().max() < ANOTHER_ORDER, name


def _in_peft(name: str, theirs: nn.Module) -> str:
    """Return the name of a parameter of the base, which PEFT's layers hold one level deeper."""
    owner, _, leaf = name.rpartition(".")
    return (
        f"{owner}.base_layer.{leaf}" if hasattr(theirs.get_submodule(owner), "base_layer") else name
    )


def test_the_plan_says_how_each_part_is_split() -> None:
    with torch.device("meta"):
        model = DecoderLM(TINY)
    plan = adapt(model, decoder_plan(TINY), [LORA, SOME])
    block = "model.layers.*"
    added = {name: role for name, role in plan.tensor.items() if "lora" in name}
    assert added[f"{block}.self_attn.[qkv]_proj.lora_A.*"] == "adapter_whole"
    assert added[f"{block}.self_attn.[qkv]_proj.lora_B.*"] == "adapter_columns"
    assert added[f"{block}.self_attn.[qkv]_proj.lora_magnitude_vector.*"] == "adapter_columns"
    assert added[f"{block}.mlp.down_proj.lora_A.*"] == "adapter_rows"
    assert added[f"{block}.mlp.down_proj.lora_B.*"] == "adapter_whole"
    assert f"{block}.mlp.down_proj.lora_magnitude_vector.*" not in added


def test_no_adapter_leaves_model_and_plan_alone() -> None:
    model, plan = tiny_model(), decoder_plan(TINY)
    assert adapt(model, plan, []) is plan
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("qq_proj", "'qq_proj' matches the end of no module's name .* nearest names are q_proj"),
        ("mlp", "matches model.layers.0.mlp, and it is no plain linear but a GatedMLP"),
        ("lm_head", "its weight is that of model.embed_tokens too"),
        ("embed_tokens", "its weight is that of lm_head too"),
        ("regex:.*(", "is no regular expression"),
        ("regex:q_proj", "matches no whole module name"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(target: str, words: str) -> None:
    model = tiny_model(tie_word_embeddings=True)
    spec = AdapterSpec(name="default", kind="lora", rank=4, alpha=8.0, targets=("v_proj", target))
    with pytest.raises(ValueError, match=rf"adapter\.targets.*{words}"):
        adapt(model, decoder_plan(model.config), [spec])
    assert not list(adapted_linears(model))


def test_an_untied_head_is_refused_for_what_it_is() -> None:
    spec = AdapterSpec(name="default", kind="lora", rank=4, alpha=8.0, targets=("lm_head",))
    with pytest.raises(ValueError, match="it is no plain linear but a LMHead"):
        adapt(tiny_model(), decoder_plan(TINY), [spec])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, r"adapter\.rank = 0 .* at least 1"),
        ({"alpha": 0.0}, r"adapter\.alpha = 0\.0 .* positive"),
        ({"dropout": 1.0}, r"adapter\.dropout = 1\.0 .* below 1"),
        ({"targets": []}, r"adapter\.targets = \[\] .*'all-linear'"),
        ({"name": "a.b"}, r"adapter\.name = 'a\.b' may hold only"),
        ({"name": "train"}, r"adapter\.name = 'train' is what torch calls .* such as 'train_1'"),
        ({"kind": "none", "rank": 8}, r"adapter\.rank = 8 has no effect: adapter\.kind = 'none'"),
        ({"more": [OneAdapterConfig()]}, r"2 adapters have the name 'default'"),
        (
            {"more": [OneAdapterConfig(name="b", kind="none")]},
            r"adapter\.more: kind = 'none' of the adapter 'b' has no effect",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdapterConfig(**{"kind": "lora", **settings})
