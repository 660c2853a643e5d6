"""scripts/extend_tokenizer.py: old text and old rows stay, new words work in both libraries."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engine.cli import run_command
from engine.data.tokenizer import load_tokenizer
from engine.hf_weights import HfWeights
from engine.loop import fit
from models.registry import load_family
from scripts.extend_tokenizer import main
from scripts.generate import load
from tests.engine.tiny_run import SIZES, rows_of_run, tiny_config

OLD_TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "concatenate  words\n\tand spaces, 12 3.5 <|end|> été",
    "the dog is not the fox <|end|>",
)
WORDS = [f"word{number}" for number in range(98)] + ["cat", "мир"]
ROWS = 300
KEPT = {"skip_special_tokens": False}
TWO_ORDERS = 1e-6  # fp32 logits of two libraries


def tokenizer_folder(folder: Path) -> Path:
    """Write a byte-level BPE of 290 tokens with one control token, as Llama 3's files are."""
    folder.mkdir()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer: Any = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*OLD_TEXTS[::2], "from a quarter past eight until noon"], trainer)
    backend.save(str(folder / "tokenizer.json"))
    end = {"content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"0": {**end, "single_word": False, "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def model_folder(
    folder: Path, *, tied: bool = False, size: str = "5GB", rows: int = ROWS, dtype: str = "float32"
) -> Path:
    """Write a tiny Llama of transformers with that tokenizer and some rows of padding."""
    torch.manual_seed(3)
    tokenizer_folder(folder)
    sizes = replace(SIZES, vocab_size=rows, tie_word_embeddings=tied)
    config = LlamaConfig(**load_family("llama3").config_to_hf(sizes))  # pyright: ignore
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def extend(source: Path, out: Path, *options: str) -> int:
    return run_command(main, [str(source), str(out), *options])


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def shards(folder: Path) -> dict[str, list[str]]:
    return {file.name: sorted(load_file(file)) for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": True, "size": "20KB"}, {"size": "20KB", "dtype": "bfloat16"}],
    ids=["one file", "tied shards", "bf16 shards"],
)
def test_a_hundred_words_change_nothing_else(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = model_folder(tmp_path / "in", **settings), tmp_path / "out"
    (tmp_path / "words.txt").write_text("\n".join([*WORDS, "", "the", f" {WORDS[0]}"]))
    read: list[str] = []
    whole = HfWeights.read
    monkeypatch.setattr(HfWeights, "read", lambda s, n, *a: read.append(n) or whole(s, n, *a))
    options = ("--tokens", str(tmp_path / "words.txt"), "--pad_to_multiple_of", "64")
    assert extend(source, out, *options) == 0

    before, after = load_tokenizer(str(source), ""), load_tokenizer(str(out), "")
    assert [after.encode(text) for text in OLD_TEXTS] == [before.encode(t) for t in OLD_TEXTS]
    assert [after.encode(word) for word in WORDS] == [[n] for n in range(290, 390)]
    theirs = AutoTokenizer.from_pretrained(out)
    for text in (*OLD_TEXTS, "a word7 in мир, concatenated <|end|>"):
        assert theirs.encode(text, add_special_tokens=False) == after.encode(text)
        assert theirs.decode(after.encode(text)) == after.decode(after.encode(text), **KEPT) == text

    old, new = tensors(source), tensors(out)
    grown = {"model.embed_tokens.weight"} | ({*old} & {"lm_head.weight"})
    assert set(read) == grown and len(read) == len(grown), "the others are copied as bytes"
    assert shards(out) == shards(source) and (len(shards(out)) > 1) == ("size" in settings)
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype
        if name not in grown:
            assert torch.equal(tensor, old[name])
            continue
        assert len(tensor) == 448 and torch.equal(tensor[:290], old[name][:290])
        for number, word in enumerate(WORDS):
            mean = old[name][before.encode(word)].double().mean(dim=0)
            assert torch.equal(tensor[290 + number], mean.to(tensor.dtype))
        assert torch.equal(tensor[447], old[name][:290].double().mean(dim=0).to(tensor.dtype))
    check_index(out, new)


def check_index(folder: Path, stored: dict[str, Tensor]) -> None:
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(shards(folder)) > 1)
    if index.exists():
        metadata = json.loads(index.read_text())["metadata"]
        assert metadata["total_size"] == sum(tensor.nbytes for tensor in stored.values())
        assert metadata["total_parameters"] == sum(t.numel() for t in stored.values())


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_extended_model_scores_old_text_as_before_in_both_libraries(
    tmp_path: Path, tied: bool
) -> None:
    source, out = model_folder(tmp_path / "in", tied=tied), tmp_path / "out"
    assert extend(source, out, "--tokens", *WORDS) == 0
    ours = load(out, device=torch.device("cpu"), dtype="auto")
    theirs: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    before: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    assert theirs.config.vocab_size == ours.model.config.vocab_size == 390
    assert theirs.config.tie_word_embeddings is tied
    ids = torch.tensor([ours.tokenizer.encode(OLD_TEXTS[0])])
    logits = theirs(ids).logits
    torch.testing.assert_close(logits[..., :290], before(ids).logits[..., :290], rtol=0, atol=1e-6)
    positions_BT = torch.arange(ids.shape[1])[None]
    found = ours.model(ids, positions_BT=positions_BT)
    torch.testing.assert_close(found, logits, rtol=0, atol=10 * TWO_ORDERS)


def test_a_run_trains_the_new_rows(tmp_path: Path) -> None:
    assert extend(model_folder(tmp_path / "in"), tmp_path / "hf", "--tokens", *WORDS) == 0
    texts = [" ".join(WORDS[n : n + 9]) for n in range(90)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    options = (
        *("--training.dataset=jsonl", f"--training.dataset_path={tmp_path / 'train.jsonl'}"),
        *("--data.num_processes=1", "--training.steps=2", "--metrics.log_freq=1"),
        *("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.last_save_in_hf"),
    )
    fit(tiny_config(tmp_path, *options))
    assert len(rows_of_run(tmp_path)) == 2
    name = "model.embed_tokens.weight"
    old, new = tensors(tmp_path / "hf")[name], tensors(tmp_path / "run" / "hf")[name]
    assert (old[290:390] != new[290:390]).any()
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    assert exported.encode("word97", add_special_tokens=False) == [387]


def test_control_tokens_begin_as_the_mean_of_all_rows_and_decoding_can_leave_them_out(
    tmp_path: Path,
) -> None:
    source, out = model_folder(tmp_path / "in"), tmp_path / "out"
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert extend(source, out, "--tokens", "<|tool|>", "<|result|>", "--special") == 0
    ours, theirs = load_tokenizer(str(out), ""), AutoTokenizer.from_pretrained(out)
    text = "dog<|tool|>fox<|result|>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert {290, 291} < set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == "dogfox"
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == "dogfox"
    assert {"<|tool|>", "<|result|>", "<|end|>"} <= set(theirs.all_special_tokens)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = tensors(source)[name], tensors(out)[name]
        assert len(new) == len(old) == ROWS, "the padding has room for two"
        mean = old[:290].double().mean(dim=0).float()
        assert torch.equal(new[290:292], mean.expand(2, -1))
        assert torch.equal(new[292:], old[292:])


def test_a_word_inside_a_longer_one_is_left_alone_unless_asked_for(tmp_path: Path) -> None:
    source = tokenizer_folder(tmp_path / "in")
    assert extend(source, tmp_path / "whole", "--tokens", "cat") == 0
    assert extend(source, tmp_path / "inside", "--tokens", "cat", "--inside_words") == 0
    old = load_tokenizer(str(source), "").encode("concatenate")
    assert load_tokenizer(str(tmp_path / "whole"), "").encode("concatenate") == old
    assert 290 in load_tokenizer(str(tmp_path / "whole"), "").encode("a cat.")
    assert 290 in load_tokenizer(str(tmp_path / "inside"), "").encode("concatenate")


def test_without_weights_tokenizer_and_configuration_alone_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model_folder(tmp_path / "in", rows=290)
    (source / "model.safetensors").unlink()
    (source / "original").mkdir()
    assert extend(source, tmp_path / "out", "--tokens", "cat", "the", "cat") == 0
    printed = capsys.readouterr().out
    for part in ("1 new tokens, ids 290", "'the'", "290 -> 291", "no weights", "original"):
        assert part in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 291
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in source.iterdir() if p.name != "original"
    }


@pytest.mark.parametrize(
    ("break_", "options", "message"),
    [
        (lambda f: f.with_name("out").mkdir(), (), "out exists already"),
        (lambda f: shutil.rmtree(f), (), "in is not a folder"),
        (lambda f: (f / "tokenizer.json").unlink(), (), "no tokenizer.json; transformers writes"),
        (lambda f: None, ("--tokens", "the", "q", "the"), "nothing to add to .*: they are tokens"),
        (lambda f: None, ("--tokens", " "), "nothing to add to .*: the list is empty"),
        (lambda f: None, ("--tokens", "cat", "Zürich"), "would decode 'Zürich' as 'Z.rich'"),
        (lambda f: None, ("--pad_to_multiple_of", "0"), "--pad_to_multiple_of 0: give at least 1"),
        (lambda f: set_rows(f, 300), (), r"has 290 rows, but .* vocab_size = 300"),
        (lambda f: set_rows(f, 280), (), r"vocab_size = 280, but the tokenizer .* 290 tokens"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            (),
            r"as pytorch_model\.bin only; save the model as safetensors",
        ),
    ],
)
def test_what_cannot_be_extended_is_named_and_leaves_nothing(
    tmp_path: Path,
    break_: Any,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = model_folder(tmp_path / "in", rows=290)
    break_(source)
    capsys.readouterr()  # transformers' progress
    words = () if "--tokens" in options else ("--tokens", "cat")
    assert extend(source, tmp_path / "out", *words, *options) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"in", "out"} and ("out" in left) == ("exists" in message)


def set_rows(folder: Path, rows: int) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": rows}))
