"""A run on chats: its loss is the mean over the assistant's tokens, and its export can chat."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.data.batch import IGNORED_LABEL
from engine.data.chat_templates import template_text
from engine.data.sources import open_rows
from engine.data.tokenizer import load_tokenizer
from engine.loop import fit
from scripts.generate import main
from tests.engine.tiny_run import rows_of_run, tiny_config, tiny_folder

REORDERED_SUM = 1e-5  # the same fp32 arithmetic in another order
CONTROL = ("<|im_start|>", "<|im_end|>", "<|end|>")
CHATS = (
    *("--data.format=chat", "--data.chat_template=chatml", "--data.packing=best_fit"),
    "--training.seq_len=64",
)
NUM_ROWS = 4


def chat_folder(folder: Path) -> None:
    """Write a tiny model whose tokenizer knows 40 words and ChatML, and 30 chats."""
    words = ["?", "user", "assistant", *(f"word{number}" for number in range(40))]
    tiny_folder(folder / "hf")
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    backend.add_special_tokens(list(CONTROL))
    backend.save(str(folder / "hf" / "tokenizer.json"))
    marks = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(marks))
    with open(folder / "chats.jsonl", "w") as out:
        for n in range(30):
            texts = [" ".join(f"word{(n * k + k) % 40}" for k in range(1 + n % 4)) for _ in "uaua"]
            roles = ("human", "gpt") * 2
            turns = [{"from": r, "value": t} for r, t in zip(roles, texts, strict=True)]
            out.write(json.dumps({"conversations": turns}) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat_run")
    chat_folder(folder)
    options = (
        *("--training.dataset=jsonl", f"--training.dataset_path={folder / 'chats.jsonl'}"),
        *(*CHATS, "--training.steps=1", "--optimizer.lr=0.0"),
        *(f"--training.global_batch_size={NUM_ROWS}", "--data.num_processes=1"),
        *("--checkpoint.enable", "--checkpoint.last_save_in_hf"),
    )
    fit(tiny_config(folder, *options))
    return folder


def test_the_loss_is_the_mean_over_the_assistants_tokens_of_chats_that_see_only_themselves(
    run: Path,
):
    config = tiny_config(run, *CHATS)
    rows = open_rows(
        *("jsonl", str(run / "chats.jsonl")),
        split="train",
        seq_len=config.training.seq_len,
        seed=config.debug.effective_seed,
        tokenizer=load_tokenizer(str(run / "hf"), ""),
        config=config.data,
        shuffle=True,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(run / "run" / "hf").eval()
    total, count, num_documents = 0.0, 0, 0
    for index in range(NUM_ROWS):
        row = rows.row(index)
        for document in range(1, int(row.documents_T.max()) + 1):
            here = row.documents_T == document
            logits = model(row.tokens_T[here][None]).logits[0].float()
            labels = row.labels_T[here]
            total += float(F.cross_entropy(logits, labels, reduction="sum").detach())
            count += int((labels != IGNORED_LABEL).sum())
            num_documents += 1
    assert num_documents > NUM_ROWS, "rows hold several chats"
    assert rows_of_run(run)[0]["loss"] == pytest.approx(total / count, rel=REORDERED_SUM)


def test_the_export_holds_the_template_and_stops_at_the_end_of_a_turn(run: Path):
    hf = run / "run" / "hf"
    original = AutoTokenizer.from_pretrained(hf)
    assert original.chat_template == template_text("chatml")
    end = original.convert_tokens_to_ids("<|im_end|>")
    stops = json.loads((hf / "generation_config.json").read_text())["eos_token_id"]
    assert end in (stops if isinstance(stops, list) else [stops])
    prompt = original.apply_chat_template(
        [{"role": "user", "content": "word1"}], add_generation_prompt=True, return_dict=False
    )
    assert original.decode(prompt).split()[-1] == "assistant"


def test_a_question_is_put_in_the_models_chat_template(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given: list[list[int]] = []

    def generate(model: object, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        given.extend(prompts)
        assert original.convert_tokens_to_ids("<|im_end|>") in settings["eos_token_ids"]
        return [[original.convert_tokens_to_ids("word7")]]

    monkeypatch.setattr("scripts.generate.generate", generate)
    hf = run / "run" / "hf"
    original = AutoTokenizer.from_pretrained(hf)
    main(["--model", str(hf), "--chat", "--prompt", "word1 word2", "--device", "cpu"])
    assert capsys.readouterr().out.strip() == "word7", "the answer alone"
    expected = original.apply_chat_template(
        [{"role": "user", "content": "word1 word2"}], add_generation_prompt=True, return_dict=False
    )
    assert given == [expected]
    (hf / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"--chat, but the model's folder has no chat template"):
        main(["--model", str(hf), "--chat", "--prompt", "x", "--device", "cpu"])


def test_fine_tuning_leaves_what_is_frozen_as_it_was_and_says_how_to_ask_it(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    shutil.copytree(run / "run" / "hf", tmp_path / "hf")
    options = (
        *("--training.dataset=jsonl", f"--training.dataset_path={run / 'chats.jsonl'}", *CHATS),
        *("--training.steps=2", "--optimizer.lr=0.01", "--lr_scheduler.warmup_steps=0"),
        *("--data.num_processes=1", "--checkpoint.enable", "--checkpoint.last_save_in_hf"),
        *("--checkpoint.initial_load_in_hf", "--checkpoint.export_dtype=float32"),
        *("--model.freeze", "model.embed_tokens", "regex:.*mlp.*"),
    )
    fit(tiny_config(tmp_path, *options))
    assert "hf --chat --prompt" in capfd.readouterr().out
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", tmp_path / "run/hf")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        is_frozen = name.startswith("model.embed_tokens") or ".mlp." in name
        assert torch.equal(tensor, after[name]) == is_frozen, name
