"""Initial values are the same bits whoever draws them, and as wide as the rule says."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from models.initialise import BLOCK_ROWS, InitialRule, initial_rule, initial_slice, initial_values
from tests.models.tiny import TINY, fill, tiny_model

NORMAL = InitialRule(kind="normal", std=0.02)
SHAPE = (3 * BLOCK_ROWS + 17, 24)


def whole(shape=SHAPE, name="model.x.weight", seed=1):
    return initial_slice(name, shape, NORMAL, (slice(0, shape[0]),), seed)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 8, SHAPE[0]])
def test_any_cut_along_rows_joins_to_the_same_bits(num_parts):
    cuts = torch.linspace(0, SHAPE[0], num_parts + 1).long().tolist()
    parts = [
        initial_slice("model.x.weight", SHAPE, NORMAL, (slice(a, b), slice(0, SHAPE[1])), 1)
        for a, b in pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole())


def test_any_cut_along_columns_and_rows_joins_to_the_same_bits():
    expected = whole()
    for rows in (slice(0, 100), slice(100, SHAPE[0])):
        for columns in (slice(0, 7), slice(7, 24)):
            part = initial_slice("model.x.weight", SHAPE, NORMAL, (rows, columns), 1)
            assert torch.equal(part, expected[rows, columns])


def test_threads_draw_the_same_bits():
    for rule in (NORMAL, InitialRule(kind="uniform", bound=0.1)):
        everything = ("model.x.weight", SHAPE, rule, (slice(3, 190),), 1)
        assert torch.equal(initial_slice(*everything, num_threads=4), initial_slice(*everything))


def test_an_empty_part_is_empty():
    part = initial_slice("model.x.weight", SHAPE, NORMAL, (slice(SHAPE[0], SHAPE[0]),), 1)
    assert part.shape == (0, SHAPE[1])


def test_seed_and_name_change_the_values():
    assert not torch.equal(whole(), whole(seed=2))
    assert not torch.equal(whole(), whole(name="model.y.weight"))
    assert not torch.equal(whole()[:BLOCK_ROWS], whole()[BLOCK_ROWS : 2 * BLOCK_ROWS])


def test_values_do_not_depend_on_global_random_state_or_on_the_process():
    torch.manual_seed(99)
    code = f"""
import torch
from models.initialise import InitialRule, initial_slice
torch.set_num_threads(2)
rule = InitialRule(kind="normal", std={NORMAL.std})
whole = initial_slice("model.x.weight", {SHAPE}, rule, (slice(0, {SHAPE[0]}),), 1)
print(whole.double().sum().item(), whole[5, 5].item())
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(printed[0]) == whole().double().sum().item()
    assert float(printed[1]) == whole()[5, 5].item()
    assert torch.initial_seed() == 99


def test_only_the_blocks_that_a_part_touches_are_drawn(monkeypatch):
    drawn = []
    randn = torch.randn

    def spy(size, **kwargs):
        drawn.append(size)
        return randn(size, **kwargs)

    monkeypatch.setattr(torch, "randn", spy)
    rows = slice(10 * BLOCK_ROWS - 1, 11 * BLOCK_ROWS + 1)
    part = initial_slice("big.weight", (1_000_000, 64), NORMAL, (rows, slice(0, 8)), 1)
    assert part.shape == (BLOCK_ROWS + 2, 8)
    assert drawn == [(BLOCK_ROWS, 64)] * 3


def test_standard_deviations_follow_kind_and_depth():
    model = tiny_model(attention_bias=True)
    rule = {n: initial_rule(model, TINY, n) for n, _ in model.named_parameters()}
    block = "model.layers.1"
    assert rule["model.embed_tokens.weight"].std == TINY.initializer_range
    assert rule[f"{block}.self_attn.q_proj.weight"].std == TINY.initializer_range
    assert rule[f"{block}.self_attn.o_proj.weight"].std == TINY.initializer_range / 2
    assert rule[f"{block}.mlp.down_proj.weight"].std == TINY.initializer_range / 2
    assert rule[f"{block}.self_attn.q_proj.bias"].kind == "zeros"
    assert rule["model.norm.weight"].kind == "ones"
    centred = tiny_model(zero_centered_norm=True, qk_norm="head")
    for name in ("model.norm.weight", f"{block}.self_attn.q_norm.weight"):
        assert initial_rule(centred, TINY, name).kind == "zeros"
    drawn = whole((4096, 64))
    assert drawn.std().item() == pytest.approx(NORMAL.std, rel=0.01)
    assert abs(drawn.mean().item()) < 1e-4


def test_a_model_on_the_meta_device_gets_the_values_of_one_built_on_a_cpu():
    with torch.device("meta"):
        meta = type(tiny_model())(TINY)
    on_cpu = fill(tiny_model())
    draw = initial_values(meta, TINY, seed=0)
    for name, parameter in on_cpu.named_parameters():
        slices = tuple(slice(0, n) for n in parameter.shape)
        assert torch.equal(draw(name, slices), parameter), name
