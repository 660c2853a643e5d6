import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.data import readers, token_file, token_writer
from engine.data.formats import load_format, source_digest
from engine.data.token_file import TokenFile
from engine.data.tokenizer import Tokenizer, load_tokenizer

OpenFile = Callable[..., TokenFile]


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, True), (False, True), (False, False)])
def test_documents_stand_in_order_with_their_marks(
    open_file: OpenFile, jsonl: Path, tokenizer: Tokenizer, add_bos: bool, add_eos: bool
):
    file = open_file(add_bos=add_bos, add_eos=add_eos)
    bos, eos = [tokenizer.bos_id] * add_bos, [tokenizer.eos_id] * add_eos
    expected = [bos + tokenizer.encode(text) + eos for text in texts_of(jsonl)]
    found = [
        file.tokens[start:stop].tolist()
        for start, stop in zip(file.offsets[:-1], file.offsets[1:], strict=True)
    ]
    assert found == expected
    assert file.lengths().tolist() == [len(ids) for ids in expected]
    assert file.tokens.dtype == np.uint16


def test_ids_above_16_bits_take_32(
    open_file: OpenFile, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    narrow = open_file()
    monkeypatch.setattr(tokenizer, "fingerprint", "a larger vocabulary")
    monkeypatch.setattr(tokenizer, "vocab_size", (1 << 16) + 1)
    wide = open_file()
    assert wide.tokens.dtype == np.uint32
    assert wide.tokens.tolist() == narrow.tokens.tolist()


def test_any_number_of_processes_writes_the_same_file(
    open_file: OpenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(readers, "PIECE_BYTES", 4000)
    digests = {
        open_file(root=tmp_path / str(number), num_processes=number).digest for number in (1, 2, 5)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_piece_larger_than_memory_is_written_in_parts(
    open_file: OpenFile,
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
):
    whole = open_file(root=tmp_path / "whole")
    lines = jsonl.read_text().splitlines()
    (tmp_path / "packed").mkdir()
    for start in (0, 100, 200):
        packed = gzip.compress("\n".join([*lines[start : start + 100], "{"]).encode())
        (tmp_path / "packed" / f"{start:03}.jsonl.gz").write_bytes(packed)
    monkeypatch.setattr(token_writer, "BATCH_CHARACTERS", 2000)
    largest: list[int] = []
    append = token_writer._append_mask

    def append_mask(path: Path, encoded: token_writer._Encoded, num_tokens: int) -> None:
        largest.append(encoded.lengths.size)
        append(path, encoded, num_tokens)

    monkeypatch.setattr(token_writer, "_append_mask", append_mask)
    files = sorted((tmp_path / "packed").iterdir())
    file = open_file(*files, num_processes=num_processes, on_bad_record="skip")
    assert file.digest == whole.digest
    assert len(largest) > 30 and max(largest) < 30, "a few documents at a time"
    assert file.facts.num_bad == 3
    assert [text.partition(":")[0] for text in file.facts.bad_examples] == [
        f"{path}, line 101" for path in files
    ]
    assert file.folder is not None
    left = {path.name for path in file.folder.iterdir()}
    assert left == {"tokens.bin", "offsets.npy", "facts.json", "complete.json"}


def test_a_second_start_tokenises_nothing(open_file: OpenFile, monkeypatch: pytest.MonkeyPatch):
    first = open_file()
    assert first.is_new and first.facts.seconds > 0
    monkeypatch.setattr(token_file, "write_tokens", None)
    again = open_file()
    assert again.digest == first.digest
    assert not again.is_new and again.facts == first.facts


def test_one_byte_of_data_or_tokenizer_and_each_setting_changes_the_key(
    open_file: OpenFile, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
):
    def num_files() -> int:
        return sum(path.is_dir() for path in (tmp_path / "tokens").iterdir())

    open_file()
    path = tmp_path / "moved.jsonl"
    path.write_text(jsonl.read_text())
    open_file(path)
    assert num_files() == 1, "the same bytes elsewhere are the same data"
    path.write_text(jsonl.read_text().replace("w7x3", "w7x4", 1))
    open_file(path)
    assert num_files() == 2
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").open("a").write("\n")
    open_file(tokenizer=load_tokenizer(str(tmp_path / "tokenizer"), ""))
    assert num_files() == 3
    path.write_text(jsonl.read_text().replace('"text"', '"body"'))
    open_file(path, text_field="body")
    for number, change in enumerate(
        ({"add_bos": False}, {"add_eos": False}, {"on_bad_record": "skip"}), start=5
    ):
        open_file(**change)
        assert num_files() == number


def test_empty_texts_are_left_out_and_counted(
    open_file: OpenFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    path = tmp_path / "some_empty.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "", "b", "")))
    assert len(open_file(path).lengths()) == 2
    assert "2 documents, 6 tokens, 2 empty texts left out, 0 bad records skipped" in caplog.text


def test_a_source_without_text_is_refused_and_leaves_no_cache(open_file: OpenFile, tmp_path: Path):
    path = tmp_path / "empty.jsonl"
    for content in ("", "\n\n", '{"text": ""}\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"empty\.jsonl is empty: no document has text"):
            open_file(path)
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_missing_or_wrong_field_is_named_with_file_and_line_or_skipped_and_counted(
    open_file: OpenFile,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
):
    caplog.set_level("INFO")
    monkeypatch.setattr(readers, "PIECE_BYTES", 20)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good one"}\n{"body": "no text here"}\n{"text": 5}\n{"text": "b"}\n')
    message = r"bad\.jsonl, line 2: no field 'text' \(data\.text_field\), only \['body'\]"
    with pytest.raises(ValueError, match=message):
        open_file(path, num_processes=num_processes)
    file = open_file(path, num_processes=num_processes, on_bad_record="skip")
    assert len(file.lengths()) == 2
    open_file(path, on_bad_record="skip")
    assert caplog.text.count("line 3: field 'text' holds int, not text") == 2, "said at each start"


def test_an_unknown_format_lists_those_present():
    with pytest.raises(ValueError, match=r"data\.format = 'chatt' is not one of .*text"):
        load_format("chatt")


def test_a_format_of_ones_own_is_named_by_its_dotted_path_and_an_edit_tokenises_anew(
    open_file: OpenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own").mkdir()
    module = tmp_path / "own" / "shout.py"
    source = "from engine.data.formats import text\ndef encode(records, **rest):\n"
    module.write_text(source + "    return text.encode(records, **rest)\n")
    plain = open_file(format="own.shout")
    assert plain.digest == open_file().digest
    twice = "    ids = text.encode(records, **rest)\n    return ids + ids\n"
    module.write_text(source + twice)
    os.utime(module, (1, 1))  # so that Python sees the edit of the same second
    sys.modules.pop("own.shout")
    assert len(open_file(format="own.shout").offsets) == 2 * len(plain.offsets) - 1
    with pytest.raises(ValueError, match=r"data\.format = 'own\.quiet' cannot be imported"):
        load_format("own.quiet")


HALF = """
import numpy as np
from engine.data.formats import Document, text
def encode(records, **rest):
    documents = text.encode(records, **rest)
    return [
        document if len(document.ids) < 20 or number % 2 else masked(document.ids)
        for number, document in enumerate(documents)
    ]
def masked(ids):
    return Document(ids, np.array([i % 3 == 0 for i in range(len(ids))]))
"""


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_mask_is_kept_from_the_first_document_that_has_one_and_is_part_of_the_digest(
    open_file: OpenFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_processes: int,
):
    caplog.set_level("INFO")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "masks.py").write_text(HALF)
    for name in ("half", "half.masks"):
        sys.modules.pop(name, None)
    monkeypatch.setattr(readers, "PIECE_BYTES", 4000)
    plain = open_file()
    assert plain.is_trained is None
    file = open_file(format="half.masks", num_processes=num_processes)
    assert file.is_trained is not None and file.is_trained.shape == file.tokens.shape
    assert file.tokens.tolist() == plain.tokens.tolist() and file.digest != plain.digest
    assert file.is_trained[file.offsets[1] : file.offsets[2]].all()
    first_masked = int(np.flatnonzero(~np.asarray(file.is_trained))[0])
    document = int(np.searchsorted(file.offsets, first_masked, side="right")) - 1
    here = slice(*file.offsets[document : document + 2])
    assert file.is_trained[here].tolist() == [i % 3 == 0 for i in range(here.stop - here.start)]
    assert f"{int(file.is_trained.sum()):,} tokens are trained" in caplog.text


def test_an_edit_of_a_module_that_a_format_lists_tokenises_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "parted").mkdir()
    (tmp_path / "parted" / "helper.py").write_text("x = 1\n")
    source = "from parted import helper\nMADE_OF = (helper,)\ndef encode(records, **rest): ...\n"
    (tmp_path / "parted" / "whole.py").write_text(source)
    encode = load_format("parted.whole")
    before = source_digest(encode)
    assert source_digest(encode) == before
    (tmp_path / "parted" / "helper.py").write_text("x = 2\n")
    assert source_digest(encode) != before
