"""Preferences: pairs of a chosen and a rejected answer to one prompt, in a chat template's words.

The two sequences of a pair lie side by side, each whole with its own copy of the prompt. In each
the last answer alone is trained, its end of turn included, by the rules of `chat.py`. Both must
begin with the same ids up to there: a template whose header a tokenizer merges with the answer,
or that writes earlier turns otherwise for another answer, would compare different prompts.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.data import chat_template, conversation, preferences
from engine.data.chat_template import ChatTemplate, Span
from engine.data.conversation import Conversation
from engine.data.formats import Document, Pair, Recipe, chat
from engine.data.formats.chat import begins_within, open_template, with_system_prompt
from engine.data.preferences import SIDES, read_pair
from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer

MADE_OF = (chat, chat_template, conversation, preferences)

Rendered = tuple[str, Span]
"""The text of a conversation, and where in it the last answer stands."""

Encoded = tuple[list[int], npt.NDArray[np.bool_]]
"""The ids of a conversation, and which of them are of its last answer."""


def encode(
    records: Iterable[tuple[Place, Record]],
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    bad: BadRecords,
) -> list[Document]:
    """Return each record's chosen sequence and, behind it, the rejected one."""
    template = open_template(tokenizer, recipe)
    places: list[Place] = []
    rendered: list[Rendered] = []
    for place, record in records:
        try:
            sides = [with_system_prompt(one, recipe, place.number) for one in read_pair(record)]
            rendered += [render_answer(template, one) for one in sides]
            places.append(place)
        except ValueError as error:
            bad.report(place, str(error))
    found = tokenise(rendered, tokenizer)
    documents: list[Document] = []
    for place, chosen, rejected in zip(places, found[::2], found[1::2], strict=True):
        try:
            check_answers(dict(zip(SIDES, (chosen, rejected), strict=True)))
            if chosen[0] == rejected[0]:
                raise ValueError("'chosen' and 'rejected' become the same tokens")
            documents.append(joined(chosen, rejected))
        except ValueError as error:
            bad.report(place, str(error))
    return documents


def render_answer(template: ChatTemplate, chat: Conversation) -> Rendered:
    """Return the text of a conversation and the place of its last answer."""
    text, spans = template.render(chat)
    if not spans:
        raise ValueError("the chat template marks no answer with {% generation %}")
    return text, spans[-1]


def tokenise(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """Return ids and trained ids of texts."""
    encoded = tokenizer.encode_with_begins([text for text, _ in rendered])
    return [
        (ids, begins_within(begins, [span]))
        for (ids, begins), (_, span) in zip(encoded, rendered, strict=True)
    ]


def check_answers(sequences: dict[str, Encoded]) -> None:
    """Refuse an answer without a token, and two whose prompts have different ids."""
    prompts: list[list[int]] = []
    for side, (ids, is_trained) in sequences.items():
        if not is_trained[1:].any():
            raise ValueError(f"the answer of {side!r} has no token of its own")
        prompts.append(ids[: int(np.argmax(is_trained))])
    if prompts[0] != prompts[-1]:
        first, second = sequences
        raise ValueError(
            f"the prompts of {first!r} and {second!r} become different tokens, because the chat "
            "template or the tokenizer joins the prompt with the answer"
        )


def joined(first: Encoded, second: Encoded, *, is_desirable: bool = True) -> Document:
    """Return two sequences as one document."""
    is_trained = np.concatenate([first[1], second[1]])
    return Document(first[0] + second[0], is_trained, Pair(len(first[0]), is_desirable))
