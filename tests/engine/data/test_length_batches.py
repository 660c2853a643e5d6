"""Batches under a budget of tokens: little padding, every document once, one order on any ranks."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Batch
from engine.data.config import DataConfig
from engine.data.length_batches import LengthBatches
from engine.data.loader import DataloaderConfig, train_batches, validation_batches
from engine.data.rows import RowSource
from tests.engine.data.length_cases import budget_rows, log_normal_lengths, slices_of

RowsOf = Callable[..., RowSource]

SEQ_LEN, BATCH_TOKENS = 4096, 16384
PER_STEP = 12  # batches, which 1, 2, 3 and 4 ranks share evenly


def batches_of(lengths: np.ndarray, **changes: object) -> LengthBatches:
    settings: dict[str, object] = {
        "batch_tokens": BATCH_TOKENS,
        "pad_to_multiple": 8,
        "seed": 3,
        "shuffle": True,
        **changes,
    }
    return LengthBatches(slices_of(lengths, SEQ_LEN), **settings)  # pyright: ignore[reportArgumentType]


def epoch_of(batches: LengthBatches, epoch: int) -> list[range]:
    first = epoch * batches.batches_per_epoch
    return [batches.rows(first + place) for place in range(batches.batches_per_epoch)]


def row_lengths(batches: LengthBatches, rows: range) -> list[int]:
    plans = [batches.plan(*divmod(row, batches.rows_per_epoch)) for row in rows]
    return [part.stop - part.start for plan in plans for part in plan.slices]


def padded_size(batches: LengthBatches, rows: range) -> int:
    """Return the tokens of a batch, from what its rows really hold."""
    longest = max(row_lengths(batches, rows))
    return len(rows) * -(-longest // batches.pad_to_multiple) * batches.pad_to_multiple


@pytest.mark.parametrize("pad_to_multiple", [1, 8, 24])
def test_every_batch_keeps_to_the_budget_and_one_more_row_would_not(pad_to_multiple: int):
    batches = batches_of(log_normal_lengths(3000), pad_to_multiple=pad_to_multiple)
    sizes = {rows[0]: (padded_size(batches, rows), len(rows)) for rows in epoch_of(batches, 0)}
    assert max(size for size, _ in sizes.values()) <= BATCH_TOKENS
    del sizes[max(sizes)]  # the last batch takes the rest
    assert all(size + size // num_rows > BATCH_TOKENS for size, num_rows in sizes.values())


def test_padding_is_at_most_a_twentieth_of_log_normal_lengths():
    batches = batches_of(log_normal_lengths(20_000))
    sizes = [padded_size(batches, rows) for rows in epoch_of(batches, 0)]
    assert sum(sizes) == batches.padded_tokens_per_epoch
    assert 1 - batches.tokens_per_epoch / sum(sizes) <= 0.05
    assert batches.tokens_per_epoch == int(log_normal_lengths(20_000).sum())


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_document_once_in_as_many_batches(shuffle: bool):
    batches = batches_of(log_normal_lengths(2000), shuffle=shuffle)
    seen: list[list[int]] = []
    for epoch in (0, 1, 7):
        rows = [row for batch in epoch_of(batches, epoch) for row in batch]
        assert sorted(rows) == list(range(2000 * epoch, 2000 * (epoch + 1)))
        plans = [batches.plan(*divmod(row, 2000)) for row in rows]
        documents = [part.document for plan in plans for part in plan.slices]
        assert sorted(documents) == list(range(2000))
        seen.append(documents)
    assert (seen[0] == seen[1]) != shuffle


def test_epochs_and_seeds_give_documents_other_company_and_repeat():
    lengths = np.repeat([100, 101, 900], [500, 500, 400])

    def company(seed: int, epoch: int) -> set[frozenset[int]]:
        batches = batches_of(lengths, seed=seed)
        return {
            frozenset(batches.plan(*divmod(row, len(lengths))).slices[0].document for row in rows)
            for rows in epoch_of(batches, epoch)
        }

    assert company(1, 0) == company(1, 0)
    assert len(company(1, 0) & company(1, 1)) <= 1
    assert len(company(1, 0) & company(2, 0)) <= 1


def test_documents_of_one_rounded_length_change_places_with_each_other():
    batches = batches_of(np.repeat([97, 104], [300, 300]))
    mixed = [set(row_lengths(batches, rows)) for rows in epoch_of(batches, 0)]
    assert mixed == [{97, 104}] * len(mixed)


def test_the_largest_batches_come_first_once_and_the_rest_stays_shuffled():
    lengths = log_normal_lengths(3000)
    plain, largest = batches_of(lengths), batches_of(lengths, num_largest_first=PER_STEP)
    first = epoch_of(largest, 0)
    sizes = [(padded_size(largest, rows), max(row_lengths(largest, rows))) for rows in first]
    assert sizes[:PER_STEP] == sorted(sizes, reverse=True)[:PER_STEP]
    assert sizes[PER_STEP:] != sorted(sizes[PER_STEP:], reverse=True)
    rows, length = largest.largest_shape
    assert rows * length == sizes[0][0]
    assert sorted(map(tuple, first)) == sorted(map(tuple, epoch_of(plain, 0)))
    assert epoch_of(largest, 1) == epoch_of(plain, 1)
    few = batches_of(lengths[:40], num_largest_first=10**6)
    assert sorted(row for rows in epoch_of(few, 0) for row in rows) == list(range(40))


def test_a_million_documents_are_ready_in_seconds_and_the_billionth_batch_at_once():
    slices = slices_of(log_normal_lengths(10**6), SEQ_LEN)
    started = time.process_time()
    batches = LengthBatches(
        slices, batch_tokens=BATCH_TOKENS, pad_to_multiple=8, seed=3, shuffle=True
    )
    assert time.process_time() - started < 5
    held = sum(part.nbytes for part in vars(batches).values() if isinstance(part, np.ndarray))
    assert held < 6 * 10**6
    started = time.process_time()
    for batch in range(10**9, 10**9 + 100):
        row_lengths(batches, batches.rows(batch))
    assert time.process_time() - started < 5


def made_up_rows() -> RowSource:
    return budget_rows(log_normal_lengths(400, median=14), seq_len=40, batch_tokens=64)


def training(rows: RowSource, **changes: object) -> Iterator[Batch]:
    settings: dict[str, object] = {
        "local_batch_size": 1,
        "global_batch_size": PER_STEP,
        "batch_rank": 0,
        "batch_degree": 1,
        "start_row": 0,
        "dataloader": DataloaderConfig(),
        **changes,
    }
    return train_batches(rows, **settings)  # pyright: ignore[reportArgumentType]


def rows_of_steps(
    rows: RowSource, ranks: int, first: int, last: int, *, num_workers: int = 0
) -> list[dict[int, list[int]]]:
    """Return the tokens of each row, for each step, over all ranks."""
    found: list[dict[int, list[int]]] = [{} for _ in range(first, last)]
    for rank in range(ranks):
        batches = training(
            rows,
            batch_rank=rank,
            batch_degree=ranks,
            start_row=first * PER_STEP,
            dataloader=DataloaderConfig(num_workers=num_workers),
        )
        for step in found:
            for batch in itertools.islice(batches, PER_STEP // ranks):
                step |= dict(zip(batch.rows_B.tolist(), batch.tokens_BT.tolist(), strict=True))
    return found


@pytest.mark.parametrize(("ranks", "num_workers"), [(2, 0), (4, 2), (3, 1)])
def test_steps_own_the_same_rows_on_any_ranks_and_workers(ranks: int, num_workers: int):
    whole = rows_of_steps(made_up_rows(), 1, 0, 20)
    assert sum(map(len, whole)) > 400, "into the second epoch"
    resumed = rows_of_steps(made_up_rows(), ranks, 10, 20, num_workers=num_workers)
    assert resumed == whole[10:]


def test_a_batch_holds_its_documents_padded_to_the_longest_rounded_up():
    rows = made_up_rows()
    for batch in itertools.islice(training(rows, pad_to_multiple=4), 60):
        assert batch.one_document_per_row
        lengths = (batch.documents_BT != PADDING_DOCUMENT).sum(1)
        num_rows, num_tokens = batch.tokens_BT.shape
        assert num_tokens == -(-int(lengths.max()) // 8) * 8
        assert num_rows * num_tokens <= 64
        assert batch.squared_document_tokens == int(lengths.square().sum())
        for number, length, tokens_T, labels_T, positions_T in zip(
            *(batch.rows_B.tolist(), lengths.tolist()),
            *(batch.tokens_BT, batch.labels_BT, batch.positions_BT),
            strict=True,
        ):
            assert torch.equal(tokens_T[:length], rows.row(number).tokens_T)
            assert torch.equal(labels_T[: length - 1], tokens_T[1:length])
            assert torch.equal(positions_T[:length], torch.arange(length))
            behind = labels_T[length - (length < 40) :]  # a cut document has a label more
            assert (behind == IGNORED_LABEL).all()


def test_starting_at_a_million_steps_is_as_fast_as_at_the_first():
    rows = made_up_rows()
    assert rows.batches is not None
    started = time.monotonic()
    batch = next(training(rows, start_row=PER_STEP * 10**6))
    assert time.monotonic() - started < 5
    assert batch.rows_B.tolist() == list(rows.batches.rows(PER_STEP * 10**6))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_validation_has_every_row_once_and_equal_batches_on_every_rank(ranks: int):
    rows = made_up_rows()
    passes = [
        list(
            validation_batches(
                rows,
                local_batch_size=1,
                batch_rank=rank,
                batch_degree=ranks,
                dataloader=DataloaderConfig(),
            )
        )
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in passes}) == 1
    everything = [batch for batches in passes for batch in batches]
    numbers = Counter(number for batch in everything for number in batch.rows_B.tolist())
    num_fillers = numbers.pop(-1, 0)
    assert numbers == Counter(range(rows.rows_per_epoch))
    assert rows.batches is not None
    assert num_fillers == -rows.batches.batches_per_epoch % ranks
    for batch in everything:
        if batch.rows_B.tolist() == [-1]:
            assert (batch.labels_BT == IGNORED_LABEL).all() and batch.tokens_BT.shape == (1, 8)


def test_the_log_counts_rows_batches_padding_and_the_largest_batch(
    rows_of: RowsOf, jsonl: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    rows = rows_of("jsonl", jsonl, packing="none", batch_tokens=256, long_document="split")
    batches = rows.batches
    assert batches is not None
    shapes = [
        batch.tokens_BT.shape
        for batch in itertools.islice(training(rows), batches.batches_per_epoch)
    ]
    num_padded = sum(shape.numel() for shape in shapes)
    share = f"{1 - batches.tokens_per_epoch / num_padded:.4f}"
    largest = max(shapes, key=lambda shape: (shape.numel(), shape[1]))
    (line,) = [record.message for record in caplog.records if "packing none" in record.message]
    assert (
        f"puts 300 documents in {rows.rows_per_epoch:,} rows in {len(shapes)} batches, padded "
        f"share {share}, the largest {largest[0]} rows of {largest[1]} tokens; " in line
    )


def test_what_decides_the_order_is_part_of_the_fingerprint(rows_of: RowsOf, jsonl: Path):
    settings = ({}, {"batch_tokens": 256}, {"batch_tokens": 512})
    settings += ({"batch_tokens": 256, "pad_to_multiple": 16},)
    prints = [rows_of("jsonl", jsonl, packing="none", **each).fingerprint for each in settings]
    assert len(set(prints)) == len(prints)


def test_settings_without_a_meaning_are_refused_with_a_remedy():
    message = r"data\.batch_tokens = 64 .*data\.packing = 'concat'.*set data\.packing = 'none'"
    with pytest.raises(ValueError, match=message):
        DataConfig(batch_tokens=64)
    for name, value in (("pad_to_multiple", 16), ("largest_batch_first", True)):
        with pytest.raises(ValueError, match=rf"data\.{name} = {value}.*data\.batch_tokens = 0"):
            DataConfig(packing="none", **{name: value})  # pyright: ignore[reportArgumentType]
    for name, value in (("batch_tokens", -1), ("pad_to_multiple", 0)):
        with pytest.raises(ValueError, match=rf"data\.{name} = {value}; give a whole number"):
            DataConfig(packing="none", **{name: value})  # pyright: ignore[reportArgumentType]
