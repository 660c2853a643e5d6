import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from engine.data.batch import (
    IGNORED_LABEL,
    PADDING_DOCUMENT,
    Batch,
    collate,
    longest_document_tokens,
)
from engine.data.loader import DataloaderConfig, train_batches, validation_batches
from engine.data.rows import DummyRows, RowSource
from tests.devices import SKIP_WITHOUT_GPU

RowsOf = Callable[..., RowSource]
NO_WORKERS = DataloaderConfig()


@pytest.fixture
def rows(rows_of: RowsOf, jsonl: Path) -> RowSource:
    return rows_of("jsonl", jsonl)


def training(rows: RowSource, *, rank: int = 0, ranks: int = 1, **changes: object):
    settings: dict[str, object] = {
        "local_batch_size": 2,
        "global_batch_size": 8,
        "batch_rank": rank,
        "batch_degree": ranks,
        "start_row": 0,
        "dataloader": NO_WORKERS,
        **changes,
    }
    return train_batches(rows, **settings)  # pyright: ignore[reportArgumentType]


def validation(rows: RowSource, *, rank: int = 0, ranks: int = 1, **changes: object):
    settings: dict[str, object] = {
        "local_batch_size": 4,
        "batch_rank": rank,
        "batch_degree": ranks,
        "dataloader": NO_WORKERS,
        **changes,
    }
    return list(validation_batches(rows, **settings))  # pyright: ignore[reportArgumentType]


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def same(left: Batch, right: Batch) -> bool:
    return all(
        torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        for name in Batch.__dataclass_fields__
        for value, other in [(getattr(left, name), getattr(right, name))]
    )


def steps_on(rows: RowSource, ranks: int, first: int, last: int, **changes: object):
    """Return the rows of steps `first` to `last` as {global row: its tokens}, over all ranks."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        batches = training(rows, rank=rank, ranks=ranks, start_row=first * 8, **changes)
        for batch in take(batches, (last - first) * 8 // (2 * ranks)):
            for number, tokens_T in zip(batch.rows_B.tolist(), batch.tokens_BT, strict=True):
                assert number not in found, "no row is dealt twice"
                found[number] = tokens_T.tolist()
    return found


EVEN = DummyRows(seq_len=64, vocab_size=64, num_tokens=1 << 20, seed=0)
"""Rows that all cost the same."""


def test_microbatches_deal_each_steps_rows_over_ranks():
    dealt = [
        [batch.rows_B.tolist() for batch in take(training(EVEN, rank=rank, ranks=2), 4)]
        for rank in (0, 1)
    ]
    assert dealt == [
        [[0, 1], [4, 5], [8, 9], [12, 13]],
        [[2, 3], [6, 7], [10, 11], [14, 15]],
    ]


def test_rows_padded_to_one_length_are_dealt_in_their_order(rows_of: RowsOf, jsonl: Path):
    padded = rows_of("jsonl", jsonl, seq_len=1024, packing="none")
    assert len({padded.attention_cost(number) for number in range(8)}) > 1
    for rank, first in enumerate((0, 2)):
        dealt = [batch.rows_B.tolist() for batch in take(training(padded, rank=rank, ranks=2), 2)]
        assert dealt == [[first, first + 1], [first + 4, first + 5]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_steps_own_the_same_rows_on_any_number_of_ranks(rows: RowSource, ranks: int):
    found = steps_on(rows, ranks, first=3, last=6)
    assert sorted(found) == list(range(24, 48))
    assert found == {number: rows.row(number).tokens_T.tolist() for number in found}


def test_a_run_resumed_on_other_ranks_and_workers_goes_on_with_the_same_rows(rows: RowSource):
    whole = steps_on(rows, 2, first=0, last=40)
    workers = DataloaderConfig(num_workers=2)
    for ranks, dataloader in ((4, NO_WORKERS), (2, workers), (1, NO_WORKERS)):
        resumed = steps_on(rows, ranks, first=20, last=40, dataloader=dataloader)
        assert resumed == {number: whole[number] for number in range(160, 320)}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches_in_the_same_order(
    rows: RowSource, num_workers: int
):
    workers = DataloaderConfig(num_workers=num_workers, prefetch_factor=3)
    plain = take(training(rows), 30)
    batches = training(rows, dataloader=workers)
    assert all(map(same, plain, take(batches, 30)))


def test_starting_at_a_million_steps_is_as_fast_as_at_the_first(rows: RowSource):
    for dataloader in (NO_WORKERS, DataloaderConfig(num_workers=2)):
        started = time.monotonic()
        batch = next(training(rows, start_row=8 * 10**6, dataloader=dataloader))
        assert time.monotonic() - started < 5
        assert batch.rows_B.tolist() == [8 * 10**6, 8 * 10**6 + 1]


def test_workers_end_with_the_loader_and_outlive_signals_to_the_process_group(rows: RowSource):
    before = children()
    batches = training(rows, dataloader=DataloaderConfig(num_workers=2))
    next(batches)
    workers = children() - before
    assert len(workers) == 2
    for worker, number in itertools.product(workers, (signal.SIGTERM, signal.SIGUSR1)):
        os.kill(worker, number)
    assert len(take(batches, 50)) == 50
    started = time.monotonic()
    del batches
    assert time.monotonic() - started < 4, "workers stop when asked, not at a deadline"
    assert children() == before


def children() -> set[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(number) for number in path.read_text().split()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_numbers_alone(rows: RowSource, num_workers: int):
    dataloader = DataloaderConfig(num_workers=num_workers)
    before = torch.get_rng_state()
    take(training(rows, dataloader=dataloader), 3)
    validation(rows, dataloader=dataloader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_has_every_row_once_and_equal_batches_on_every_rank(
    rows: RowSource, ranks: int, num_workers: int
):
    dataloader = DataloaderConfig(num_workers=num_workers)
    passes = [
        validation(rows, rank=rank, ranks=ranks, dataloader=dataloader) for rank in range(ranks)
    ]
    assert len({len(batches) for batches in passes}) == 1
    everything = [batch for batches in passes for batch in batches]
    numbers = torch.cat([batch.rows_B for batch in everything])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(rows.rows_per_epoch))
    labels = torch.cat([batch.labels_BT for batch in everything])
    assert (labels[numbers < 0] == IGNORED_LABEL).all(), "fillers train nothing"
    alone = torch.cat([rows.row(index).labels_T for index in range(rows.rows_per_epoch)])
    assert int((labels != IGNORED_LABEL).sum()) == int((alone != IGNORED_LABEL).sum())


def test_validation_stops_after_exactly_the_steps_asked_for(rows: RowSource):
    assert [len(validation(rows, ranks=2, steps=steps)) for steps in (0, 3, 10**9)] == [
        0,
        3,
        -(-rows.rows_per_epoch // 8),
    ]


def test_a_batch_of_fillers_only_is_well_formed(rows_of: RowsOf, tmp_path: Path):
    path = tmp_path / "tiny.jsonl"
    path.write_text('{"text": "one"}\n')
    (batch,) = validation(rows_of("jsonl", path), rank=1, ranks=2)
    assert batch.rows_B.tolist() == [-1] * 4
    assert (batch.documents_BT == PADDING_DOCUMENT).all()
    assert batch.squared_document_tokens == 0


def test_batches_know_their_documents(rows_of: RowsOf, jsonl: Path):
    packed = rows_of("jsonl", jsonl, shuffle=False)
    single = rows_of("jsonl", jsonl, shuffle=False, packing="none")
    for rows, one_each in ((packed, False), (single, True), (rows_of("dummy"), True)):
        batch = next(training(rows))
        assert batch.one_document_per_row == one_each
        assert batch.squared_document_tokens == sum(
            int((documents_T == number).sum()) ** 2
            for documents_T in batch.documents_BT
            for number in range(1, int(documents_T.max()) + 1)
        )
        assert batch.longest_document_tokens == 128  # rows have 64


def test_the_longest_document_is_bounded_by_a_power_of_two_padding_included():
    for lengths, bound in (([100, 28], 128), ([129, 1], 256), ([3, 512], 512), ([513], 1024)):
        offsets = torch.tensor([0, *lengths, 0], dtype=torch.int32).cumsum(0)
        assert longest_document_tokens(offsets) == bound


def test_rows_are_padded_to_a_multiple(rows: RowSource):
    numbered = [(number, rows.row(number)) for number in (0, 1)]
    batch = collate(numbered, one_document_per_row=False, pad_to_multiple=24)
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (2, 72)
    assert (batch.documents_BT[:, 64:] == PADDING_DOCUMENT).all()
    assert (batch.labels_BT[:, 64:] == IGNORED_LABEL).all()
    plain = collate(numbered, one_document_per_row=False, pad_to_multiple=16)
    assert torch.equal(plain.tokens_BT, batch.tokens_BT[:, :64])
    assert plain.squared_document_tokens == batch.squared_document_tokens


def test_ranks_that_cannot_share_a_step_evenly_get_fillers_in_it():
    dealt = [
        [batch.rows_B.tolist() for batch in take(training(EVEN, rank=rank, ranks=3), 4)]
        for rank in range(3)
    ]
    assert dealt == [
        [[0, 1], [6, 7], [8, 9], [14, 15]],
        [[2, 3], [-1, -1], [10, 11], [-1, -1]],
        [[4, 5], [-1, -1], [12, 13], [-1, -1]],
    ]
    (_, filler, *_) = take(training(EVEN, rank=1, ranks=3), 2)
    assert (filler.labels_BT == IGNORED_LABEL).all()
    with pytest.raises(ValueError, match=r"training\.global_batch_size = 8 .* ranks, 9; start at"):
        training(EVEN, ranks=9)


def attention_of(documents_BT: Iterable[torch.Tensor]) -> int:
    """Return the squared tokens of the documents of rows, counted token by token."""
    return sum(
        int((documents_T == number).sum()) ** 2
        for documents_T in documents_BT
        for number in documents_T.unique().tolist()
        if number != PADDING_DOCUMENT
    )


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_ranks_have_as_much_to_attend_to_in_each_microbatch(
    rows_of: RowsOf, jsonl: Path, packing: str
):
    rows = rows_of("jsonl", jsonl, seq_len=256, packing=packing)
    sizes = {"ranks": 4, "global_batch_size": 24, "local_batch_size": 2}
    steps, waits, whole = 6, 0.0, 0.0
    shares = [take(training(rows, rank=rank, **sizes), 3 * steps) for rank in range(4)]
    for meeting in zip(*shares, strict=True):
        costs = [attention_of(batch.documents_BT) for batch in meeting]
        waits, whole = waits + max(costs), whole + sum(costs) / len(costs)
    # In neighbours: eight rows to a meeting, two to a rank.
    each = [attention_of([rows.row(n).documents_T]) for n in range(24 * steps)]
    pairs = [sum(each[n : n + 2]) for n in range(0, len(each), 2)]
    neighbours = sum(max(pairs[n : n + 4]) for n in range(0, len(pairs), 4))
    assert whole == pytest.approx(sum(each) / 4), "the same rows"
    assert waits - whole < 0.5 * (neighbours - whole), "ranks wait less for each other"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_on_three_of_four_ranks_goes_on_with_the_same_rows(
    rows: RowSource, num_workers: int
):
    dataloader = DataloaderConfig(num_workers=num_workers)
    found: dict[int, list[int]] = {}
    for ranks, first in ((4, 0), (3, 5), (4, 10)):
        for rank in range(ranks):
            batches = training(
                rows, rank=rank, ranks=ranks, start_row=8 * first, dataloader=dataloader
            )
            for batch in take(batches, 5 * -(-8 // (2 * ranks))):
                for number, tokens_T in zip(batch.rows_B.tolist(), batch.tokens_BT, strict=True):
                    assert number not in found
                    if number >= 0:
                        found[number] = tokens_T.tolist()
    assert sorted(found) == list(range(120))
    assert found == {number: rows.row(number).tokens_T.tolist() for number in found}


def test_loader_settings_check_themselves():
    with pytest.raises(ValueError, match=r"dataloader\.num_workers = -1; give 0 or more"):
        DataloaderConfig(num_workers=-1)
    with pytest.raises(ValueError, match=r"dataloader\.prefetch_factor = 0; give 1 or more"):
        DataloaderConfig(num_workers=1, prefetch_factor=0)
    message = r"need worker processes.*num_workers = 0"
    with pytest.raises(ValueError, match=message):
        DataloaderConfig(prefetch_factor=2)
    with pytest.raises(ValueError, match=message):
        DataloaderConfig(persistent_workers=True)


@pytest.mark.gpu
@SKIP_WITHOUT_GPU
def test_pinned_batches_are_pinned(rows: RowSource):
    batch = next(training(rows, dataloader=DataloaderConfig(pin_memory=True)))
    assert batch.tokens_BT.is_pinned() and batch.labels_BT.is_pinned()


def test_pinning_is_passed_over_without_a_gpu(rows: RowSource, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = next(training(rows, dataloader=DataloaderConfig(pin_memory=True)))
    assert not batch.tokens_BT.is_pinned()


def test_an_uncaught_error_ends_the_process_although_workers_outlive_signals():
    program = """
from engine.data.loader import DataloaderConfig, train_batches
from engine.data.rows import DummyRows
rows = DummyRows(seq_len=8, vocab_size=9, num_tokens=800, seed=1)
batches = train_batches(
    rows, local_batch_size=1, global_batch_size=1, batch_rank=0, batch_degree=1, start_row=0,
    dataloader=DataloaderConfig(num_workers=1),
)
next(batches)
raise RuntimeError("as any defect would")
"""
    root = Path(__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False)
    assert ended.returncode == 1
