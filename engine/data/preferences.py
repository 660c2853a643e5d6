"""Preference records of every known shape as conversations that end with the answer in question.

A record that is none of the shapes, or a broken one, is a ValueError with the reason. Rendering
and tokenising are left to `formats/preference.py` and `formats/unpaired_preference.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.data.conversation import CALL, ROLES, Conversation, Message, read_conversation
from engine.data.readers import Record

SIDES = ("chosen", "rejected")


def read_pair(record: Record) -> tuple[Conversation, Conversation]:
    """Return the conversations of the chosen and of the rejected answer, equal up to that answer.

    `chosen` and `rejected` hold an answer to `prompt`, as text or as the assistant's turn in a
    list, or are whole conversations that end with it (`prompt` is not read then). A prompt is a
    user's words or a list of turns; `system` and `tools` may stand beside it. Turns have the shapes
    of `read_conversation`.
    """
    chosen, rejected = (_conversation(record, side) for side in SIDES)
    if without_answer(chosen) != without_answer(rejected):
        raise ValueError(
            "'chosen' and 'rejected' differ before their last turn, so they answer different "
            "prompts"
        )
    if chosen.messages[-1] == rejected.messages[-1]:
        raise ValueError("'chosen' and 'rejected' are the same answer, so neither is preferred")
    return chosen, rejected


def read_labelled(record: Record) -> tuple[Conversation, bool]:
    """Return the conversation of a single answer, and whether `label` says that it is wanted.

    `completion` holds an answer to `prompt` as in a pair, or `messages` a whole conversation.
    """
    label = record.get("label")
    if label not in (True, False):
        raise ValueError(f"field 'label' is {label!r}; give true for an answer that is wanted")
    side = "messages" if record.get("completion") is None else "completion"
    return _conversation(record, side), bool(label)


def without_answer(conversation: Conversation) -> list[Message]:
    """Return the turns before the last."""
    return conversation.messages[:-1]


def with_answer_of(conversation: Conversation, other: Conversation) -> Conversation:
    """Return a conversation with another one's last turn in place of its own."""
    answer = other.messages[-1]
    return replace(conversation, messages=[*without_answer(conversation), answer])


def _conversation(record: Record, side: str) -> Conversation:
    answer, prompt = record.get(side), record.get("prompt")
    if isinstance(answer, Mapping):
        answer = [answer]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not answer:
        shown = "missing" if answer is None else "empty" if answer == [] else type(answer).__name__
        raise ValueError(f"field {side!r} is {shown}; give an answer, or turns that end with one")
    turns: Sequence[Any] = answer
    if _is_assistants(answer[0]):
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(f"field {side!r} is an answer without a 'prompt'; give text or turns")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [*asked, *answer]
    context = {key: record[key] for key in ("system", "tools", "functions") if record.get(key)}
    found = read_conversation({"messages": turns, **context}, "messages")
    last = found.messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{side!r} ends with a turn of the {last['role']}, not with an answer")
    if not last["content"].strip() and "tool_calls" not in last:
        raise ValueError(f"{side!r} ends with an empty answer")
    return found


def _is_assistants(turn: object) -> bool:
    word = (turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else None
    return isinstance(word, str) and ROLES.get(word) in ("assistant", CALL)
