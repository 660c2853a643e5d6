"""Preferences without pairs: single answers, each labelled as wanted or not, for KTO.

Beside each answer lies the same prompt with another record's answer, of which KTO estimates how
far the policy has moved from the reference. It is the next record's of the same batch of records
(about 4 MB of text) that has another prompt; where there is none, the record's own.
"""

from collections.abc import Iterable, Sequence

from engine.data import chat_template, conversation, preferences
from engine.data.conversation import Conversation
from engine.data.formats import Document, Recipe, chat, preference
from engine.data.formats.chat import open_template, with_system_prompt
from engine.data.formats.preference import (
    Rendered,
    check_answers,
    joined,
    render_answer,
    tokenise,
)
from engine.data.preferences import read_labelled, with_answer_of, without_answer
from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer

MADE_OF = (chat, chat_template, conversation, preference, preferences)


def encode(
    records: Iterable[tuple[Place, Record]],
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    bad: BadRecords,
) -> list[Document]:
    """Return each record's sequence and, behind it, its prompt with another record's answer."""
    template = open_template(tokenizer, recipe)
    read: list[tuple[Place, Conversation, bool]] = []
    for place, record in records:
        try:
            answered, is_desirable = read_labelled(record)
            read.append((place, with_system_prompt(answered, recipe, place.number), is_desirable))
        except ValueError as error:
            bad.report(place, str(error))
    kept: list[tuple[Place, bool]] = []
    rendered: list[Rendered] = []
    chats = [answered for _, answered, _ in read]
    beside = next_prompts(chats)
    for (place, answered, is_desirable), number in zip(read, beside, strict=True):
        try:
            other = with_answer_of(answered, chats[number])
            rendered += [render_answer(template, answered), render_answer(template, other)]
            kept.append((place, is_desirable))
        except ValueError as error:
            bad.report(place, str(error))
    found = tokenise(rendered, tokenizer)
    documents: list[Document] = []
    for (place, label), own, other in zip(kept, found[::2], found[1::2], strict=True):
        try:
            check_answers({"completion": own, "completion of another prompt": other})
            documents.append(joined(own, other, is_desirable=label))
        except ValueError as error:
            bad.report(place, str(error))
    return documents


def next_prompts(chats: Sequence[Conversation]) -> list[int]:
    """Return for each conversation the place of the next with other turns before its answer.

    Behind the last comes the first. Where all have the same turns there, it is its own place.
    """
    prompts = [without_answer(one) for one in chats]
    found = list(range(len(chats)))
    # Twice round from the end: what follows the last conversations is known after the first.
    for place in [*reversed(range(len(chats)))] * 2:
        following = (place + 1) % len(chats)
        is_other = prompts[following] != prompts[place]
        found[place] = following if is_other else found[following]
    return [there if prompts[there] != prompts[here] else here for here, there in enumerate(found)]
