import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer

from engine.data import tokenizer as tokenizer_file
from engine.data.stdlib import SKIPPED_FOLDERS, stdlib_files
from engine.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

SAMPLE = "def add(a, b):\n    '''Sum é 東京 🙂'''\n\treturn a + b\n"


def test_the_builtin_tokenizer_has_4096_tokens_and_two_marks(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == 4096
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    assert tokenizer.bos_id != tokenizer.eos_id
    assert len(tokenizer.encode("def __init__(self):")) < 8, "it has learned this text"


def test_any_bytes_survive_encoding_and_decoding(tokenizer: Tokenizer):
    for text in (SAMPLE, "", "\x00\x7f\r\n  \n", "".join(map(chr, range(32, 1000)))):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([SAMPLE, "x"]) == [
        tokenizer.encode(SAMPLE),
        tokenizer.encode("x"),
    ]


def test_the_builtin_tokenizer_is_trained_once_and_the_same_everywhere(
    tokenizer: Tokenizer, cache_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert load_tokenizer(None, str(tmp_path)).fingerprint == tokenizer.fingerprint
    monkeypatch.setattr(tokenizer_file, "_train_builtin", None)
    assert load_tokenizer("", cache_folder).fingerprint == tokenizer.fingerprint


def test_a_saved_tokenizer_encodes_the_same_in_transformers(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(SAMPLE, add_special_tokens=False)["input_ids"] == tokenizer.encode(SAMPLE)
    assert theirs(SAMPLE)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(SAMPLE)]
    assert theirs.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size


def test_a_folders_tokenizer_is_saved_whole_with_its_chat_template(
    tokenizer: Tokenizer, tmp_path: Path
):
    source, target = tmp_path / "source", tmp_path / "target"
    tokenizer.save(source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (source / "model.safetensors").write_text("not a tokenizer file")
    loaded = load_tokenizer(str(source), "")
    loaded.save(target)
    names = {path.name for path in target.iterdir()}
    assert "chat_template.jinja" in names and "model.safetensors" not in names
    assert load_tokenizer(str(target), "").fingerprint == loaded.fingerprint


def test_marks_come_from_token_names_or_from_ids(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": tokenizer_file.BUILTIN_BOS}}))
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 9, "eos_token_id": [5, 6]}))
    loaded = load_tokenizer(str(tmp_path), "")
    assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, 5)


def test_an_older_vocabulary_format_is_read_through_transformers(
    tokenizer: Tokenizer, tmp_path: Path
):
    tokenizer.save(tmp_path / "new")
    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in model["merges"]))
    mark = tokenizer_file.BUILTIN_EOS
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": mark, "bos_token": mark}
    (old / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": mark}))
    loaded = load_tokenizer(str(old), "")
    assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert loaded.eos_id == tokenizer.eos_id


def test_a_missing_or_broken_tokenizer_folder_is_named_with_the_setting(
    tokenizer: Tokenizer, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"model\.hf_assets_path = '.*gone' is not a folder"):
        load_tokenizer(str(tmp_path / "gone"), "")
    with pytest.raises(ValueError, match=r"model\.hf_assets_path = .* holds no tokenizer"):
        load_tokenizer(str(tmp_path), "")
    assert not has_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    assert has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.hf_assets_path = .* cannot be read"):
        load_tokenizer(str(tmp_path), "")


def test_one_byte_of_a_tokenizer_file_changes_its_fingerprint(tokenizer: Tokenizer, tmp_path: Path):
    shutil.rmtree(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").open("a").write(" ")
    assert load_tokenizer(str(tmp_path), "").fingerprint != tokenizer.fingerprint


def test_the_builtin_corpus_is_real_and_its_splits_are_apart():
    train, validation = stdlib_files("train"), stdlib_files("validation")
    assert train == tuple(sorted(train)) and not set(train) & set(validation)
    assert 5e6 < sum(path.stat().st_size for path in train) < 50e6
    assert 2e5 < sum(path.stat().st_size for path in validation) < 5e6
    parts = {part for path in (*train, *validation) for part in path.parts}
    assert not parts & (SKIPPED_FOLDERS - {"test"}), "installed packages are not our corpus"


def test_tokens_begin_at_their_blank_whatever_the_post_processor_trims(
    tokenizer: Tokenizer, tmp_path: Path
):
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # pyright: ignore
    backend.save(str(tmp_path / "tokenizer.json"))
    trimming = load_tokenizer(str(tmp_path), "")
    text = "return  self été\n\n    日"
    expected = [0, 6, 7, 12, 13, 13, 14, 15, 15, 16, 21, 22, 22, 22]
    for one in (tokenizer, trimming):
        ((ids, begins),) = one.encode_with_begins([text])
        assert ids == one.encode(text) == tokenizer.encode(text)
        assert begins.tolist() == expected
    assert tokenizer.encode_with_begins([""])[0][0] == []


def test_special_tokens_have_the_names_that_templates_use(tokenizer: Tokenizer):
    expected = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    assert tokenizer.special_tokens == expected
    assert tokenizer.added_tokens == set(expected.values())
    assert tokenizer.chat_template == ""
