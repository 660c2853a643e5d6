"""Each named template against `apply_chat_template`, and what is trained of it against its text."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.data.chat_template import ChatTemplate
from engine.data.chat_templates import template_names, template_text
from engine.data.conversation import read_conversation
from engine.data.formats import Document, Recipe
from engine.data.formats.chat import encode
from engine.data.readers import BadRecords, Place
from engine.data.tokenizer import Tokenizer

Chat = dict[str, Any]

END = "<|end_of_text|>"
ENDS = {
    **{name: ("", "<|im_end|>") for name in ("chatml", "qwen2.5", "phi4")},
    **{name: ("", "<|eot_id|>") for name in ("llama3", "llama3.1")},
    **{name: ("", END) for name in ("alpaca", "deepseek", "olmo2", "tulu", "zephyr")},
    "command-r": ("", "<|END_OF_TURN_TOKEN|>"),
    "gemma": ("", "<end_of_turn>"),
    "llama2": (" ", f" {END}"),
    "mistral": (" ", END),
    "phi3": ("", "<|end|>"),
    "vicuna": (" ", END),
}
"""What the assistant writes before and behind its text. A blank before it is the assistant's: the
prompt ends without one, and the blank is part of the first word's token."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"name": "weather", "arguments": {"city": "Zürich"}}
CALLED = {
    "llama3.1": '{"name": "weather", "parameters": {"city": "Zürich"}}',
    "other": '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>',
}


def turns(*texts: str) -> list[Chat]:
    """A user's and an assistant's texts by turns; a first one in brackets is the system's."""
    roles = ["user", "assistant"] * len(texts)
    roles = ["system", *roles] if texts[0].startswith("[") else roles
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


CHATS: dict[str, Chat] = {
    "system": {"messages": turns("[Be brief.]", "Hi", "Hello, you.", "More!", "No more.")},
    "tool": {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": '{"rain": "a bit"}'},
            {"role": "assistant", "content": "A bit."},
            *turns("And now?", "The same."),
        ],
        "tools": TOOLS,
    },
    "empty": {"messages": turns("", "", "Well?", "")},
    "unicode": {"messages": turns("日本 ﷽", "naïve été 👩‍👩‍👧 שלום ½", "ok 👍🏽", "👍🏽")},
}


def as_read(chat: Chat) -> Chat:
    conversation = read_conversation(chat, "text")
    return {"conversation": conversation.messages, "tools": conversation.tools}


def encode_chat(chat: Chat, tokenizer: Tokenizer, template: str, **settings: Any) -> Document:
    marks = {"format": "chat", "text_field": "text", "add_bos": True, "add_eos": True}
    recipe = Recipe(**marks, on_bad_record="raise", chat_template=template, **settings)
    records = [(Place(name="a chat"), chat)]
    (document,) = encode(records, tokenizer=tokenizer, recipe=recipe, bad=BadRecords("raise"))
    return document


def trained_text(document: Document, tokenizer: Tokenizer) -> str:
    assert document.is_trained is not None and len(document.is_trained) == len(document.ids)
    ids = [one for one, trained in zip(document.ids, document.is_trained, strict=True) if trained]
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def original(chat_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(chat_folder))


def test_there_are_at_least_ten_templates_and_each_says_its_source():
    assert set(template_names()) == set(ENDS) and len(ENDS) >= 10
    for name in template_names():
        assert re.match(r"\{#- .{5,300}?(https://\S+|axolotl).*? -#\}", template_text(name), re.S)
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    files = project["tool"]["setuptools"]["package-data"]["engine.data.chat_templates"]
    assert files == ["*.jinja"], "an installed copy has them too"


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ENDS)
def test_trained_are_the_assistants_texts_with_the_ends_of_their_turns(
    name: str, chat: str, chat_tokenizer: Tokenizer
):
    document = encode_chat(CHATS[chat], chat_tokenizer, template_text(name))
    said = [m for m in CHATS[chat]["messages"] if m["role"] == "assistant"]
    called = CALLED.get(name, CALLED["other"])
    texts = [called if "tool_calls" in message else message["content"] for message in said]
    lead, end = ENDS[name]
    expected = "".join(lead + text + end for text in texts)
    assert trained_text(document, chat_tokenizer) == expected


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ENDS)
def test_ids_and_mask_are_those_of_apply_chat_template(
    name: str, chat: str, chat_tokenizer: Tokenizer, original: Any
):
    text = template_text(name)
    document = encode_chat(CHATS[chat], chat_tokenizer, text)
    expected = original.apply_chat_template(
        **as_read(CHATS[chat]),
        chat_template=text,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert document.ids == expected["input_ids"]
    assert document.is_trained is not None
    assert document.is_trained.tolist() == [bool(one) for one in expected["assistant_masks"]]


BORDERS: dict[str, Chat] = {
    "blanks": {"messages": turns("Hi ", "\n\n b \n", " a", "  c")},
    "the same text everywhere": {"messages": turns("[a]", "a", "a", "a", "a")},
}


@pytest.mark.parametrize("chat", [*CHATS, *BORDERS])
@pytest.mark.parametrize("name", ENDS)
def test_turns_are_found_as_well_where_a_template_does_not_mark_them(
    name: str, chat: str, chat_tokenizer: Tokenizer
):
    conversation = read_conversation((CHATS | BORDERS)[chat], "text")
    text = template_text(name)
    unmarked = re.sub(r"\{%-? ?(end)?generation ?-?%\}", "{#- -#}", text)
    assert "generation -%}" in text and "generation -%}" not in unmarked
    found = ChatTemplate(unmarked, chat_tokenizer).render(conversation)
    assert found == ChatTemplate(text, chat_tokenizer).render(conversation)


@pytest.mark.parametrize("name", ["chatml", "llama3", "tulu"])
def test_golden_texts(name: str, chat_tokenizer: Tokenizer):
    expected = {
        "chatml": "<|im_start|>system\n[S]<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n",
        "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n[S]<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>",
        "tulu": f"<|system|>\n[S]\n<|user|>\nHi\n<|assistant|>\nHello{END}",
    }
    chat = {"messages": turns("[S]", "Hi", "Hello")}
    document = encode_chat(chat, chat_tokenizer, template_text(name))
    assert chat_tokenizer.decode(document.ids, skip_special_tokens=False) == expected[name]
