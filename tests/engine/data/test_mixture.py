"""The order of mixed sources: shares, exact counts, changes, and rows that never hold two."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from engine.data.config import DataConfig, MixedSourceConfig
from engine.data.loader import DataloaderConfig, train_batches
from engine.data.mixture import MixedRows, MixtureOrder, floor_sum, mix
from engine.data.rows import DummyRows, RowSource

RowsOf = Callable[..., RowSource]
CRITICAL_CHI_SQUARE = 9.21
"""Exceeded by one in a hundred fair draws of three kinds (two degrees of freedom)."""


def source(name: str = "a", **share: object) -> MixedSourceConfig:
    return MixedSourceConfig(**{"name": name, "dataset": "dummy", **share})  # pyright: ignore


def dummy(num_rows: int, seed: int = 0) -> DummyRows:
    return DummyRows(seq_len=4, vocab_size=50, num_tokens=4 * num_rows, seed=seed)


def order_of(*weights: float, seed: int = 3, tokens: Sequence[int] = (1, 1, 1)) -> MixtureOrder:
    schedules = [[(0, weight)] for weight in weights]
    fractions = [Fraction(one) for one in tokens[: len(weights)]]
    return MixtureOrder.by_weight(schedules, fractions, rows_per_step=8, seed=seed)


def test_the_floor_sum_is_what_adding_up_gives():
    draw = random.Random(0)
    for _ in range(500):
        n, m, a, b = (draw.randrange(least, 90) for least in (0, 1, 0, 0))
        assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_thousand_rows_hold_each_source_in_its_share(seed: int):
    weights, order = (0.5, 0.3, 0.2), order_of(0.5, 0.3, 0.2, seed=seed)
    counts = Counter(order.source_of(row) for row in range(100_000))
    statistic = sum((counts[k] - 1e5 * w) ** 2 / (1e5 * w) for k, w in enumerate(weights))
    assert statistic < CRITICAL_CHI_SQUARE
    for start in range(0, 99_000, 700):  # and so does every window, to within a few rows
        for k, weight in enumerate(weights):
            found = order.num_rows(k, start + 1000) - order.num_rows(k, start)
            assert abs(found - 1000 * weight) <= 6


@pytest.mark.parametrize(
    "order", [order_of(0.6, 0.3, 0.1), MixtureOrder.by_count([50, 7, 1], seed=1)]
)
def test_a_source_gives_its_rows_one_after_the_other(order: MixtureOrder):
    next_row = [0, 0, 0]
    for row in range(300):
        number = order.source_of(row)
        assert order.num_rows(number, row) == next_row[number]
        next_row[number] += 1
    assert all(next_row)


def test_weights_are_shares_of_tokens_where_rows_differ_in_length():
    order = order_of(1.0, 1.0, tokens=(100, 25))
    assert order.num_rows(0, 10_000) == pytest.approx(2000, abs=3)


def test_a_tiny_weight_is_kept_and_the_billionth_row_is_found_at_once():
    order = order_of(1.0, 1e-4)
    assert order.num_rows(1, 10**9) == pytest.approx(1e9 / 10_001, abs=30)
    started = time.perf_counter()
    number = order.source_of(10**9)
    assert order.num_rows(number, 10**9) <= 10**9
    assert time.perf_counter() - started < 0.1


def test_a_schedule_takes_effect_at_the_rows_of_its_step():
    schedules = [[(0, 1.0), (50, 0.0), (100, 0.25)], [(0, 0.0), (50, 1.0)]]
    ones = [Fraction(1)] * 2
    order = MixtureOrder.by_weight(schedules, ones, rows_per_step=8, seed=0)
    sources = [order.source_of(row) for row in range(1600)]
    assert set(sources[:400]) == {0} and set(sources[400:800]) == {1}
    assert sources[800:].count(0) == pytest.approx(160, abs=3)
    for row in (0, 399, 400, 401, 799, 800, 801, 1600):
        assert order.num_rows(0, row) == sources[:row].count(0)
        assert order.num_rows(1, row) == sources[:row].count(1)


def test_only_a_schedule_makes_the_order_depend_on_the_rows_of_a_step():
    def fingerprint(schedule: list[tuple[int, float]], rows_per_step: int) -> str:
        return MixtureOrder.by_weight(
            [schedule, [(0, 1.0)]], [Fraction(1)] * 2, rows_per_step=rows_per_step, seed=0
        ).fingerprint

    assert fingerprint([(0, 0.5)], 8) == fingerprint([(0, 0.5)], 16)
    assert fingerprint([(0, 0.5), (9, 0.4)], 8) != fingerprint([(0, 0.5), (9, 0.4)], 16)


@pytest.mark.parametrize("num_rows", [10, 333])
def test_epochs_give_exactly_the_floor_of_their_rows(num_rows: int):
    rows = [dummy(num_rows), dummy(num_rows, seed=1)]
    mixed = mix(rows, [source("a", epochs=2.5), source("b", epochs=0.3)], rows_per_step=1, seed=0)
    expected = 2 * num_rows + num_rows // 2, math.floor(Fraction("0.3") * num_rows)
    assert mixed.rows_per_epoch == sum(expected)
    for epoch in range(3):
        first = epoch * mixed.rows_per_epoch
        counts = Counter(mixed.row(first + row).source for row in range(mixed.rows_per_epoch))
        assert (counts[0], counts[1]) == expected
    assert mixed.epochs_read(mixed.rows_per_epoch)["a"] == expected[0] / num_rows


def test_epochs_that_are_no_row_are_refused_by_name():
    both = [source("a", epochs=1.0), source("b", epochs=0.3)]
    with pytest.raises(ValueError, match=r"data\.sources\.b\.epochs = 0\.3 of 3 rows"):
        mix([dummy(3), dummy(3)], both, rows_per_step=1, seed=0)


def of_ranks(mixed: MixedRows, ranks: int, *, start_row: int, num_workers: int) -> list[object]:
    """Return rows and sources of three steps of 12 rows, in global order, with their tokens."""
    found: dict[int, object] = {}
    for rank in range(ranks):
        batches = train_batches(
            mixed,
            local_batch_size=1,
            global_batch_size=12,
            batch_rank=rank,
            batch_degree=ranks,
            start_row=start_row,
            dataloader=DataloaderConfig(num_workers=num_workers),
        )
        for _ in range(3 * 12 // ranks):
            batch = next(batches)
            found[int(batch.rows_B)] = (int(batch.sources_B), batch.tokens_BT.tolist())
    assert sorted(found) == list(range(start_row, start_row + 36))
    return [found[row] for row in sorted(found)]


def test_any_ranks_and_workers_read_the_same_mixture_from_anywhere(jsonl: Path, rows_of: RowsOf):
    parts = [rows_of("jsonl", jsonl, seq_len=32), rows_of("dummy", seq_len=32, dummy_tokens=999)]
    schedule = [[0, 0.2], [2, 0.8]]
    both = [source("text", weight=0.5), source("dummy", weights=schedule)]
    mixed = mix(parts, both, rows_per_step=12, seed=5)
    alone = of_ranks(mixed, 1, start_row=12, num_workers=0)
    assert {number for number, _ in alone} == {0, 1}  # pyright: ignore
    for ranks, num_workers in ((2, 0), (4, 0), (3, 1)):
        assert of_ranks(mixed, ranks, start_row=12, num_workers=num_workers) == alone


def test_no_row_holds_two_sources_and_a_source_is_read_as_it_would_be_alone(
    jsonl: Path, rows_of: RowsOf
):
    parts = [rows_of("jsonl", jsonl, seq_len=32), rows_of("dummy", seq_len=32)]
    mixed = mix(parts, [source("a", weight=1), source("b", weight=2)], rows_per_step=1, seed=0)
    next_row = [0, 0]
    for index in range(60):
        row = mixed.row(index)
        alone = parts[row.source].row(next_row[row.source])
        assert row.tokens_T.tolist() == alone.tokens_T.tolist()
        cost = parts[row.source].attention_cost(next_row[row.source])
        counts = row.documents_T.bincount()[1:]
        assert mixed.attention_cost(index) == cost == int((counts**2).sum())
        next_row[row.source] += 1
    assert min(next_row) > 10
    assert not mixed.one_document_per_row and mixed.source_names == ("a", "b")


def test_everything_that_decides_the_order_is_in_the_fingerprint():
    def fingerprint(sources: list[MixedSourceConfig], *, seed: int = 0, rows: int = 9) -> str:
        return mix([dummy(rows), dummy(9, 1)], sources, rows_per_step=1, seed=seed).fingerprint

    usual = [source("a", weight=0.5), source("b", weight=0.5)]
    others = [
        fingerprint(usual, seed=1),
        fingerprint(usual, rows=8),
        fingerprint([source("a", weight=0.5), source("b", weight=0.4)]),
        fingerprint([source("a", epochs=1.0), source("b", epochs=1.0)]),
        fingerprint([source("a", weights=[[0, 0.5], [3, 0.1]]), source("b", weight=0.5)]),
    ]
    assert len({fingerprint(usual), *others}) == 6


def test_a_run_says_what_it_takes_and_warns_of_many_epochs(caplog: pytest.LogCaptureFixture):
    mixed = mix(
        [dummy(10), dummy(300, 1)],
        [source("small", epochs=5.0), source("large", epochs=0.5)],
        rows_per_step=1,
        seed=0,
    )
    with caplog.at_level("INFO", logger="tessera"):
        mixed.log_plan(200)
    text = caplog.text
    assert "source small: 25% of the run's tokens, 10 rows an epoch, 5 epochs in this run" in text
    assert "source large: 75% of the run's tokens, 300 rows an epoch, 0.5 epochs" in text
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert "source small is read 5 times" in text


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({}, "sources.a has no weight"),
        ({"weight": 1.0, "epochs": 1.0}, "sources.a has weight and epochs"),
        ({"weight": -1.0}, "sources.a has weight -1.0"),
        ({"weight": math.nan}, "sources.a has weight nan"),
        ({"epochs": 0.0}, r"sources.a.epochs = 0\.0"),
        ({"weights": []}, r"sources.a.weights has steps \[\]"),
        ({"weights": [[5, 0.1]]}, r"sources.a.weights has steps \[5\]"),
        ({"weights": [[0, 0.1], [0, 0.2]]}, r"sources.a.weights has steps \[0, 0\]"),
        ({"weights": [[0, 0.1], [2.5, 0.2]]}, r"sources.a.weights has \[2.5, 0.2\]"),
        ({"weights": [[0]]}, r"sources.a.weights has \[0\]"),
        ({"weight": 1.0, "split": "train_sft"}, "sources.a.split = 'train_sft' has no meaning"),
        ({"weight": 1.0, "dataset": "jsonl"}, "sources.a.path is not set"),
        ({"weight": 1.0, "name": "a b"}, "the name 'a b' may hold only"),
    ],
)
def test_a_source_that_cannot_be_read_as_it_says_is_refused_by_name(
    share: dict[str, object], message: str
):
    with pytest.raises(ValueError, match=message):
        source(**share)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([source("a", weight=1.0), source("a", weight=2.0)], "2 tables named 'a'"),
        ([source("a", weight=1.0), source("b", epochs=2.0)], "b have epochs and a have weights"),
        ([source("a", weight=0.0)], "every weight is 0 from step 0 on"),
        (
            [source("a", weights=[[0, 1.0], [7, 0.0]]), source("b", weights=[[0, 0.0]])],
            "every weight is 0 from step 7 on",
        ),
    ],
)
def test_sources_that_do_not_go_together_are_refused(
    sources: list[MixedSourceConfig], message: str
):
    with pytest.raises(ValueError, match=message):
        DataConfig(sources=sources)


def test_settings_of_chats_are_of_use_where_one_source_holds_chats():
    chats = source("chats", dataset="python_stdlib_chat", format="chat", weight=1.0)
    DataConfig(chat_template="tulu", sources=[chats])
    with pytest.raises(ValueError, match="has no meaning"):
        DataConfig(chat_template="tulu", sources=[source(weight=1.0)])
