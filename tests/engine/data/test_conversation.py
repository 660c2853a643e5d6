import json
from typing import Any

import pytest

from engine.data.conversation import read_conversation

Chat = dict[str, Any]

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def messages(record: Chat, field: str = "text") -> list[Chat]:
    return read_conversation(record, field).messages


@pytest.mark.parametrize(
    "record",
    [
        {"messages": HI},
        {"messages": HI, "conversations": None},  # as Arrow tables fill up columns
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": HI},
        {"text": HI},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": HI[:1], "completion": HI[1:]},
        {"instruction": "Hi", "output": "Hello", "input": ""},
        {"messages": [{**turn, "name": None, "tool_calls": None, "from": None} for turn in HI]},
        {"messages": [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]}
                      for t in HI]},
    ],
    ids=lambda record: "+".join(record),
)  # fmt: skip
def test_every_shape_of_a_chat_is_read_alike(record: Chat):
    assert messages(record) == HI


def test_system_prompts_inputs_and_history_of_alpaca_and_sharegpt_become_turns():
    system = {"role": "system", "content": "Be brief"}
    assert messages({"conversations": HI, "system": "Be brief"}) == [system, *HI]
    record = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief"}
    found = messages({**record, "history": [["Hi", "Hello"]]})
    asked = [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]
    assert found == [system, *HI, *asked]
    assert messages({"messages": [{"role": "developer", "content": "Be brief"}, *HI]})[0] == system


def test_calls_of_tools_are_read_alike_from_openai_sharegpt_and_the_older_openai():
    asked = {"role": "user", "content": "?"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answered = {"role": "tool", "content": "2"}
    expected = [asked, called, answered, HI[1]]
    as_text = {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
    openai = [asked, {**called, "content": None, "tool_calls": [as_text]}, answered, HI[1]]
    older = {"role": "assistant", "content": None, "function_call": as_text["function"]}
    sharegpt = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Hello"},
    ]
    for record in (
        {"messages": openai, "tools": [TOOL]},
        {"messages": [asked, older, {**answered, "role": "function"}, HI[1]],
         "functions": [TOOL["function"]]},
        {"conversations": sharegpt, "tools": json.dumps([TOOL["function"]])},
    ):  # fmt: skip
        found = read_conversation(record, "text")
        assert found.messages == expected
        assert found.tools == [TOOL]


def test_fields_without_value_are_left_out_of_calls_and_tools_and_other_fields_are_kept():
    filled = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    tool = {"type": "function", "function": {**TOOL["function"], "description": None}}
    called = {"role": "assistant", "content": "So:", "tool_calls": [filled], "name": "Ann"}
    record = {"messages": [called, {"role": "tool", "content": "2", "tool_call_id": "a"}]}
    found = read_conversation({**record, "tools": [tool]}, "text")
    assert found.messages[0]["tool_calls"] == [CALL] and found.messages[0]["name"] == "Ann"
    assert found.messages[1]["tool_call_id"] == "a"
    assert found.tools == [TOOL]


def test_weights_of_openai_and_prompts_made_of_turns_say_which_turns_are_trained():
    weighted = [{**turn, "weight": 0} for turn in HI]
    assert read_conversation({"messages": [*weighted, *HI]}, "text").is_trained == [False, True]
    assert "weight" not in messages({"messages": weighted})[1]
    record = {"prompt": [*HI, HI[0]], "completion": [HI[1]], "system": "Be brief"}
    assert read_conversation(record, "text").is_trained == [False, True]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "Hi"}, r"no chat: one of the fields 'messages', .*only \['text'\]"),
        ({"messages": []}, "an empty conversation"),
        ({"messages": "Hi"}, "field 'messages' holds str, not a list of turns"),
        ({"messages": HI[:1]}, "no turn of an assistant"),
        ({"messages": [*HI, "x"]}, "turn 3: str where an object is expected"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "turn 1: the role 'narrator'"),
        ({"messages": [{"content": "x"}]}, "turn 1: neither 'role' nor 'from', only"),
        ({"messages": [HI[0], {"role": "assistant"}]}, "turn 2: 'assistant' without content"),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1: content is int, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "turn 1: content has a part of type 'image_url'",
        ),
        ({"messages": [{**HI[1], "weight": 0.5}]}, r"turn 1: weight is 0\.5; give 0 or 1"),
        ({"messages": [{**HI[0], "tool_calls": [CALL]}]}, "turn 1: 'user' calls a tool"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "turn 1: a call is str"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "f"}]}]}, "without the name"),
        (
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            "turn 1: a call: not valid JSON",
        ),
        ({"messages": HI, "tools": "none"}, "tools: not valid JSON"),
        ({"messages": HI, "tools": {"name": "f"}}, "tools are dict, not a list"),
        ({"prompt": "Hi"}, "field 'prompt' without 'completion'"),
        ({"instruction": "x", "output": "y", "history": ["Hi"]}, "history holds 'Hi', not a"),
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_cannot_be_used_is_refused_with_the_reason(record: Chat, reason: str):
    with pytest.raises(ValueError, match=reason):
        read_conversation(record, "text")
