"""`scripts/generate.py` on a folder that transformers wrote: same text, friendly mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from engine.cli import run_command
from engine.verify.variants import SHAPE, random_model
from scripts.generate import main

TEXT = ["def main(arguments):", "    return [value for value in values if value]", "class Name:"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a small byte-level tokenizer that puts a mark before every text."""
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def save(name: str, path: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    random_model(name, vocab_size=len(tokenizer)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save("llama_3_1", tmp_path_factory.mktemp("model"))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = run_command(main, list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("name", ["llama_3_1", "gemma2"])
def test_greedy_text_equals_that_of_transformers_on_the_same_folder(name, tmp_path, capsys):
    folder = save(name, tmp_path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def ", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = theirs.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    code, text, _ = run(
        capsys, "--model", str(folder), "--prompt", "def ", "--max_new_tokens", "40"
    )
    assert (code, text) == (0, expected + "\n")
    assert text.startswith("def ")


def test_draws_repeat_with_the_seed(folder, capsys):
    settings = ["--temperature", "1.2", "--top_k", "50", "--top_p", "0.95"]

    def draw(seed: str) -> str:
        arguments = ["--model", str(folder), "--prompt", "def ", "--seed", seed, *settings]
        return run(capsys, *arguments)[1]

    assert draw("1") == draw("1")
    assert draw("1") != draw("2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no_such_folder"], "--model no_such_folder is not a folder"),
        (["--temperature", "-1"], "temperature = -1.0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["--top_p", "2"], "top_p = 2.0"),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_line(folder, capsys, arguments, message):
    code, text, error = run(capsys, "--model", str(folder), "--prompt", "x", *arguments)
    assert (code, text) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so asking for it is right")
def test_asking_for_a_gpu_where_there_is_none_is_refused(folder, capsys):
    code, _, error = run(capsys, "--model", str(folder), "--prompt", "x", "--device", "cuda")
    assert code == 2
    assert "use --device cpu" in error


def test_a_folder_of_another_architecture_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    code, _, error = run(capsys, "--model", str(tmp_path), "--prompt", "x")
    assert code == 2
    assert "model_type = 't5'" in error


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path)
    random_model("llama_3").save_pretrained(tmp_path)
    code, _, error = run(capsys, "--model", str(tmp_path), "--prompt", "x")
    assert code == 2
    assert f"only {SHAPE['vocab_size']}" in error
