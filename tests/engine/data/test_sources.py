import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine.data import sources
from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.config import DataConfig
from engine.data.rows import RowSource
from engine.data.tokenizer import Tokenizer

RowsOf = Callable[..., RowSource]


def equal(left: Row, right: Row) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(left, name)), torch.as_tensor(getattr(right, name)))
        for name in Row.__dataclass_fields__
        if getattr(left, name) is not None or getattr(right, name) is not None
    )


def check_row(row: Row, marks: tuple[int | None, int | None]) -> None:
    """Assert what holds for every row: each document by itself is a shifted copy of its text."""
    documents = row.documents_T.tolist()
    present = sorted(set(documents) - {PADDING_DOCUMENT})
    assert present == list(range(1, len(present) + 1)), "numbered from 1 in row order"
    assert documents == sorted(documents, key=lambda d: (d == PADDING_DOCUMENT, d))
    for document in present:
        here = row.documents_T == document
        tokens, labels = row.tokens_T[here].tolist(), row.labels_T[here].tolist()
        assert row.positions_T[here].tolist() == list(range(len(tokens)))
        trained = [(t, label) for t, label in enumerate(labels[:-1]) if label != IGNORED_LABEL]
        assert all(label == tokens[t + 1] for t, label in trained)
        if tokens[-1] == marks[1]:
            assert labels[-1] == IGNORED_LABEL, "nothing follows a document's end"
        assert marks[0] not in labels, "no label is the beginning of the next document"
    padding = row.documents_T == PADDING_DOCUMENT
    assert (row.labels_T[padding] == IGNORED_LABEL).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": "concat"},
        {"packing": "concat", "stride": 24, "shuffle": False},
        {"packing": "concat", "last_row": "drop", "seq_len": 50},
        {"packing": "none", "long_document": "truncate"},
        {"packing": "none", "long_document": "drop"},
    ],
    ids=str,
)
def test_labels_positions_and_numbers_of_documents_hold_in_every_row(
    rows_of: RowsOf, jsonl: Path, tokenizer: Tokenizer, settings: dict[str, object]
):
    rows = rows_of("jsonl", jsonl, **settings)
    for index in range(rows.rows_per_epoch):
        check_row(rows.row(index), (tokenizer.bos_id, tokenizer.eos_id))


def epoch_labels(rows: RowSource, epoch: int = 0) -> list[int]:
    first = epoch * rows.rows_per_epoch
    labels = torch.cat([rows.row(first + row).labels_T for row in range(rows.rows_per_epoch)])
    return sorted(labels[labels != IGNORED_LABEL].tolist())


def expected_labels(jsonl: Path, tokenizer: Tokenizer) -> list[int]:
    texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    assert tokenizer.eos_id is not None
    return sorted(id for text in texts for id in [*tokenizer.encode(text), tokenizer.eos_id])


@pytest.mark.parametrize("stride", [0, 24])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_but_a_documents_first_is_a_label_once_an_epoch(
    rows_of: RowsOf, jsonl: Path, tokenizer: Tokenizer, stride: int, shuffle: bool
):
    rows = rows_of("jsonl", jsonl, stride=stride, shuffle=shuffle)
    for epoch in (0, 3):
        assert epoch_labels(rows, epoch) == expected_labels(jsonl, tokenizer)


def test_one_document_per_row_pads_behind_it(rows_of: RowsOf, jsonl: Path):
    rows = rows_of("jsonl", jsonl, packing="none", seq_len=2048, shuffle=False)
    assert rows.rows_per_epoch == 300
    row = rows.row(3)
    used = int((row.documents_T == 1).sum())
    assert 0 < used < 2048
    assert row.documents_T.tolist() == [1] * used + [PADDING_DOCUMENT] * (2048 - used)
    assert int((row.labels_T != IGNORED_LABEL).sum()) == used - 1


def test_documents_longer_than_the_row_follow_the_policy_and_are_counted(
    rows_of: RowsOf, jsonl: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    message = r"documents are longer than a row of 64 tokens.*raise training\.seq_len.*truncate"
    with pytest.raises(ValueError, match=message):
        rows_of("jsonl", jsonl, packing="none", long_document="error")
    cut = rows_of("jsonl", jsonl, packing="none", long_document="truncate", shuffle=False)
    assert cut.rows_per_epoch == 300
    left = rows_of("jsonl", jsonl, packing="none", long_document="drop", shuffle=False)
    num_long = 300 - left.rows_per_epoch
    assert num_long > 0
    assert f"{num_long} documents longer than a row are cut" in caplog.text
    assert f"{num_long} documents longer than a row are left out" in caplog.text


def test_rows_repeat_for_a_seed_and_differ_between_seeds_and_epochs(rows_of: RowsOf, jsonl: Path):
    rows, again, other = (rows_of("jsonl", jsonl, seed=seed) for seed in (1, 1, 2))
    num = rows.rows_per_epoch
    for index in (5 * num + 3, 0, num, 7):
        assert equal(rows.row(index), again.row(index))
        assert not equal(rows.row(index), other.row(index))
        assert not equal(rows.row(index), rows.row(index + num))
    plain = rows_of("jsonl", jsonl, shuffle=False)
    assert equal(plain.row(4), plain.row(4 + 6 * plain.rows_per_epoch))


def written_in_every_format(texts: list[str], folder: Path) -> dict[str, tuple[str, Path]]:
    """Write the same texts in each way that can be read; return `dataset` and path of each."""
    table = pa.table({"text": texts})
    records = [{"text": text} for text in texts]
    lines = [json.dumps(record) + "\n" for record in records]
    for name in ("texts", "mixed"):
        (folder / name).mkdir()
    (folder / "lines.jsonl").write_text("".join(lines))
    (folder / "array.json").write_text(json.dumps(records, indent=1))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "array.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    (folder / "mixed" / "a.jsonl").write_text("".join(lines[:70]))
    (folder / "mixed" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[70:120]).encode()))
    (folder / "mixed" / "c.json").write_text(json.dumps(records[120:]))
    pq.write_table(table, folder / "text.parquet", row_group_size=100)
    with pa.ipc.new_file(str(folder / "file.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=30)
    with pa.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=30)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved")
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:03}.txt").write_text(text)
    kinds = {"lines.jsonl": "jsonl", "array.json": "json", "lines.jsonl.gz": "jsonl"}
    kinds |= {"array.json.gz": "json", "mixed": "jsonl", "text.parquet": "parquet"}
    kinds |= {"file.arrow": "arrow", "stream.arrow": "arrow", "saved": "anything", "texts": "text"}
    return {name: (kind, folder / name) for name, kind in kinds.items()}


def test_two_hundred_texts_give_bit_equal_rows_from_every_kind_of_file(
    rows_of: RowsOf, jsonl: Path, tmp_path: Path
):
    texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()][:200]
    found = written_in_every_format(texts, tmp_path)
    first = rows_of(*found.pop("lines.jsonl"))
    for name, (kind, path) in found.items():
        other = rows_of(kind, path)
        assert other.fingerprint == first.fingerprint, name
        for index in range(first.rows_per_epoch + 2):
            assert equal(other.row(index), first.row(index)), name
    assert rows_of(str(tmp_path / "saved")).fingerprint == first.fingerprint


def test_the_fingerprint_changes_with_data_and_packing(rows_of: RowsOf, jsonl: Path):
    prints = [
        rows_of("jsonl", jsonl, **settings).fingerprint
        for settings in (
            {},
            {"seq_len": 65},
            {"seed": 8},
            {"stride": 9},
            {"packing": "none"},
            {"bos": False},
            {"last_row": "drop"},
            {"shuffle": False},
        )
    ]
    assert len(set(prints)) == len(prints)
    assert rows_of("jsonl", jsonl, num_processes=3).fingerprint == prints[0]


def test_a_data_set_smaller_than_one_row_is_padded_or_refused(rows_of: RowsOf, tmp_path: Path):
    path = tmp_path / "tiny.jsonl"
    path.write_text('{"text": "one two"}\n')
    rows = rows_of("jsonl", path)
    assert rows.rows_per_epoch == 1
    assert int((rows.row(5).documents_T == PADDING_DOCUMENT).sum()) > 50
    with pytest.raises(ValueError, match=r"tokens fill no row of 64.*data\.last_row = 'keep'"):
        rows_of("jsonl", path, last_row="drop")


def test_a_file_kind_without_a_path_and_a_stride_beyond_the_row_are_refused(
    rows_of: RowsOf, jsonl: Path
):
    with pytest.raises(ValueError, match=r"validation\.dataset = 'parquet' needs validation\.data"):
        rows_of("parquet", split="validation")
    with pytest.raises(ValueError, match=r"data\.stride = 65 is longer than a row of 64 tokens"):
        rows_of("jsonl", jsonl, stride=65)


def test_settings_check_themselves():
    with pytest.raises(ValueError, match=r"data\.stride = -1; give a whole number from 0 up"):
        DataConfig(stride=-1)
    with pytest.raises(ValueError, match=r"data\.dummy_tokens = 0"):
        DataConfig(dummy_tokens=0)
    with pytest.raises(ValueError, match=r"data\.stride = 4 has no meaning with data\.packing"):
        DataConfig(stride=4, packing="none")


def test_the_builtin_source_has_two_splits_and_answers_to_the_names_of_old_files(
    rows_of: RowsOf, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    train, validation = rows_of("c4_test"), rows_of("c4_validation", split="validation")
    assert train.fingerprint == rows_of("python_stdlib").fingerprint
    assert "training.dataset = 'c4_test' stands for 'python_stdlib'" in caplog.text
    assert "validation.dataset = 'c4_validation' stands for 'python_stdlib'" in caplog.text
    assert train.rows_per_epoch > 5 * validation.rows_per_epoch > 100
    assert train.vocab_size == 4096


def test_dummy_rows_depend_on_the_seed_and_the_row_alone(rows_of: RowsOf):
    rows, again, other = (rows_of("dummy", seed=seed) for seed in (1, 1, 2))
    assert equal(rows.row(10**12), again.row(10**12))
    assert not equal(rows.row(3), other.row(3))
    assert not equal(rows.row(3), rows.row(4))
    assert not equal(rows.row(3), rows_of("dummy", seed=1, split="validation").row(3))
    row = rows.row(0)
    assert torch.equal(row.tokens_T[1:], row.labels_T[:-1])
    assert (row.documents_T == 1).all() and torch.equal(row.positions_T, torch.arange(64))
    drawn = np.concatenate([rows.row(index).tokens_T.numpy() for index in range(1000)])
    assert drawn.min() >= 0 and drawn.max() < 4096
    counts = np.bincount(drawn, minlength=4096)
    assert abs(np.square(counts - 15.625).sum() / 15.625 / 4095 - 1) < 0.15, "uniform"


@pytest.mark.parametrize("num_tokens", [1, 64, 1000])
def test_an_epoch_of_dummy_rows_reaches_its_tokens_within_one_row(rows_of: RowsOf, num_tokens: int):
    rows = rows_of("dummy", dummy_tokens=num_tokens)
    assert 0 <= rows.rows_per_epoch * 64 - num_tokens < 64


def test_any_row_of_two_million_documents_is_found_in_seconds(
    rows_of: RowsOf, jsonl: Path, monkeypatch: pytest.MonkeyPatch
):
    lengths = np.random.default_rng(0).integers(2, 40, 2_000_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(int(offsets[-1]), dtype=np.uint16)
    file = sources.TokenFile(tokens=tokens, offsets=offsets, digest="large")
    monkeypatch.setattr(sources, "open_token_file", lambda *args, **settings: file)
    rows = rows_of("jsonl", jsonl)
    started = time.monotonic()
    rows.row(1_000_000 * 256)
    assert time.monotonic() - started < 5
    started = time.monotonic()
    for index in range(1000):
        rows.row(1_000_000 * 256 + index)
    assert time.monotonic() - started < 5
