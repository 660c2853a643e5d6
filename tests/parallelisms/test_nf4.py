"""Packed weights: the same numbers as the formulas, in every layout, at half a byte each."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from engine.memory import bytes_on
from models.decoder import DecoderLM
from parallelisms.freeze import trainable_names
from parallelisms.mesh import ParallelConfig, ParallelDims
from parallelisms.nf4 import (
    LEVELS,
    NF4Weight,
    dequantise_into,
    first_reasons,
    pack_frozen,
    packed_bytes,
    quantise_into,
)
from parallelisms.resolve import resolve
from tests.parallelisms import low_precision_cases as cases
from tests.ranks import RankPool

ROUNDED_PRODUCT = 1e-6  # fp32 products in another order
OFFSET = 0.9677083  # of the outermost quantile. Source: bitsandbytes, functional.create_normal_map


def quantiles() -> list[float]:
    """Return the levels as appendix E of arXiv:2305.14314 derives them."""
    inverse = NormalDist().inv_cdf
    above = [inverse(p) for p in np.linspace(OFFSET, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(OFFSET, 0.5, 8)[:-1]]
    levels = sorted([*above, 0.0, *below])
    return [level / max(levels) for level in levels]


def oracle(values: np.ndarray) -> np.ndarray:
    """Quantise and dequantise rows of 64-wide blocks with byte scales, one number at a time."""
    levels = np.array(quantiles())
    found = np.zeros_like(values)
    for row, out in zip(values, found, strict=True):
        largest = np.abs(row.reshape(-1, 64)).max(axis=1)
        factor = largest.max() / 255
        for number, scale in enumerate(largest):
            block = row[number * 64 : number * 64 + 64] / scale
            nearest = np.abs(block[:, None] - levels).argmin(axis=1)
            out[number * 64 : number * 64 + 64] = levels[nearest] * round(scale / factor) * factor
    return found


def packed(values: torch.Tensor) -> NF4Weight:
    weight = NF4Weight(
        torch.empty(values.shape[0], packed_bytes(values.shape[1]), dtype=torch.uint8),
        values.shape,
        values.dtype,
    )
    weight.copy_(values)
    return weight


def test_the_levels_are_the_quantiles_of_a_normal_distribution():
    assert quantiles() == pytest.approx(LEVELS, abs=2e-7)


def test_packing_and_unpacking_gives_the_values_of_the_formulas():
    values = torch.randn(24, 320, generator=torch.Generator().manual_seed(0))
    values[3, 64:128] *= 20  # an outlier spoils its own row alone
    found = packed(values).dequantised()
    assert np.abs(found.numpy() - oracle(values.numpy())).max() < ROUNDED_PRODUCT * 60
    # Sixteen levels leave 9.1 % of a normal distribution's mean size, whoever computes them.
    plain = torch.cat([values[:3], values[4:]]), torch.cat([found[:3], found[4:]])
    assert (plain[0] - plain[1]).abs().mean() / plain[0].abs().mean() < 0.095


def test_what_was_unpacked_packs_to_the_same_bytes_and_zeros_stay_zeros():
    values = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    values[2] = 0.0
    once = packed(values)
    assert torch.equal(packed(once.dequantised()).packed, once.packed)
    assert not once.dequantised()[2].any()


def test_rows_are_packed_alone_and_large_matrices_in_parts(monkeypatch: pytest.MonkeyPatch):
    values = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    whole = packed(values)
    monkeypatch.setattr("parallelisms.nf4._WEIGHTS_AT_ONCE", 3 * 64)
    assert torch.equal(packed(values).packed, whole.packed)
    part = torch.empty(4, packed_bytes(64), dtype=torch.uint8)
    quantise_into(values[4:8], part)
    assert torch.equal(part, whole.packed[4:8])
    unpacked = torch.empty(10, 64, dtype=torch.bfloat16)
    dequantise_into(whole.packed, unpacked)
    assert torch.equal(unpacked, whole.dequantised().bfloat16())


def test_a_packed_weight_computes_as_its_values_and_cannot_be_changed_in_part():
    weight = packed(torch.randn(6, 64, generator=torch.Generator().manual_seed(3)))
    values = weight.dequantised()
    assert torch.equal(weight.norm(dim=1), values.norm(dim=1))
    assert torch.equal(weight.to(torch.bfloat16), values.bfloat16())
    rows = weight[2:4]
    assert isinstance(rows, NF4Weight)
    assert torch.equal(rows.dequantised(), values[2:4])
    assert bytes_on([nn.Parameter(weight, requires_grad=False)], weight.device) == 6 * 37
    with pytest.raises(TypeError, match="frozen"):
        weight.mul_(2.0)


PLANS = {"one-aot_eager": 1, "fsdp2-ac-full": 2, "rep2": 2, "cp2": 2}


def test_every_layout_trains_beside_packed_weights_as_beside_the_values_they_stand_for(
    ranks: RankPool,
):
    [(loss, expected, held)] = ranks(1, cases.plain_step)
    assert held == 0, "no dequantised weight is kept for the backward"
    for plan, world_size in PLANS.items():
        comparison, _, _, bytes_each = ranks(world_size, cases.packed_step, plan, (loss, expected))[
            0
        ]
        assert comparison is not None
        comparison.check()
        assert bytes_each < 0.6


def test_adapters_of_packed_layers_get_one_process_s_gradients(ranks: RankPool):
    expected = ranks(1, cases.packed_step, "one-dora", None)[0]
    comparison, *_ = ranks(2, cases.packed_step, "fsdp2-dora", expected[1:3])[0]
    assert comparison is not None
    comparison.check()
    assert all(".lora_" in name for name in expected[2])


def meta_model() -> tuple[nn.Module, ParallelDims]:
    with torch.device("meta"):
        return DecoderLM(cases.WIDE.config), ParallelDims.of(ParallelConfig(), 1)


def reasons(*frozen: str, num_shards: int = 1) -> dict[str, str]:
    model, dims = meta_model()
    plan = resolve(model, cases.WIDE.family.plan(cases.WIDE.config), dims)
    trainable = trainable_names(model, frozen, plan.blocks)
    return pack_frozen(model, plan, trainable=trainable, num_shards=num_shards)


def test_layers_that_stay_as_they_are_come_with_a_reason():
    assert first_reasons(reasons(cases.LINEARS)) == "none"
    left = reasons("regex:.*down_proj.weight")
    assert set(left.values()) == {"it is trained"}
    assert len(left) == 12
    text = first_reasons(reasons(cases.LINEARS, num_shards=64))
    assert text == (
        "model.layers.0.self_attn.k_proj and 3 more, because its 32 outputs do not divide by the "
        "64 ranks that share them"
    )


def test_packing_where_everything_is_trained_is_refused():
    with pytest.raises(ValueError, match=r"nf4(.|\n)*it is trained; freeze some with model.freeze"):
        reasons("lm_head")
