"""Chats and completions from their files to the labels of rows."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine.data import readers
from engine.data.batch import IGNORED_LABEL
from engine.data.chat_templates import template_text
from engine.data.config import DataConfig
from engine.data.conversation import read_conversation
from engine.data.formats import Recipe
from engine.data.formats.chat import with_system_prompt
from engine.data.rows import RowSource
from engine.data.tokenizer import Tokenizer, load_tokenizer
from tests.engine.data.test_chat_templates import END, TOOLS, encode_chat, trained_text, turns

RowsOf = Callable[..., RowSource]
Chat = dict[str, Any]

CHATS: list[Chat] = [
    {"messages": turns(f"Question {n}?", f"Answer {n}.", "And?", f"{n} again. " * (n % 4))}
    for n in range(40)
]


def write(path: Path, records: list[Chat]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", CHATS)


@pytest.fixture
def chat_rows(rows_of: RowsOf, chat_tokenizer: Tokenizer) -> RowsOf:
    def chat_rows(path: Path, kind: str = "jsonl", **settings: object) -> RowSource:
        defaults = {"format": "chat", "chat_template": "chatml", "seq_len": 100}
        return rows_of(kind, path, tokenizer=chat_tokenizer, **{**defaults, **settings})

    return chat_rows


def labels_of(rows: RowSource) -> list[list[int]]:
    """The labels of each document of an epoch, in the order of rows."""
    found: list[list[int]] = []
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        for document in range(1, int(row.documents_T.max()) + 1):
            labels = row.labels_T[row.documents_T == document]
            found.append(labels[labels != IGNORED_LABEL].tolist())
    return found


def same(left: RowSource, right: RowSource) -> bool:
    return left.rows_per_epoch == right.rows_per_epoch and all(
        torch.equal(getattr(left.row(i), name), getattr(right.row(i), name))
        for i in range(left.rows_per_epoch)
        for name in ("tokens_T", "labels_T", "documents_T", "positions_T")
    )


def said(chat: Chat, end: str = "<|im_end|>") -> str:
    texts = [turn["content"] for turn in chat["messages"] if turn["role"] == "assistant"]
    return "".join(text + end for text in texts)


@pytest.mark.parametrize("packing", ["none", "concat", "best_fit"])
def test_labels_of_packed_rows_are_the_assistants_tokens_and_no_others(
    chat_rows: RowsOf,
    chats: Path,
    chat_tokenizer: Tokenizer,
    packing: str,
    caplog: pytest.LogCaptureFixture,
):
    rows = chat_rows(chats, packing=packing, shuffle=False, seq_len=160)
    found = [chat_tokenizer.decode(ids, skip_special_tokens=False) for ids in labels_of(rows)]
    expected = [said(chat) for chat in CHATS]
    assert ("chats are cut where a row ends" in caplog.text) == (packing == "concat")
    if packing == "concat":  # a chat may go on in the next row
        assert "".join(found) == "".join(expected)
    else:
        assert sorted(found) == sorted(expected)
    tokens, labels = rows.row(0).tokens_T, rows.row(0).labels_T
    trained = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    trained = trained[trained < len(tokens) - 1]
    assert torch.equal(labels[trained], tokens[trained + 1]), "a label is the next token"


def test_only_the_last_turn_or_every_token_is_trained_if_asked(
    chat_rows: RowsOf, chats: Path, chat_tokenizer: Tokenizer
):
    last = labels_of(chat_rows(chats, packing="none", shuffle=False, train_on="last"))
    texts = [chat_tokenizer.decode(ids, skip_special_tokens=False) for ids in last]
    assert texts == [chat["messages"][-1]["content"] + "<|im_end|>" for chat in CHATS]
    everything = chat_rows(chats, packing="none", shuffle=False, train_on="all")
    for index, labels in enumerate(labels_of(everything)):
        row = everything.row(index)
        assert labels == row.tokens_T[row.documents_T == 1].tolist()[1:]
    folders = Path(str(chats.parent)).rglob("is_trained.bin")
    assert not list(folders), "a file whose tokens are all trained needs no mask"


def test_a_token_across_the_border_of_a_turn_is_the_headers_and_at_the_end_the_answers(
    tokenizer: Tokenizer,
):
    template = "{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}"
    template += "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    template += "{% endif %}{{ ' ok' }}{% endfor %}"
    chat = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "def o"}]
    }
    document = encode_chat(chat, tokenizer, template)
    pieces = [tokenizer.decode([one]) for one in document.ids]
    border = pieces.index(" def")
    assert pieces[border - 1].endswith("t"), "the blank of the header is in the answer's token"
    assert document.is_trained is not None and not document.is_trained[border]
    assert trained_text(document, tokenizer) == " o", "begins within the answer"
    whole = tokenizer.encode("user x okassistant def o ok")
    assert document.ids == whole, "one tokenisation of the whole text"


def test_a_merge_at_either_end_of_a_turn_never_trains_what_begins_outside(tokenizer: Tokenizer):
    answers = ("\n\n    if x:", " def f(self):", "self", "): ", "'", "    return", "\n", "ed")
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    template += "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    merged = 0
    for before in ("x =", "\n", "import", "def ", "\n    ", "self."):
        for answer in answers:
            chat = {"messages": turns(before, answer, "\n    return self", "x")}
            document = encode_chat(chat, tokenizer, template)
            ((ids, begins),) = tokenizer.encode_with_begins(
                [before + answer + "\n    return selfx"]
            )
            start, end = len(before), len(before + answer)
            inside = (begins >= start) & (begins < end) | (begins == begins[-1])
            assert document.ids == ids and document.is_trained is not None
            assert (document.is_trained[begins < start] == 0).all()
            assert document.is_trained.tolist()[:-1] == inside.tolist()[:-1]
            merged += int(start not in begins) + int(end not in begins)
    assert merged > 10, "the fixture has merges across borders"


def test_system_prompts_are_drawn_at_their_rate_by_seed_and_record_number():
    def drawn(seed: int, rate: float = 0.3) -> list[str | None]:
        recipe = Recipe(
            format="chat", text_field="text", add_bos=True, add_eos=True, on_bad_record="raise",
            system_prompts=("A", "B", "C"), system_prompt_rate=rate, seed=seed,
        )  # fmt: skip
        chat = read_conversation(CHATS[0], "text")
        chats = (with_system_prompt(chat, recipe, number) for number in range(10_000))
        firsts = (one.messages[0] for one in chats)
        return [turn["content"] if turn["role"] == "system" else None for turn in firsts]

    found = drawn(1)
    assert abs(10_000 - found.count(None) - 3000) <= 3 * math.sqrt(10_000 * 0.3 * 0.7)
    for prompt in "ABC":
        assert abs(found.count(prompt) - 1000) <= 3 * math.sqrt(10_000 * 0.1 * 0.9)
    assert drawn(1) == found and drawn(2) != found
    assert None not in drawn(1, rate=1.0) and set(drawn(1, rate=0.0)) == {None}


def test_a_drawn_system_prompt_is_the_same_from_every_file_kind_and_cut_and_never_a_second_one(
    chat_rows: RowsOf, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    chat_tokenizer: Tokenizer,
):  # fmt: skip
    settings = {"system_prompts": ["Be brief.", "Be kind."], "system_prompt_rate": 0.5}
    settings |= {"packing": "none", "shuffle": False, "seq_len": 200}
    first = chat_rows(chats, **settings)
    texts = [chat_tokenizer.decode(first.row(i).tokens_T.tolist()) for i in range(40)]
    kinds = [("Be brief." in text, "Be kind." in text) for text in texts]
    assert {(True, False), (False, True), (False, False)} == set(kinds)
    pq.write_table(pa.Table.from_pylist(CHATS), tmp_path / "chats.parquet", row_group_size=7)
    datasets.Dataset.from_list(CHATS).save_to_disk(tmp_path / "saved")
    (tmp_path / "chats.json").write_text(json.dumps(CHATS, indent=1))
    monkeypatch.setattr(readers, "PIECE_BYTES", 400)
    others = [
        chat_rows(
            write(tmp_path / "again.jsonl", [*CHATS[:39], {**CHATS[39], "id": 1}]), **settings
        ),
        chat_rows(tmp_path / "chats.parquet", kind="parquet", **settings),
        chat_rows(tmp_path / "saved", kind="anything", **settings),
        chat_rows(tmp_path / "chats.json", kind="json", **settings),
    ]
    assert all(same(first, other) for other in others)
    assert not same(first, chat_rows(chats, **{**settings, "seed": 8}))
    own = write(tmp_path / "own.jsonl", [{"messages": turns("[Mine]", "Hi", "Hello")}] * 20)
    row = chat_rows(own, **{**settings, "system_prompt_rate": 1.0}).row(0)
    assert "Be " not in chat_tokenizer.decode(row.tokens_T.tolist())


def test_whatever_changes_tokens_or_mask_changes_the_file_and_what_does_not_shares_it(
    chat_rows: RowsOf, chats: Path, tmp_path: Path
):
    template = tmp_path / "own.jinja"
    template.write_text(template_text("chatml"))
    folder = tmp_path / "cache" / "tokens"

    def num_files(**settings: object) -> int:
        chat_rows(chats, cache_folder=str(tmp_path / "cache"), **settings)
        return sum(path.is_dir() for path in folder.iterdir())

    assert num_files() == 1
    assert num_files(chat_template=str(template)) == 1, "the same text under another name"
    assert num_files(seed=8) == 1, "nothing is drawn"
    assert num_files(packing="none") == 1
    template.write_text(template.read_text() + "\n{#- another byte -#}")
    changes = (
        *({"chat_template": str(template)}, {"chat_template": "zephyr"}),
        *({"train_on": "last"}, {"train_on": "all"}, {"system_prompts": ["S"]}),
        *({"system_prompts": ["S"], "seed": 8}, {"system_prompts": ["S", "T"]}),
        {"system_prompts": ["S"], "system_prompt_rate": 0.5},
    )
    for number, change in enumerate(changes, start=2):
        assert num_files(**change) == number, change


def test_the_fingerprint_of_rows_follows_the_mask(chat_rows: RowsOf, chats: Path):
    prints = {chat_rows(chats, train_on=choice).fingerprint for choice in ("assistant", "all")}
    assert len(prints) == 2, "the same tokens, other labels"


def test_bad_chats_are_named_with_file_and_line_or_left_out_and_counted(
    chat_rows: RowsOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    bad = [
        {"messages": []},
        {"text": "no chat"},
        {"messages": turns("only a question")},
        {"messages": [{"role": "elf", "content": "x"}]},
        {"messages": [*turns("Hi", "Ho"), {"role": "system", "content": "late"}]},
    ]
    path = write(tmp_path / "bad.jsonl", [CHATS[0], *bad, CHATS[1]])
    settings = {"chat_template": "gemma", "packing": "none", "shuffle": False}
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: an empty conversation; mend the"):
        chat_rows(path, **settings)
    rows = chat_rows(path, **settings, on_bad_record="skip")
    assert rows.rows_per_epoch == 2
    assert "5 bad records skipped" in caplog.text
    assert "line 6: the chat template fails: Gemma has a system turn only" in caplog.text


def test_chats_without_a_token_to_train_are_left_out_and_counted(
    chat_rows: RowsOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    untrained = [{**turn, "weight": 0} for turn in turns("Hi", "Hello")]
    path = write(tmp_path / "weights.jsonl", [{"messages": untrained}, CHATS[1]])
    rows = chat_rows(path, packing="none")
    assert rows.rows_per_epoch == 1
    assert "tokens are trained, 1 documents without such a token left out" in caplog.text
    with pytest.raises(ValueError, match=r"is empty.*1 without a token to train"):
        chat_rows(write(tmp_path / "none.jsonl", [{"messages": untrained}]))


def test_the_tokenizers_own_template_is_the_default_and_missing_ones_are_told(
    chat_rows: RowsOf, chats: Path, chat_folder: Path, tmp_path: Path, rows_of: RowsOf
):
    missing = r"data\.chat_template is empty, and the tokenizer has no chat template.*chatml"
    with pytest.raises(ValueError, match=missing):
        chat_rows(chats, chat_template="")
    with pytest.raises(ValueError, match=r"data\.chat_template = 'chatlm' is neither a file nor"):
        chat_rows(chats, chat_template="chatlm")
    (tmp_path / "wrong.jinja").write_text("{% for m in messages %}\n{{ m.role }")
    with pytest.raises(ValueError, match=r"data\.chat_template: line 2 is not valid Jinja"):
        chat_rows(chats, chat_template=str(tmp_path / "wrong.jinja"))
    plain = load_tokenizer(str(chat_folder), "")
    plain.save(tmp_path / "own", chat_template=template_text("zephyr"))
    own = load_tokenizer(str(tmp_path / "own"), "")
    assert own.chat_template == template_text("zephyr")
    rows = rows_of("jsonl", chats, tokenizer=own, format="chat", seq_len=100)
    assert same(rows, chat_rows(chats, chat_template="zephyr"))
    config = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    (tmp_path / "own" / "chat_template.jinja").unlink()
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    config["chat_template"] = several
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path / "own"), "").chat_template == "y"


def test_what_a_template_has_no_words_for_is_not_left_out_in_silence(chat_tokenizer: Tokenizer):
    def refusal(template: str, **chat: Any) -> str:
        with pytest.raises(ValueError) as caught:
            encode_chat({"messages": turns("Hi", "Ho"), **chat}, chat_tokenizer, template)
        return str(caught.value)

    deaf = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + m.content }}{% endif %}"
    deaf += "{% endfor %}"
    called = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, *turns("a", "b")]
    assert "'tools', which the chat template does not write" in refusal(deaf, tools=TOOLS)
    assert "'tool_calls', which the chat template does not" in refusal(deaf, messages=called)
    assert "leaves out turn 1, of the role system" in refusal(deaf, messages=turns("[S]", "a", "b"))
    thought = [turns("a")[0], {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    for name in ("chatml", "deepseek"):
        assert "'reasoning_content', which" in refusal(template_text(name), messages=thought)
    assert "does not show where turn 2 begins" in refusal("{{ messages | length }} Hi Ho")


MOVING = """
{%- for m in messages -%}
    {%- if m.role == 'user' -%}
        {{- '[INST]' -}}
        {%- if loop.index0 == messages | map(attribute='role') | list | length - 2 -%}
            {{- ' last:' -}}
        {%- endif -%}
        {{- ' ' + m.content + '[/INST]' -}}
    {%- else -%}
        {{- ' ' + m.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
THINKING = """
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\n' -}}
    {%- if m.role == 'assistant' -%}
        {{- '<think>\n' + m.reasoning_content | default('') + '\n</think>\n' if loop.last -}}
    {%- endif -%}
    {{- m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""


def test_turns_are_found_where_earlier_text_changes_as_a_chat_goes_on(chat_tokenizer: Tokenizer):
    """As in the templates of Mistral (last user turn) and Qwen 3 (thoughts of the last answer)."""
    chat = {"messages": turns("a", "b", "c", "d")}
    document = encode_chat(chat, chat_tokenizer, MOVING)
    assert trained_text(document, chat_tokenizer) == f" b{END} d{END}"
    chat["messages"][3]["reasoning_content"] = "hm"
    document = encode_chat(chat, chat_tokenizer, THINKING)
    expected = "b<|im_end|><think>\nhm\n</think>\nd<|im_end|>"
    assert trained_text(document, chat_tokenizer) == expected


def test_blocks_that_are_not_one_for_each_turn_are_the_authors_word_unless_turns_are_chosen(
    chat_tokenizer: Tokenizer,
):
    template = "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' and loop.last %}"
    template += "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    template += "{% endif %}{% endfor %}"
    chat = {"messages": turns("a", "b", "c", "d")}
    assert trained_text(encode_chat(chat, chat_tokenizer, template), chat_tokenizer) == "d"
    with pytest.raises(ValueError, match=r"marks 1 passages .* for 2 turns"):
        encode_chat(chat, chat_tokenizer, template, train_on="last")


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_completions_without_a_template_are_trained_and_their_prompts_only_if_asked(
    rows_of: RowsOf, tokenizer: Tokenizer, tmp_path: Path, train_on: str
):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "def f(", "completion": "self):\n"}])
    settings = {"format": "prompt_completion", "packing": "none", "train_on": train_on}
    row = rows_of("jsonl", path, **settings).row(0)
    ids = [tokenizer.bos_id, *tokenizer.encode("def f(self):\n"), tokenizer.eos_id]
    assert row.tokens_T.tolist()[: len(ids)] == ids
    labels = row.labels_T[row.labels_T != IGNORED_LABEL].tolist()
    if train_on == "all":
        assert labels == ids[1:]
    else:
        text = tokenizer.decode(labels, skip_special_tokens=False)
        assert text == "self):\n<|end_of_text|>"
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "x", "text": 1}])
    message = r"bad\.jsonl, line 1: two texts are expected, and here are 'prompt' str and 'comp"
    with pytest.raises(ValueError, match=message):
        rows_of("jsonl", bad, **settings)


def test_settings_of_chats_are_refused_where_they_have_no_meaning():
    for name, value in (
        *(("chat_template", "chatml"), ("train_on", "all")),
        *(("system_prompts", ["S"]), ("system_prompt_rate", 0.5)),
    ):
        with pytest.raises(ValueError, match=rf"data\.{name} = .* has no meaning with data\.form"):
            DataConfig(**{name: value})  # pyright: ignore
        DataConfig(**{"format": "chat", name: value})  # pyright: ignore
    with pytest.raises(ValueError, match=r"data\.system_prompt_rate = 1\.5; give a share from"):
        DataConfig(format="chat", system_prompt_rate=1.5)


def test_the_builtin_chats_have_two_splits_and_every_chat_can_be_trained(
    rows_of: RowsOf, tokenizer: Tokenizer
):
    settings = {"format": "chat", "chat_template": "tulu", "packing": "none", "seq_len": 256}
    rows = rows_of("python_stdlib_chat", split="validation", **settings)
    assert rows.rows_per_epoch > 50
    row = rows.row(0)
    assert 0 < int((row.labels_T != IGNORED_LABEL).sum()) < int((row.documents_T == 1).sum())
    assert tokenizer.eos_id in row.labels_T.tolist()
