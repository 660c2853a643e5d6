"""`scripts/prepare_data.py` and `scripts/inspect_data.py`, run on what a user would give them."""

import io
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from engine.cli import run_command
from engine.data import token_file
from engine.data.batch import IGNORED_LABEL
from engine.data.report import label
from engine.data.rows import RowSource, TokenRows
from engine.data.stdlib_chats import stdlib_chats
from engine.data.tokenizer import Tokenizer
from engine.loop import fit
from scripts import inspect_data, prepare_data
from scripts.bench import first_step
from tests.engine.tiny_run import packed_documents, tiny_config, tiny_folder

RowsOf = Callable[..., RowSource]
BAD_LINES = '{"text": "first one"}\n{"body": 1}\n\n{"text": "second, longer one"}\n{"text": "cut'


def cells(text: str, source: str) -> list[list[str]]:
    """The cells of each line of the tables that is about a source, figures without commas."""
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    found = [[cell.strip().replace(",", "") for cell in row] for row in rows]
    return [row[1:] for row in found if row[0] == label(source)]


def trained_labels(rows: RowSource) -> int:
    labels = [rows.row(index).labels_T for index in range(rows.rows_per_epoch)]
    return sum(int((label_T != IGNORED_LABEL).sum()) for label_T in labels)


def test_what_is_prepared_once_is_neither_prepared_nor_tokenised_again_by_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny_folder(tmp_path / "hf")
    options = [
        *packed_documents(tmp_path),
        *("--validation.enable", "--validation.freq=1", "--training.steps=1"),
    ]
    words = [f"--model.hf_assets_path={tmp_path / 'hf'}", f"--data.cache_folder={tmp_path}/cache"]
    written: list[Path] = []
    write = token_file.write_tokens

    def count(target: Path, *args: object) -> None:
        written.append(target)
        write(target, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(token_file, "write_tokens", count)
    assert run_command(prepare_data.main, [*words, *options]) == 0
    first = capsys.readouterr().out
    assert len(written) == 2 and "cached" not in first
    assert run_command(prepare_data.main, [*words, *options]) == 0
    again = capsys.readouterr().out
    assert again.count("cached") == 2
    fit(tiny_config(tmp_path, *options))
    assert len(written) == 2, "each source was tokenised by the first call alone"
    for name in ("train", "validation"):
        source = f"jsonl {tmp_path / name}.jsonl {name}"
        assert cells(first, source)[:2] == cells(again, source)[:2] != []


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": "concat"},
        {"packing": "best_fit", "on_bad_record": "skip"},
        {"packing": "none", "format": "chat", "chat_template": "chatml"},
    ],
    ids=lambda settings: settings["packing"],
)
def test_the_report_equals_a_recount(
    rows_of: RowsOf,
    tokenizer: Tokenizer,
    tmp_path: Path,
    cache_folder: str,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, str],
):
    path = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So. " * 5}]
    texts = ["", *(f"word{n} " * (1 + n % 17) for n in range(60))]
    records = [{"text": text, "messages": turns * (1 + len(text) % 3)} for text in texts]
    lines = [json.dumps(record) for record in records]
    if settings.get("on_bad_record") == "skip":
        lines[7:7] = ["{", '"no object"']
    path.write_text("\n".join(lines))
    options = [f"--data.{key}={value}" for key, value in settings.items()]
    options += [f"--training.dataset_path={path}", f"--data.cache_folder={cache_folder}"]
    prepare_data.main([*options, "--training.dataset=jsonl", "--training.seq_len=300"])
    rows = rows_of("jsonl", path, seq_len=300, **settings)
    documents = [
        int((row.documents_T == number).sum())
        for row in map(rows.row, range(rows.rows_per_epoch))
        for number in range(1, int(row.documents_T.max()) + 1)
    ]
    held, packed, cost = cells(capsys.readouterr().out, f"jsonl {path} train")
    tokens = sum(documents)
    assert held[1:3] == [str(tokens), str(trained_labels(rows))]
    if settings["packing"] != "concat":  # which cuts documents in two
        lengths = np.array(documents)
        figures = [lengths.mean(), np.median(lengths), np.percentile(lengths, 95), lengths.max()]
        assert held == [str(len(lengths)), *held[1:3], *(f"{figure:.0f}" for figure in figures)]
    num_empty = int(settings.get("format") != "chat")
    num_bad = len(lines) - len(records)
    fill = f"{tokens / rows.rows_per_epoch / 300:.4f}"
    assert packed[:5] == [str(rows.rows_per_epoch), fill, str(num_empty), "0", str(num_bad)]
    assert float(cost[0]) >= 0 and cost[1] == "1" and int(cost[2]) > 0


OWN_FORMAT = """
from engine.data.formats import Document, marks

def encode(records, *, tokenizer, recipe, bad):
    bos, eos = marks(tokenizer, recipe)
    found = []
    for place, record in records:
        if "question" not in record:
            bad.report(place, "no question")
            continue
        found.append(Document(bos + tokenizer.encode(record["question"][::-1]) + eos))
    return found
"""


def test_a_format_of_ones_own_is_one_file_and_a_name_from_the_report_to_the_rows(
    rows_of: RowsOf,
    tmp_path: Path,
    cache_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "backwards.py").write_text(OWN_FORMAT)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": "Is it so?"}\n{"answer": "No"}\n{"question": "Why not?"}\n')
    settings = {"format": "mine.backwards", "on_bad_record": "skip"}
    words = [f"--data.{key}={value}" for key, value in settings.items()]
    words += ["--training.dataset=jsonl", f"--training.dataset_path={path}"]
    assert run_command(inspect_data.main, [*words, f"--data.cache_folder={cache_folder}"]) == 0
    shown = capsys.readouterr().out
    assert "?os ti sI" in shown and "asked.jsonl, line 2: no question" in shown
    rows = rows_of("jsonl", path, seq_len=64, **settings)
    num_tokens = int((rows.row(0).documents_T > 0).sum())
    assert cells(shown, f"jsonl {path} train")[0][:2] == ["2", str(num_tokens)]


def test_a_missing_file_and_an_unknown_role_are_named(
    tokenizer: Tokenizer, tmp_path: Path, cache_folder: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "chats.jsonl"
    words = ["--training.dataset=jsonl", f"--training.dataset_path={path}", "--data.format=chat"]
    words += ["--data.chat_template=chatml", f"--data.cache_folder={cache_folder}"]
    assert run_command(prepare_data.main, words) == 2
    assert "chats.jsonl' does not exist; give a file" in capsys.readouterr().err
    path.write_text(json.dumps({"messages": [{"role": "wizard", "content": "Hello"}]}))
    assert run_command(prepare_data.main, words) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 1: " in error and "wizard" in error


def test_random_tokens_need_no_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_folder(tmp_path / "hf")
    words = ["--training.dataset=dummy", f"--model.hf_assets_path={tmp_path / 'hf'}"]
    assert run_command(prepare_data.main, words) == 0
    assert "there is nothing to prepare" in capsys.readouterr().out


def test_the_answers_of_the_builtin_chats_are_marked_as_trained_and_nothing_else(
    tokenizer: Tokenizer, cache_folder: str, capsys: pytest.CaptureFixture[str]
):
    chats = ["--data.format=chat", "--data.chat_template=zephyr", "--data.packing=best_fit"]
    chats += ["--validation.only", "--validation.dataset=python_stdlib_chat"]
    inspect_data.main([*chats, "--rows", "3", f"--data.cache_folder={cache_folder}"])
    shown, _, rest = capsys.readouterr().out.partition("lengths of documents")
    marked = re.findall("«(.*?)»", shown, flags=re.DOTALL)
    records = stdlib_chats("validation", Path(cache_folder)).read_text().splitlines()
    turns = [turn for record in records for turn in json.loads(record)["messages"]]
    end = tokenizer.special_tokens["eos_token"]
    answers = {turn["content"] + end for turn in turns if turn["role"] == "assistant"}
    assert len(marked) > 20 and {passage.rstrip("\n") for passage in marked} <= answers
    assert shown.count("<|assistant|>") == len(marked)
    documents = re.findall(r"-- document \d+: (\d+) tokens, (\d+) trained", shown)
    assert all(0 < int(trained) < int(tokens) for tokens, trained in documents)
    assert len(documents) == len(marked) / 2
    bars = re.findall(r"│ [\d,]+ - [\d,]+ *│ +([\d,]+) │", rest)
    assert sum(int(bar.replace(",", "")) for bar in bars) == len(records)


def test_bad_lines_are_listed_with_file_and_number_behind_the_rows(
    tokenizer: Tokenizer, cache_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD_LINES)
    words = ["--training.dataset=jsonl", f"--training.dataset_path={path}"]
    words += ["--training.seq_len=64", f"--data.cache_folder={cache_folder}"]
    assert run_command(inspect_data.main, words) == 2
    assert "bad.jsonl, line 2: no field 'text'" in capsys.readouterr().err
    assert run_command(inspect_data.main, [*words, "--data.on_bad_record=skip", "--rows=1"]) == 0
    shown = capsys.readouterr().out
    assert f"{tokenizer.special_tokens['bos_token']}«first one" in shown, "a first token is none"
    assert "2 bad records left out" in shown
    assert f"{path}, line 2: no field 'text'" in shown
    assert f"{path}, line 5: not valid JSON" in shown
    assert "-- padding: " in shown
    assert run_command(inspect_data.main, [*words, "--rows=-1"]) == 2


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_shows_trained_tokens_in_green_unless_told_otherwise(
    rows_of: RowsOf, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    no_color: str,
):  # fmt: skip
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "\x1b[2J So."}]
    path.write_text(json.dumps({"messages": turns}))
    rows = rows_of("jsonl", path, format="chat", chat_template="chatml", packing="best_fit")
    monkeypatch.setenv("NO_COLOR", no_color)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    inspect_data.print_row(terminal, rows.row(0), tokenizer)
    shown = terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    green = re.findall(r"\x1b\[32m(.*?)\x1b\[0m", shown, flags=re.DOTALL)
    assert "".join(green).startswith("" if no_color else "␛[2J So.")
    assert ("«␛[2J So." in shown) == bool(no_color)
    assert bool(green) != bool(no_color)
    assert "\x1b[2J" not in shown, "text does not steer the terminal"


def test_the_first_row_of_a_million_documents_costs_little_time_and_memory(
    rows_of: RowsOf, tmp_path: Path
):
    """A twentieth of what `scripts/bench/first_step.py` allows 20 million documents."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "stands for a million documents"}')
    settings = {"seq_len": first_step.SEQ_LEN, "cache_folder": str(tmp_path / "cache")}
    one = rows_of("jsonl", path, **settings)
    assert isinstance(one, TokenRows) and one.file.folder is not None
    num_tokens = first_step.replace_tokens(one.file.folder, 1_000_000, one.vocab_size)
    for packing in first_step.PACKINGS:
        tracemalloc.start()
        started = time.process_time()
        rows = rows_of("jsonl", path, packing=packing, **settings)
        row = rows.row(7 * rows.rows_per_epoch + 5)
        seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert rows.rows_per_epoch > 700_000 and int(row.documents_T.max()) > 0
        assert isinstance(rows, TokenRows) and len(rows.file.tokens) == num_tokens
        assert seconds < 1e6 / 20e6 * first_step.SECONDS_ALLOWED, packing
        assert peak < 1e6 / 20e6 * first_step.GROWTH_ALLOWED_GB * 1e9, packing
