import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data import readers, tables
from engine.data.hugging_face import DatasetRows, open_dataset
from engine.data.named_sources import BUILTIN_RECORDS, FILE_SUFFIXES, open_reader
from engine.data.readers import BadRecords, JsonLines, Reader, TextFiles, find_files
from engine.data.tables import ArrowFiles, Parquet


def read_all(reader: Reader, bad: BadRecords | None = None) -> list[object]:
    bad = bad or BadRecords("raise")
    return [record["text"] for piece in reader.pieces() for _, record in reader.read(piece, bad)]


def write_lines(path: Path, lines: list[str]) -> JsonLines:
    path.write_text("\n".join(lines))
    return JsonLines([path])


def write_gzip(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


KEEP = BadRecords("raise")
TEXTS = [f"text {i} é" * (i % 5 + 1) for i in range(50)]


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1 << 20])
def test_json_lines_are_read_once_and_in_order_wherever_files_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
):
    monkeypatch.setattr(readers, "PIECE_BYTES", piece_bytes)
    lines = [json.dumps({"text": text, "other": 1}, ensure_ascii=False) for text in TEXTS]
    write_lines(tmp_path / "a.jsonl", lines[:20])
    write_lines(tmp_path / "b.jsonl", ["", *lines[20:], "  ", ""])
    found = find_files(str(tmp_path), (".jsonl",), "training.dataset_path")
    assert read_all(JsonLines(found)) == TEXTS


@pytest.mark.parametrize("piece_bytes", [16, 1 << 20])
def test_a_bad_json_line_is_named_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
):
    monkeypatch.setattr(readers, "PIECE_BYTES", piece_bytes)
    good = json.dumps({"text": "good"})
    reader = write_lines(tmp_path / "a.jsonl", [good, "", good, '{"text": "cut off', good])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: not valid JSON.*data\.on_bad_record"):
        read_all(reader)
    reader = write_lines(tmp_path / "b.jsonl", [good, "[1, 2]"])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: a JSON list where an object"):
        read_all(reader)


def test_bad_records_are_counted_and_the_first_are_kept_as_examples(tmp_path: Path):
    bad = BadRecords("skip")
    good = json.dumps({"text": "good"})
    reader = write_lines(tmp_path / "a.jsonl", [good, *["{"] * 30, good])
    assert read_all(reader, bad) == ["good", "good"]
    assert bad.count == 30
    assert [str(place).rpartition(", ")[2] for place, _ in bad.examples] == [
        f"line {n}" for n in range(2, 2 + readers.NUM_EXAMPLES)
    ]


def test_a_json_array_is_read_as_its_objects(tmp_path: Path):
    records = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_text("\n " + json.dumps(records, indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"text": "a line"}))
    reader = JsonLines([tmp_path / "a.json", tmp_path / "b.json"])
    assert read_all(reader) == [*TEXTS, "a line"]
    (tmp_path / "b.json").write_text('[{"text": "x"}, 5]')
    with pytest.raises(ValueError, match=r"b\.json, row 1: a JSON int where an object is expected"):
        read_all(reader)
    (tmp_path / "b.json").write_text('[{"text": "x"}')
    with pytest.raises(ValueError, match=r"b\.json: not valid JSON"):
        read_all(reader)


@pytest.mark.parametrize("piece_bytes", [1, 7, 16, 64, 1 << 20])
def test_records_are_numbered_over_files_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
):
    monkeypatch.setattr(readers, "PIECE_BYTES", piece_bytes)
    lines = [json.dumps({"text": f"text {i} é" * (i % 3)}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:6]))  # without an end of line
    (tmp_path / "b.json").write_text(f"[{','.join(lines[6:10])}]")
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[10:13], "", "{", *lines[15:], ""]))
    reader = JsonLines([tmp_path / name for name in ("a.jsonl", "b.json", "c.jsonl")])
    found = {
        place.number: record
        for piece in reader.pieces(numbered=True)
        for place, record in reader.read(piece, BadRecords("skip"))
    }
    expected = {i: json.loads(line) for i, line in enumerate(lines) if i not in (13, 14)}
    assert found == expected, "a line has its number, whether or not it holds a record"


def test_gzip_files_are_read_as_what_they_hold_beside_plain_ones_and_under_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(readers, "PIECE_BYTES", 16)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    write_gzip(tmp_path / "a.jsonl.gz", "\n".join(lines[:20]))
    write_lines(tmp_path / "b.jsonl", lines[20:30])
    write_gzip(tmp_path / "c.json.gz", f" [{','.join(lines[30:40])}]")
    write_gzip(tmp_path / "d.jsonl", "\n".join(lines[40:]) + "\n")
    reader = JsonLines(find_files(str(tmp_path), FILE_SUFFIXES["jsonl"], "training.dataset_path"))
    assert read_all(reader) == TEXTS
    places = [p for piece in reader.pieces(numbered=True) for p, _ in reader.read(piece, KEEP)]
    assert [place.number for place in places] == list(range(50))
    assert str(places[7]) == f"{tmp_path}/a.jsonl.gz, line 8"
    (tmp_path / "texts").mkdir()
    write_gzip(tmp_path / "texts" / "a.txt.gz", "first\r\nstill first")
    (tmp_path / "texts" / "b.txt").write_text("second")
    found = find_files(str(tmp_path / "texts"), FILE_SUFFIXES["text"], "training.dataset_path")
    assert read_all(TextFiles(found)) == ["first\nstill first", "second"]


def test_a_bad_line_in_a_gzip_file_has_its_line_number_and_a_cut_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    good = json.dumps({"text": "good"})
    write_gzip(path, "\n".join([good, "", good, '{"text": "cut off', good]))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 4: not valid JSON"):
        read_all(JsonLines([path]))
    write_gzip(path, "\n".join(json.dumps({"text": str(hash(n))}) for n in range(2000)))
    path.write_bytes(path.read_bytes()[:-200])
    for numbered in (False, True):
        reader = JsonLines([path])
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: not a readable gzip file.*write it"):
            for piece in reader.pieces(numbered=numbered):
                list(reader.read(piece, BadRecords("skip")))


def test_a_large_json_array_is_said_to_be_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    JsonLines([path]).pieces()
    assert not caplog.text
    monkeypatch.setattr(readers, "LARGE_ARRAY_BYTES", 1000)
    JsonLines([path]).pieces()
    assert "a.json holds one JSON array" in caplog.text


def test_text_files_are_one_document_each_and_bytes_that_are_not_utf8_are_bad(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first\nstill first")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    files = find_files(str(tmp_path), (".txt",), "training.dataset_path")
    with pytest.raises(ValueError, match=r"b\.txt: not UTF-8 text"):
        read_all(TextFiles(files))
    assert read_all(TextFiles(files, errors="replace")) == ["first\nstill first", "caf\ufffd"]


def test_text_files_are_grouped_in_pieces_that_miss_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:03}.txt").write_text(text)
    reader = TextFiles(sorted(tmp_path.iterdir()))
    assert len(reader.pieces()) > 5
    assert read_all(reader) == TEXTS


def test_parquet_gives_its_text_column_over_files_and_row_groups(tmp_path: Path):
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        table = pa.table({"n": list(range(len(texts))), "text": texts})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=8)
    reader = Parquet(sorted(tmp_path.iterdir()), text_field="text")
    assert len(reader.pieces()) == 4 + 3
    assert read_all(reader) == TEXTS
    places = [place for piece in reader.pieces() for place, _ in reader.read(piece, KEEP)]
    assert [place.number for place in places] == list(range(50))
    whole = Parquet(sorted(tmp_path.iterdir()), text_field=None)
    (_, record) = next(iter(whole.read(whole.pieces()[1], KEEP)))
    assert record == {"n": 8, "text": TEXTS[8]}, "without a named column all are read"


def write_arrow(path: Path, kind: str, table: pa.Table, rows: int, compression: str | None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_arrow_files_and_streams_give_their_text_column_over_record_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compression: str | None
):
    monkeypatch.setattr(tables, "PIECES_PER_FILE", 4)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 3)
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        table = pa.table({"n": list(range(len(texts))), "text": texts})
        write_arrow(tmp_path / f"{name}.arrow", kind, table, 4, compression)
    files = find_files(str(tmp_path), FILE_SUFFIXES["arrow"], "training.dataset_path")
    reader = ArrowFiles(files, text_field="text")
    assert len(reader.pieces()) == 4 + 3
    assert read_all(reader) == TEXTS
    places = [place for piece in reader.pieces() for place, _ in reader.read(piece, KEEP)]
    assert [place.number for place in places] == list(range(50))
    assert str(places[37]) == f"{tmp_path}/b.arrow, record batch 1, row 3"
    whole = ArrowFiles(files, text_field=None)
    (_, record) = next(iter(whole.read(whole.pieces()[1], KEEP)))
    assert record == {"n": 8, "text": TEXTS[8]}, "without a named column all are read"


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_damaged_arrow_file_and_a_missing_column_are_named(tmp_path: Path, kind: str):
    path = tmp_path / "a.arrow"
    write_arrow(path, kind, pa.table({"text": TEXTS}), 5, None)
    with pytest.raises(ValueError, match=r"data\.text_field = 'body' is not a column.*'text'"):
        ArrowFiles([path], text_field="body")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"a\.arrow: (not a readable Arrow|record batch \d+ cannot)"
    ):
        read_all(ArrowFiles([path], text_field="text"))
    path.write_bytes(b"no table at all, but a long line of text")
    with pytest.raises(ValueError, match=r"a\.arrow: not a readable Arrow file"):
        ArrowFiles([path], text_field="text")


def test_an_unreadable_parquet_file_and_a_missing_column_are_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        Parquet([path], text_field="text")
    pq.write_table(pa.table({"body": TEXTS, "n": list(range(50))}), path)
    with pytest.raises(ValueError, match=r"data\.text_field = 'text' is not a column.*'body', 'n'"):
        Parquet([path], text_field="text")


def test_a_parquet_file_damaged_inside_is_named_with_its_row_group(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=10, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: row group 0 cannot be read"):
        read_all(Parquet([path], text_field="text"))


@pytest.mark.parametrize("kind", ["dataset", "splits", "json_folder"])
def test_datasets_folders_are_read_by_split(tmp_path: Path, kind: str):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(50))})
    folder = tmp_path / "data"
    if kind == "dataset":
        dataset.save_to_disk(folder)
    elif kind == "splits":
        datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder)
    else:
        folder.mkdir()
        dataset.to_json(folder / "train.jsonl")
    opened = open_dataset(str(folder), split="train", key="training.dataset")
    assert isinstance(opened, datasets.Dataset)
    reader = DatasetRows(opened, name="data", text_field="text")
    assert read_all(reader) == TEXTS
    whole = DatasetRows(opened, name="data", text_field=None)
    found = [pair for piece in whole.pieces() for pair in whole.read(piece, KEEP)]
    assert [record for _, record in found] == [*dataset]
    assert [place.number for place, _ in found] == list(range(50))
    if kind == "splits":
        with pytest.raises(ValueError, match=r"no split 'validation', only 'train', 'test'"):
            open_dataset(str(folder), split="validation", key="validation.dataset")


def test_the_digest_of_a_saved_dataset_follows_its_content_and_not_its_place(tmp_path: Path):
    def digest(texts: list[str], folder: str) -> str:
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / folder)
        opened = open_dataset(str(tmp_path / folder), split="train", key="training.dataset")
        assert isinstance(opened, datasets.Dataset)
        return DatasetRows(opened, name="data", text_field="text").digest(tmp_path)

    assert digest(TEXTS, "one") == digest(TEXTS, "two")
    assert digest(TEXTS, "one") != digest([*TEXTS[:-1], "text 49 E"], "three")


def test_a_dataset_that_cannot_be_opened_is_named_with_our_own_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"training\.dataset = 'pyhton_stdlib'.*python_stdlib, du"):
        open_dataset("pyhton_stdlib", split="train", key="training.dataset")
    with pytest.raises(ValueError, match=r"data\.text_field = 'text' is not a column of d; .*'a'"):
        DatasetRows(datasets.Dataset.from_dict({"a": ["x"]}), name="d", text_field="text")


def test_paths_may_be_files_folders_or_patterns_and_missing_ones_are_named(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.json", "note.txt"):
        (tmp_path / name).write_text("{}")
    key = "training.dataset_path"

    def names(path: object) -> list[str]:
        return [file.name for file in find_files(str(path), (".jsonl", ".json"), key)]

    assert names(tmp_path / "note.txt") == ["note.txt"]
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "c.json"]
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.json") == ["c.json"]
    with pytest.raises(ValueError, match=r"training\.dataset_path = '.*none.*' does not exist"):
        names(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is a folder without \.jsonl or \.json files"):
        names(tmp_path / "empty")


def test_a_path_beside_the_built_in_corpus_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^validation\.dataset_path = 'own' would not be read"):
        open_reader(
            "python_stdlib",
            "own",
            split="validation",
            text_field="text",
            only_text=True,
            root=tmp_path,
        )


@pytest.mark.parametrize("dataset", BUILTIN_RECORDS)
def test_json_lines_take_the_place_of_the_built_in_chats_and_pairs(tmp_path: Path, dataset: str):
    write_lines(tmp_path / "own.jsonl", ['{"text": "own"}'])
    reader = open_reader(
        dataset,
        str(tmp_path / "own.jsonl"),
        split="train",
        text_field="text",
        only_text=False,
        root=tmp_path / "cache",
    )
    assert read_all(reader) == ["own"] and not (tmp_path / "cache").exists()
