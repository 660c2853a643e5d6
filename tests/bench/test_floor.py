"""A floor times what a row's step computes: no operation is missing and none is added."""

import math

import pytest

from engine.cli import load_config
from engine.combinations import refusals
from engine.rules import gather_facts
from models.flops import linear_train_flops_per_token
from models.registry import load_family
from scripts.bench.floor import against_record, floor_of, products, work_of
from scripts.bench.suites import SUITES, BenchRow
from tests.models.tiny import TINY

ROWS = {row.name: row for suite in SUITES.values() for row in suite}


NOT_WHOLE = {
    row.name
    for suite in ("lora-1gpu", "preference-1gpu", "preference-4gpu")
    for row in SUITES[suite]
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_valid_command_and_its_products_are_the_counted_operations(name: str) -> None:
    row = ROWS[name]
    config = load_config([f"--job.config_file={row.config_file}", *row.overrides])
    facts, mistakes = gather_facts(config, row.gpus, device_type="cuda", is_here=False)
    assert not mistakes + refusals(facts)
    if name in NOT_WHOLE:
        with pytest.raises(ValueError, match="has no floor: a step of it"):
            work_of(row)
        return
    work = work_of(row)
    found = sum(product.flops for product in work.products)
    assert found == linear_train_flops_per_token(work.sizes) * work.tokens_per_gpu
    assert sum(attention.count for attention in work.attentions) == work.sizes.num_layers


def test_tensor_parallel_ranks_share_each_product() -> None:
    config = load_family("llama3").flavor("8B")
    whole, half = (list(products(config, 8192, degree)) for degree in (1, 2))
    assert [2 * part.flops for part in half] == [product.flops for product in whole]
    assert (half[-2].inputs, half[-2].outputs) == (14336 // 2, 4096)  # down: its inputs are split


def test_each_part_is_run_and_the_parts_add_up() -> None:
    options = ("--training.seq_len=16", "--training.local_batch_size=2", "--model.attention=sdpa")
    row = BenchRow(
        name="tiny", gpus=1, config_file="train_configs/debug_model.toml", overrides=options
    )
    ran: list[tuple[int, ...]] = []

    def timer(work) -> float:
        result = work()
        ran.append(tuple((result[0] if isinstance(result, tuple) else result).shape))
        return 1.0

    def sustain(works) -> float:
        return 2.0 * sum(timer(work) * count for work, count in works)

    found = floor_of(row, device="cpu", device_name="NVIDIA H200", timer=timer, sustain=sustain)
    layers = work_of(row).sizes.num_layers
    alone = found["ms_alone"]
    assert alone["q"] == alone["attention forward"] * 3 == 3.0 * layers
    assert alone["all"] == 3 * (7 * layers + 1) + 2 * layers
    assert found["ms_together"] == 2 * alone["all"]
    assert len(ran) == 2 * (3 * 6 + 2)
    speed = 32 / found["ms_together"] * 1e3
    assert found["floor_tokens_per_second_per_gpu"] == pytest.approx(speed, rel=1e-3)
    assert 0 < found["floor_mfu"] < 1
    traced = {"ms_by_kind": {"attention": 2.0}}
    trained = {"row": "tiny", "tokens_per_second_per_gpu": speed / 2, "traced_step": traced}
    beside = against_record(found, [trained])
    assert math.isclose(beside["of_floor"], 0.5, rel_tol=1e-3)
    assert beside["traced_ms_by_kind"] == {"attention": 2.0}
    assert against_record(found, [{"row": "tiny", "outcome": "failed"}]) == found


def test_only_layers_are_taken_in_float8() -> None:
    taken = {product.name: product.is_float8 for product in products(TINY, 4, 1, is_float8=True)}
    assert not taken.pop("head")
    assert all(taken.values())
