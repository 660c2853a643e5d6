"""Rows of a stream are a function of the records, the seed and the rows of a step alone."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from engine.data import readers
from engine.data.batch import PADDING_DOCUMENT, Row
from engine.data.config import DataConfig
from engine.data.hugging_face import DatasetStream, read_dataset
from engine.data.loader import DataloaderConfig, Dealing, train_batches
from engine.data.readers import BadRecords
from engine.data.rows import RowSource
from engine.data.sources import stream_rows
from engine.data.streaming import StreamedRows, shuffled
from engine.data.tokenizer import Tokenizer
from engine.verify.__main__ import main
from tests.engine.data.test_sources import check_row, equal

StreamOf = Callable[..., StreamedRows]
NUM_DOCUMENTS = 300
LANES = 6


@pytest.fixture
def stream_of(cache_folder: str, tokenizer: Tokenizer, jsonl: Path) -> StreamOf:
    """Opens a stream with short defaults: `stream_of(path, seq_len=..., **data_settings)`."""

    def stream_of(
        path: Path | str | None = jsonl,
        *,
        dataset: str = "jsonl",
        seq_len: int = 64,
        seed: int = 7,
        lanes: int = LANES,
        **settings: object,
    ) -> StreamedRows:
        given = {"cache_folder": cache_folder, "shuffle_buffer_size": 50, **settings}
        return stream_rows(
            dataset,
            None if path is None else str(path),
            seq_len=seq_len,
            seed=seed,
            tokenizer=tokenizer,
            config=DataConfig(streaming=True, **given),  # pyright: ignore[reportArgumentType]
            rows_per_step=lanes,
        )

    return stream_of


def tokens(row: Row) -> list[int]:
    return row.tokens_T[row.documents_T != PADDING_DOCUMENT].tolist()


def whole_documents(stream_of: StreamOf, count: int, **settings: object) -> list[list[int]]:
    """The first documents of the stream, in its order: one a row, none of them cut."""
    rows = stream_of(packing="none", seq_len=4096, **settings)
    return [tokens(rows.row(index)) for index in range(count)]


def test_each_pass_has_every_document_once_in_another_order(
    stream_of: StreamOf, rows_of: Callable[..., RowSource], jsonl: Path
):
    found = whole_documents(stream_of, 3 * NUM_DOCUMENTS)
    passes = [found[begin : begin + NUM_DOCUMENTS] for begin in (0, 300, 600)]
    prepared = rows_of("jsonl", jsonl, packing="none", seq_len=4096)
    expected = Counter(str(tokens(prepared.row(index))) for index in range(NUM_DOCUMENTS))
    assert all(Counter(map(str, one)) == expected for one in passes)
    assert len({str(one) for one in passes}) == 3
    assert whole_documents(stream_of, 300, seed=8) != passes[0]


def test_a_lane_joins_its_documents_and_cuts_them_where_rows_end(stream_of: StreamOf):
    documents = whole_documents(stream_of, 4 * NUM_DOCUMENTS)
    rows = stream_of()
    found: dict[int, list[int]] = {lane: [] for lane in range(LANES)}
    for index in range(50 * LANES):
        row = rows.row(index)
        check_row(row, (None, None))
        assert (row.documents_T != PADDING_DOCUMENT).all(), "a stream has no last row"
        found[index % LANES] += row.tokens_T.tolist()
    for lane, text in found.items():
        joined = [token for document in documents[lane::LANES] for token in document]
        assert text == joined[: 50 * 64]


def test_labels_follow_their_document_over_the_end_of_a_row(stream_of: StreamOf):
    rows = stream_of(lanes=1)
    before, after = rows.row(0), rows.row(1)
    assert before.labels_T[-1] == after.tokens_T[0], "the first document fills more than a row"


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_rows_are_the_same_in_whatever_order_and_lanes_they_are_asked_for(
    stream_of: StreamOf, packing: str
):
    rows = stream_of(packing=packing)
    whole = [rows.row(index) for index in range(20 * LANES)]
    again = stream_of(packing=packing)
    for index in (57, 3, 119, 118, 0, 57):
        assert equal(again.row(index), whole[index])
    own = rows.sharing([1, 4])
    for index in [index for index in range(30, 20 * LANES) if index % LANES in (1, 4)]:
        assert equal(own.row(index), whole[index])


def test_other_steps_buffers_and_seeds_are_other_data(stream_of: StreamOf):
    found = [stream_of(), stream_of(lanes=5), stream_of(seed=8), stream_of(shuffle_buffer_size=9)]
    assert len({rows.fingerprint for rows in found}) == 4
    assert stream_of().fingerprint == found[0].fingerprint
    assert len({str(rows.row(0).tokens_T.tolist()) for rows in found}) == 4


def test_long_documents_are_handled_as_in_prepared_data(stream_of: StreamOf):
    settings = {"packing": "none", "seq_len": 64}
    split = stream_of(**settings, long_document="split", lanes=1)
    cut = stream_of(**settings, long_document="truncate", lanes=1)
    documents = whole_documents(stream_of, 30, lanes=1)
    assert [tokens(cut.row(index)) for index in range(30)] == [one[:64] for one in documents]
    pieces = [one[k : k + 64] for one in documents for k in range(0, max(len(one) - 1, 1), 64)]
    assert [tokens(split.row(index)) for index in range(30)] == pieces[:30]
    with pytest.raises(ValueError, match=r"line \d+.*longer than a row of 64 tokens"):
        [stream_of(**settings, long_document="error").row(index) for index in range(300)]


def test_a_buffer_draws_every_item_once_and_one_item_keeps_the_order():
    items = list(range(1000))
    assert list(shuffled(items, 1, "key")) == items
    found = list(shuffled(items, 64, "key"))
    assert sorted(found) == items and found != items
    assert found == list(shuffled(items, 64, "key")) != list(shuffled(items, 64, "other"))
    assert all(item - place < 64 for place, item in enumerate(found))
    late = sum(place - item > 5 * 64 for place, item in enumerate(found))
    assert late < 20
    assert sorted(shuffled(items[:9], 64, "key")) == items[:9]


def test_without_a_buffer_the_order_is_that_of_the_files(
    stream_of: StreamOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    texts = [f"text number {number}" for number in range(40)]
    path = tmp_path / "ordered.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = stream_of(path, packing="none", shuffle_buffer_size=1)
    found = [tokenizer.decode(tokens(rows.row(index))) for index in range(80)]
    assert found == texts * 2
    mixed = stream_of(path, packing="none", shuffle_buffer_size=2)
    found = [tokenizer.decode(tokens(mixed.row(index))) for index in range(40)]
    assert sorted(found) == sorted(texts)
    assert found[0] not in texts[:3] or found[1] not in texts[:3], "pieces are in another order"


def test_bad_records_are_named_or_skipped_without_moving_others(
    stream_of: StreamOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lines = [json.dumps({"text": f"good {number}"}) for number in range(20)]
    bad = [*lines[:5], "{", json.dumps({"text": 5}), *lines[5:]]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(bad) + "\n")
    with pytest.raises(
        ValueError, match=r"bad\.jsonl, line 6: not valid JSON.*data\.on_bad_record"
    ):
        stream_of(path).row(0)
    with caplog.at_level(logging.INFO, "tessera"):
        rows = stream_of(path, on_bad_record="skip", packing="none", lanes=1)
        found = [str(tokens(rows.row(index))) for index in range(21)]
    assert len(set(found[:20])) == 20 and found[20] in found[:20], "a pass has the 20 good ones"
    assert "bad.jsonl, line 6: not valid JSON" in caplog.text
    assert "bad.jsonl, line 7: field 'text' holds int" in caplog.text
    assert "pass 1 is read, of 21 records" in caplog.text


def test_a_stream_without_text_is_refused(stream_of: StreamOf, tmp_path: Path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"is empty: a whole pass gave no record"):
        stream_of(path).row(0)
    path.write_text('{"text": ""}\n' * 30)
    refused = r"no text to train in .* records on end; check data\."
    with pytest.raises(ValueError, match=refused):
        stream_of(path).row(0)
    path.write_text('{"other": "words"}\n' * 30)
    with pytest.raises(ValueError, match=refused):
        stream_of(path, on_bad_record="skip").row(0)
    path.write_text('{"text": "many more words than a row has places for tokens"}\n' * 30)
    with pytest.raises(ValueError, match=refused):
        stream_of(path, packing="none", long_document="drop", seq_len=4).row(0)


# --------------------------------------------------------------------- the datasets package


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the datasets package loads it by name: three files, so three shards."""
    folder = tmp_path_factory.mktemp("hub") / "texts"
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": f"document {part} {n} " * (n % 9 + 1)}) for n in range(40)]
        (folder / f"train-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_shards_of_a_streamed_dataset_are_read_on_their_own(folder: Path):
    reader = read_dataset(str(folder), split="train", key="k", text_field="text", streaming=True)
    assert isinstance(reader, DatasetStream)
    pieces = reader.pieces()
    assert len(pieces) == 3
    shards = [list(reader.read(piece, BadRecords("raise"))) for piece in pieces]
    texts = [str(record["text"]) for shard in shards for _, record in shard]
    assert len(set(texts)) == 120
    assert all(list(record) == ["text"] for shard in shards for _, record in shard)
    assert str(shards[2][7][0]) == f"{folder}, shard 2, row 7"


def test_a_dataset_made_on_the_fly_is_a_stream_and_its_columns_are_checked():
    made = datasets.IterableDataset.from_generator(lambda: ({"body": f"t{n}"} for n in range(5)))
    reader = DatasetStream(made, name="made", text_field=None)  # pyright: ignore[reportArgumentType]
    (piece,) = reader.pieces()
    assert [record for _, record in reader.read(piece, BadRecords("raise"))][4] == {"body": "t4"}
    table = datasets.Dataset.from_dict({"body": ["x"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"data\.text_field = 'text' is not a column of made"):
        DatasetStream(table, name="made", text_field="text")


# ------------------------------------------------------------------------- resumed, on ranks

CHAT = ("--data.format=chat", "--data.chat_template=tulu")
KINDS = {
    "files": ("--training.dataset=jsonl", "--training.dataset_path={jsonl}"),
    "chats": (
        *("--training.dataset=jsonl", "--training.dataset_path={chats}"),
        *("--data.packing=none", "--data.long_document=split", *CHAT),
    ),
    "datasets": ("--training.dataset={folder}",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_restarts_change_no_row(
    kind: str, cache_folder: str, jsonl: Path, chats: Path, folder: Path, capsys, caplog
):
    data = [word.format(jsonl=jsonl, chats=chats, folder=folder) for word in KINDS[kind]]
    workers = "--workers=0,1" if kind == "files" else "--workers=1"
    words = ["--plan=1,2,4,3", "--steps=8", "--training.seq_len=64", workers, *data]
    settings = ["--data.streaming", "--data.shuffle_buffer_size=40"]
    settings += [f"--data.cache_folder={cache_folder}", "--training.global_batch_size=8"]
    with caplog.at_level(logging.INFO, "tessera"):
        assert main(["data-elastic", *words, *settings]) == 0
    equal_runs = capsys.readouterr().out.count("equal, each row exactly once")
    assert equal_runs == workers.count(",") + 1
    assert "a stream. Every data-parallel rank reads all of it" in caplog.text


def test_a_rank_reads_the_stream_once_and_its_places_are_a_share_of_the_step(
    stream_of: StreamOf, monkeypatch: pytest.MonkeyPatch
):
    rewind, asked = StreamedRows._rewind, list[set[int]]()
    monkeypatch.setattr(
        StreamedRows, "_rewind", lambda self, lanes: (asked.append({*lanes}), rewind(self, lanes))
    )
    sizes = {"local_batch_size": 1, "global_batch_size": LANES, "batch_degree": 4}
    rows = stream_of()
    for rank in range(4):
        batches = train_batches(
            rows, **sizes, batch_rank=rank, start_row=5 * LANES, dataloader=DataloaderConfig()
        )
        for _ in range(8):
            next(batches)
    assert asked == [set(), *({*Dealing.of(**sizes).places(rank)} for rank in range(4))]
    assert sorted(lane for lanes in asked for lane in lanes) == list(range(LANES))


@pytest.mark.parametrize("fault", ["late_cursor", "order_by_rank"])
def test_a_fault_is_noticed_in_a_stream_too(fault: str, cache_folder: str, jsonl: Path, capsys):
    data = ("--training.dataset=jsonl", f"--training.dataset_path={jsonl}", "--workers=0")
    settings = ("--data.streaming", "--training.seq_len=64", f"--data.cache_folder={cache_folder}")
    plan = ("--plan=2,3", "--steps=4", f"--fault={fault}")
    assert main(["data-elastic", *plan, *data, *settings]) == 1
    assert "noticed in 1 of 1 runs" in capsys.readouterr().out


def test_reading_again_is_logged_with_its_time(
    stream_of: StreamOf, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "tessera"):
        rows = stream_of().sharing([0, 1])
        rows.row(600)
        rows.row(601)
        rows.row(606)
    assert caplog.text.count("reading from the beginning again, to row 600") == 1
    assert caplog.text.count("is at row 600 again, after") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True, "packing": "best_fit"}, "needs the lengths of all documents"),
        ({"streaming": True, "stride": 3}, r"data\.stride = 3 .* rows neither overlap nor end"),
        ({"streaming": True, "last_row": "drop"}, r"data\.last_row = 'drop' have no meaning"),
        ({"shuffle_buffer_size": 5}, r"shuffle_buffer_size = 5 has no meaning without a stream"),
        ({"streaming": True, "shuffle_buffer_size": 0}, r"shuffle_buffer_size = 0; give"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)  # pyright: ignore[reportArgumentType]
