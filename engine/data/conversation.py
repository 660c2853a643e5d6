"""Chat records of every known shape as one: the messages that the templates of transformers read.

A record that is none of the shapes, or a broken one, is a ValueError with the reason; where it
stands is the caller's to say. Rendering and tokenising are left to `chat_template.py` and
`formats/chat.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from engine.data.readers import Record

Message = dict[str, Any]

TURNS = ("messages", "conversations")
PAIRS = {"prompt": "completion", "instruction": "output"}
CALL = "a call"
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
"""Words for who speaks, in OpenAI's records and in ShareGPT's."""

OWN_KEYS = frozenset({"role", "from", "content", "value", "weight", "tool_calls", "function_call"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns with the roles system, user, assistant and tool, and the tools they may call."""

    messages: list[Message]
    tools: list[Any] | None

    is_trained: list[bool]
    """For each assistant turn, in order, whether the record itself wants it trained."""


def read_conversation(record: Record, turns_field: str) -> Conversation:
    """Return the conversation of a record, whose shape is told by its fields.

    Turns stand in `messages`, `conversations` or `turns_field`, each with `role` and `content`
    (OpenAI, https://platform.openai.com/docs/api-reference/fine-tuning/chat-input) or with `from`
    and `value` (ShareGPT). A `prompt` with a `completion`, or an `instruction` with an `output`
    (Alpaca; `input`, `system` and `history` beside them), is a user's turn and its answer; prompt
    and completion may be lists of turns, of which the completion's are trained.
    """
    turns, num_untrained = _turns(record, turns_field)
    if not turns:
        raise ValueError("an empty conversation")
    messages: list[Message] = []
    is_trained: list[bool] = []
    for number, turn in enumerate(turns, start=1):
        try:
            message, weight = _message(turn)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from error
        messages.append(message)
        if message["role"] == "assistant":
            is_trained.append(weight and number > num_untrained)
    if not is_trained:
        raise ValueError("no turn of an assistant, so there is nothing to train")
    return Conversation(messages=messages, tools=_tools(record), is_trained=is_trained)


def _turns(record: Record, turns_field: str) -> tuple[Sequence[Any], int]:
    """Return the turns as the record has them, and how many come before those to be trained."""
    for name in (turns_field, *TURNS):
        turns = record.get(name)
        if isinstance(turns, list):
            return [*_system(record), *turns], 0
        if name in TURNS and turns is not None:
            raise ValueError(f"field {name!r} holds {type(turns).__name__}, not a list of turns")
    for asked, answered in PAIRS.items():
        if record.get(asked) is None:
            continue
        if record.get(answered) is None:
            raise ValueError(f"field {asked!r} without {answered!r}")
        prompt, answer = record[asked], record[answered]
        if isinstance(prompt, list) and isinstance(answer, list):
            prompt = [*_system(record), *prompt]
            return [*prompt, *answer], len(prompt)
        before = [*_system(record), *_history(record)]
        asks = "\n".join(_text(part) for part in (prompt, record.get("input")) if part)
        answers = {"role": "assistant", "content": answer}
        return [*before, {"role": "user", "content": asks}, answers], 0
    raise ValueError(
        f"no chat: one of the fields {', '.join(map(repr, (*TURNS, *PAIRS)))} is expected, "
        f"there are only {list(record)}"
    )


def _system(record: Record) -> list[Message]:
    text = record.get("system")
    return [{"role": "system", "content": text}] if text else []


def _history(record: Record) -> list[Message]:
    turns: list[Message] = []
    for pair in cast("Sequence[Any]", record.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"history holds {pair!r:.80}, not a question and its answer")
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    return turns


def _message(turn: object) -> tuple[Message, bool]:
    """Return a turn as a message, and whether its weight is above 0."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{type(turn).__name__} where an object is expected")
    word = turn.get("role") or turn.get("from")
    if word is None:
        raise ValueError(f"neither 'role' nor 'from', only {list(turn)}")
    role = ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        raise ValueError(f"the role {word!r} is none of {', '.join(ROLES)}")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls") or ()
    if turn.get("function_call"):
        calls = [turn["function_call"]]
    if role == CALL:
        role, calls, content = "assistant", _parsed(content, "a call"), None
        calls = calls if isinstance(calls, list) else [calls]
    if content is None and not calls:
        raise ValueError(f"{word!r} without content")
    kept = {key: value for key, value in turn.items() if key not in OWN_KEYS and value is not None}
    message = {"role": role, "content": "" if content is None else _text(content), **kept}
    if calls:
        if role != "assistant":
            raise ValueError(f"{word!r} calls a tool, which only an assistant can")
        message["tool_calls"] = [_call(call) for call in calls]
    if (weight := turn.get("weight")) not in (None, 0, 1):
        raise ValueError(f"weight is {weight!r}; give 0 or 1")
    return message, weight != 0


def _text(content: object) -> str:
    """Return content as text: what is given as a list of parts is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content is {type(content).__name__}, not text")
    texts: list[str] = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if _is_text(part) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"content has a part of type {kind!r}, and only text can be trained")
        texts.append(text)
    return "".join(texts)


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text")


def _call(call: object) -> Message:
    """Return a call as `{"type": "function", "function": {"name", "arguments"}}`.

    OpenAI's records hold the arguments as JSON text. Templates expect the object, and would write
    the text as a quoted string.
    """
    if not isinstance(call, Mapping):
        raise ValueError(f"a call is {type(call).__name__}, not an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"a call without the name of its function: {call}")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else _parsed(arguments, "arguments of a call")
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    called = {"name": function["name"], "arguments": _without_none(arguments)}
    return {**kept, "type": "function", "function": called}


def _tools(record: Record) -> list[Any] | None:
    """Return the declared tools, each as `{"type": "function", "function": {...}}`."""
    tools = record.get("tools") or record.get("functions")
    if not tools:
        return None
    tools = _parsed(tools, "tools")
    if not isinstance(tools, list):
        raise ValueError(f"tools are {type(tools).__name__}, not a list")
    found = [_without_none(tool) for tool in tools]
    wrap = {"type": "function"}
    return [
        {**wrap, "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        for tool in found
    ] or None


def _parsed(value: object, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{what}: not valid JSON ({error}): {value[:80]!r}") from error


def _without_none(value: Any) -> Any:
    """Leave out the fields without value with which Arrow tables fill up their records."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_none(one) for one in value]
    return value
