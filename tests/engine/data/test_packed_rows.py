"""What every packing must keep true of rows, through a token file and the loader."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data import sources
from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Batch, Row
from engine.data.config import DataConfig
from engine.data.loader import DataloaderConfig, train_batches, validation_batches
from engine.data.rows import RowSource

RowsOf = Callable[..., RowSource]
SEQ_LEN = 64
BOS, EOS = 0, 1
LONG_DOCUMENT = ("truncate", "drop", "split")
SETTINGS = [
    {"packing": "concat"},
    {"packing": "concat", "stride": 24},
    {"packing": "concat", "last_row": "drop"},
    *({"packing": "best_fit", "long_document": policy} for policy in LONG_DOCUMENT),
    *({"packing": "none", "long_document": policy} for policy in LONG_DOCUMENT),
]


class Documents:
    """A thousand documents of 2 to 180 tokens; one that is no mark is two more than its place."""

    def __init__(self) -> None:
        lengths = np.random.default_rng(5).integers(2, 180, 1000)
        lengths[:3] = (SEQ_LEN, SEQ_LEN + 1, 2 * SEQ_LEN + 1)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = np.arange(2, 2 + self.offsets[-1]).astype(np.uint32)
        self.tokens[self.offsets[:-1]] = BOS
        self.tokens[self.offsets[1:] - 1] = EOS

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def labels(self, is_kept: np.ndarray, most: int = 1 << 62) -> Counter[int]:
        """Count what follows a token in the documents that are kept, at most so far in each."""
        found: Counter[int] = Counter()
        for number in np.flatnonzero(is_kept):
            begin, end = self.offsets[number : number + 2]
            found.update(self.tokens[begin + 1 : min(begin + 1 + most, end)].tolist())
        return found


@pytest.fixture(scope="module")
def documents() -> Documents:
    return Documents()


@pytest.fixture
def rows_with(
    rows_of: RowsOf, jsonl: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> RowsOf:
    file = sources.TokenFile(tokens=documents.tokens, offsets=documents.offsets, digest="made")
    monkeypatch.setattr(sources, "open_token_file", lambda *args, **settings: file)
    return lambda **settings: rows_of("jsonl", jsonl, seq_len=SEQ_LEN, **settings)


def epoch_of(rows: RowSource, epoch: int = 0) -> list[Row]:
    first = epoch * rows.rows_per_epoch
    return [rows.row(first + number) for number in range(rows.rows_per_epoch)]


def labels_of(rows: list[Row]) -> Counter[int]:
    labels = torch.cat([row.labels_T for row in rows])
    return Counter(labels[labels != IGNORED_LABEL].tolist())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_documents_are_numbered_from_one_with_positions_from_zero_and_labels_of_their_own(
    rows_with: RowsOf, documents: Documents, settings: dict[str, object]
):
    for row in epoch_of(rows_with(**settings)):
        tokens, labels = row.tokens_T.tolist(), row.labels_T.tolist()
        numbers, positions = row.documents_T.tolist(), row.positions_T.tolist()
        parts = [
            (number, [*part])
            for number, part in itertools.groupby(range(SEQ_LEN), numbers.__getitem__)
        ]
        padding = [PADDING_DOCUMENT] if numbers[-1] == PADDING_DOCUMENT else []
        assert [number for number, _ in parts] == [*range(1, 1 + max(numbers)), *padding]
        for number, places in parts:
            assert [positions[place] for place in places] == [*range(len(places))]
            ids = [tokens[place] for place in places]
            if number == PADDING_DOCUMENT:
                assert {labels[place] for place in places} == {IGNORED_LABEL}
                continue
            assert BOS not in ids[1:] and EOS not in ids[:-1], "one document, or a part of it"
            for place in places:
                if labels[place] == IGNORED_LABEL:
                    continue
                assert tokens[place] != EOS, "nothing follows a document's end"
                if place < places[-1]:
                    assert labels[place] == tokens[place + 1]
                elif tokens[place] != BOS:
                    assert labels[place] == documents.tokens[tokens[place] - 1], "past the cut"


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_cost_of_a_row_is_known_without_it(
    rows_with: RowsOf, settings: dict[str, object], shuffle: bool
):
    rows = rows_with(shuffle=shuffle, **settings)
    for index in range(0, 2 * rows.rows_per_epoch, 7):
        documents_T = rows.row(index).documents_T
        counts = torch.bincount(documents_T[documents_T != PADDING_DOCUMENT])
        assert rows.attention_cost(index) == int((counts**2).sum())


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_epoch_trains_each_label_once_but_those_that_the_settings_leave_out(
    rows_with: RowsOf, documents: Documents, settings: dict[str, object], epoch: int
):
    trained = labels_of(epoch_of(rows_with(**settings), epoch))
    lengths = documents.lengths()
    everything = documents.labels(lengths > 0)
    match settings:
        case {"long_document": "drop"}:
            assert trained == documents.labels(lengths <= SEQ_LEN)
        case {"long_document": "truncate"}:
            assert trained == documents.labels(lengths > 0, most=SEQ_LEN)
        case {"last_row": "drop"}:
            assert trained < everything and (everything - trained).total() < SEQ_LEN
        case _:
            assert trained == everything


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_no_row_is_without_a_label_and_none_of_a_document_that_fits_is_cut(
    rows_with: RowsOf, documents: Documents, packing: str
):
    for policy in LONG_DOCUMENT:
        rows = epoch_of(rows_with(packing=packing, long_document=policy))
        assert all((row.labels_T != IGNORED_LABEL).any() for row in rows)
        whole = 0
        for row in rows:
            for number in range(1, int(row.documents_T.max()) + 1):
                ids = row.tokens_T[row.documents_T == number]
                whole += int(ids[0] == BOS and ids[-1] == EOS)
        assert whole == (documents.lengths() <= SEQ_LEN).sum()


def test_windows_of_a_smaller_stride_repeat_context_and_train_it_once(
    rows_with: RowsOf, documents: Documents
):
    stride = 24
    rows = epoch_of(rows_with(stride=stride, shuffle=False))
    for before, row in itertools.pairwise(rows):
        overlap = SEQ_LEN - stride
        assert torch.equal(row.tokens_T[:overlap], before.tokens_T[stride:])
        assert (row.labels_T[:overlap] == IGNORED_LABEL).all()
        assert row.documents_T[0] == 1 and row.positions_T[0] == 0
    assert labels_of(rows) == documents.labels(documents.lengths() > 0)
    stream = torch.cat([rows[0].tokens_T, *(row.tokens_T[SEQ_LEN - stride :] for row in rows[1:])])
    assert stream[: len(documents.tokens)].tolist() == documents.tokens.tolist()


def test_one_document_that_is_a_token_too_long_follows_the_policy(
    rows_of: RowsOf, jsonl: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    tokens = np.arange(SEQ_LEN + 1 + 5).astype(np.uint16)
    file = sources.TokenFile(
        tokens=tokens, offsets=np.array([0, SEQ_LEN + 1, SEQ_LEN + 6]), digest="two"
    )
    monkeypatch.setattr(sources, "open_token_file", lambda *args, **settings: file)
    for packing in ("best_fit", "none"):
        for policy, words in (
            ("drop", f"are left out ({SEQ_LEN + 1} tokens lost)"),
            ("truncate", "are cut (1 tokens lost)"),
            ("split", "are split (0 tokens lost)"),
        ):
            caplog.clear()
            rows = rows_of("jsonl", jsonl, packing=packing, long_document=policy, seq_len=SEQ_LEN)
            assert f"1 documents longer than a row {words}" in caplog.text
            long = [row for row in epoch_of(rows) if int(row.tokens_T[0]) == 0]
            assert len(long) == (policy != "drop")
            for row in long:
                assert row.tokens_T.tolist() == tokens[:SEQ_LEN].tolist()
                assert row.labels_T.tolist() == tokens[1 : SEQ_LEN + 1].tolist()
                assert (row.documents_T == 1).all()


def training(rows: RowSource, *, rank: int = 0, ranks: int = 1, start_row: int, workers: int = 0):
    return train_batches(
        rows,
        local_batch_size=2,
        global_batch_size=8,
        batch_rank=rank,
        batch_degree=ranks,
        start_row=start_row,
        dataloader=DataloaderConfig(num_workers=workers),
    )


def rows_of_steps(
    rows: RowSource, first: int, last: int, *, ranks: int = 1, workers: int = 0
) -> dict[int, list[int]]:
    """Return the tokens of each row of steps, over all ranks."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        batches: Iterator[Batch] = training(
            rows, rank=rank, ranks=ranks, start_row=8 * first, workers=workers
        )
        for batch in itertools.islice(batches, 8 * (last - first) // (2 * ranks)):
            numbered = zip(batch.rows_B.tolist(), batch.tokens_BT.tolist(), strict=True)
            for number, tokens in numbered:
                assert number not in found, "no row is dealt twice"
                found[number] = tokens
    return found


@pytest.mark.parametrize(("ranks", "workers"), [(4, 0), (2, 1), (1, 3)])
def test_a_resumed_best_fit_run_goes_on_with_the_same_rows_on_other_ranks_and_workers(
    rows_with: RowsOf, ranks: int, workers: int
):
    rows, again = (rows_with(packing="best_fit", long_document="split") for _ in range(2))
    end_of_epoch = rows.rows_per_epoch // 8
    whole = rows_of_steps(rows, end_of_epoch - 20, end_of_epoch + 20)
    resumed = rows_of_steps(again, end_of_epoch, end_of_epoch + 20, ranks=ranks, workers=workers)
    assert resumed == {number: whole[number] for number in resumed}
    assert len(resumed) == 160


def test_validation_sees_every_best_fit_row_once_on_any_number_of_ranks(rows_with: RowsOf):
    rows = rows_with(packing="best_fit", long_document="split", shuffle=False)
    numbers: Counter[int] = Counter()
    for rank in range(3):
        for batch in validation_batches(
            rows, local_batch_size=4, batch_rank=rank, batch_degree=3, dataloader=DataloaderConfig()
        ):
            assert not batch.one_document_per_row
            numbers.update(batch.rows_B.tolist())
    del numbers[-1]
    assert numbers == Counter(range(rows.rows_per_epoch))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {},
            "packing concat puts 300 documents in {rows} rows of 64 tokens, fill {fill}; last row",
        ),
        ({"packing": "best_fit"}, "packing best_fit puts 300 documents in {rows} rows of 64"),
        ({"packing": "none"}, "packing none puts 300 documents in {rows} rows of 64 tokens, fill"),
    ],
    ids=str,
)
def test_one_line_of_the_log_says_how_full_the_rows_of_a_source_are(
    rows_of: RowsOf,
    jsonl: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, object],
    words: str,
):
    caplog.set_level("INFO")
    rows = rows_of("jsonl", jsonl, **settings)
    held = sum(int((row.documents_T != PADDING_DOCUMENT).sum()) for row in epoch_of(rows))
    fill = f"{held / (rows.rows_per_epoch * SEQ_LEN):.4f}"
    (line,) = [record.message for record in caplog.records if "packing" in record.message]
    assert words.format(rows=f"{rows.rows_per_epoch:,}", fill=fill) in line
    assert f"fill {fill}; " in line
    assert line.startswith(f"jsonl {jsonl} train: ")


def test_best_fit_needs_about_as_few_rows_as_cutting_does(rows_of: RowsOf, jsonl: Path):
    split = {"long_document": "split"}
    cut, fitted, single = (
        rows_of("jsonl", jsonl, seq_len=2048, **settings).rows_per_epoch
        for settings in ({}, {"packing": "best_fit", **split}, {"packing": "none", **split})
    )
    assert cut <= fitted <= 1.03 * cut + 1
    assert single == 300


def test_settings_without_a_meaning_are_refused_with_the_packing_that_has_one():
    for name, value, packings, remedy in (
        ("stride", 4, ("best_fit", "none"), "'concat'"),
        ("last_row", "drop", ("best_fit", "none"), "'concat'"),
        ("long_document", "split", ("concat",), "'best_fit' or 'none'"),
    ):
        for packing in packings:
            message = rf"data\.{name} = {value!r} has no meaning with data\.packing = {packing!r}"
            with pytest.raises(ValueError, match=f"{message}; remove it or use packing {remedy}"):
                DataConfig(**{"packing": packing, name: value})  # pyright: ignore


def test_a_source_of_which_nothing_is_left_is_refused(rows_of: RowsOf, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "word " * 200}) + "\n")
    message = r"fill no row of 64; raise training\.seq_len, or set data\.long_document = 'truncate'"
    for packing in ("best_fit", "none"):
        with pytest.raises(ValueError, match=message):
            rows_of("jsonl", path, packing=packing, long_document="drop")
    message = r"1 documents are longer than a row of 64 tokens.*'truncate', 'drop' or 'split'"
    with pytest.raises(ValueError, match=message):
        rows_of("jsonl", path, packing="best_fit", long_document="error")


def test_cuts_that_leave_no_trained_token_make_no_row_and_are_counted(
    rows_of: RowsOf, jsonl: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    is_trained = np.zeros(200 + 10, dtype=bool)
    is_trained[190:] = True  # a prompt of 190 tokens with an answer of 10, and a short document
    file = sources.TokenFile(
        tokens=np.arange(210).astype(np.uint16),
        offsets=np.array([0, 200, 210]),
        digest="masked",
        is_trained=is_trained,
    )
    monkeypatch.setattr(sources, "open_token_file", lambda *args, **settings: file)
    for policy, num_rows, num_left_out, num_lost in (
        ("truncate", 1, 1, 200),
        ("split", 3, 2, 2 * SEQ_LEN),
    ):
        rows = rows_of("jsonl", jsonl, packing="none", long_document=policy, shuffle=False)
        assert rows.rows_per_epoch == num_rows
        assert f"({num_lost} tokens lost), {num_left_out} pieces of them without" in caplog.text
