"""Chats: the text of a chat template, of which what the assistant writes is trained.

The mask comes from the one tokenisation of the whole text: a token is trained if it begins within
a turn of the assistant. So a token that spans the border of header and answer belongs to the
header, as it does in the prompt at inference; one that spans the end belongs to the answer. Marks
are the template's alone (`data.bos` and `data.eos` have no say), as in `apply_chat_template`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.data import chat_template, conversation
from engine.data.cache import digest_of
from engine.data.chat_template import ChatTemplate, Span
from engine.data.chat_templates import template_names
from engine.data.conversation import Conversation, read_conversation
from engine.data.formats import Document, Recipe
from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer

MADE_OF = (chat_template, conversation)


def encode(
    records: Iterable[tuple[Place, Record]],
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    bad: BadRecords,
) -> list[Document]:
    """Return each conversation in the words of the template."""
    template = open_template(tokenizer, recipe)
    texts: list[str] = []
    spans: list[Sequence[Span]] = []
    for place, record in records:
        try:
            chat = read_conversation(record, recipe.text_field)
            text, turns = template.render(with_system_prompt(chat, recipe, place.number))
            spans.append(_trained(turns, chat.is_trained, recipe))
            texts.append(text)
        except ValueError as error:
            bad.report(place, str(error))
    encoded = tokenizer.encode_with_begins(texts)
    if recipe.train_on == "all":
        return [Document(ids) for ids, _ in encoded]
    return [
        Document(ids, begins_within(begins, turns))
        for (ids, begins), turns in zip(encoded, spans, strict=True)
    ]


def with_system_prompt(chat: Conversation, recipe: Recipe, number: int) -> Conversation:
    """Return the conversation with a system prompt if it has none and one is drawn for it.

    The draw is a function of the seed and the record's number alone.
    """
    if not recipe.system_prompts or chat.messages[0]["role"] == "system":
        return chat
    share, choice = divmod(int(digest_of("system prompt", recipe.seed, number), 16), 1 << 64)
    if share >= recipe.system_prompt_rate * (1 << 64):
        return chat
    prompt = recipe.system_prompts[choice % len(recipe.system_prompts)]
    return replace(chat, messages=[{"role": "system", "content": prompt}, *chat.messages])


def begins_within(begins: npt.NDArray[np.int64], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Say for each token whether the character at which it begins lies in one of the spans."""
    is_within = np.zeros(len(begins), dtype=np.bool_)
    for start, end in spans:
        first, past = np.searchsorted(begins, (start, end))
        is_within[first:past] = True
    return is_within


def open_template(tokenizer: Tokenizer, recipe: Recipe) -> ChatTemplate:
    """Return the template that the recipe names, or the tokenizer's own."""
    text = recipe.chat_template or tokenizer.chat_template
    if not text:
        raise ValueError(
            "data.chat_template is empty, and the tokenizer has no chat template of its own; set "
            f"it to one of {', '.join(template_names())}, or to a file"
        )
    return ChatTemplate(text, tokenizer)


def _trained(turns: Sequence[Span], is_trained: list[bool], recipe: Recipe) -> Sequence[Span]:
    """Return the spans to be trained, of all that the template shows.

    A template's own marks are its author's word on what is trained; to choose among the turns
    there must be one for each.
    """
    wanted = list(is_trained)
    if recipe.train_on == "last":
        wanted[:-1] = [False] * (len(wanted) - 1)
    if all(wanted):
        return turns
    if len(turns) != len(wanted):
        raise ValueError(
            f"the chat template marks {len(turns)} passages with {{% generation %}} for "
            f"{len(wanted)} turns of the assistant, so which to train cannot be told; give each "
            "turn one block"
        )
    return [turn for turn, is_wanted in zip(turns, wanted, strict=True) if is_wanted]
