"""Prompts and their completions as plain text, without a chat template; completions are trained.

Records hold the text fields `prompt` and `completion`, which are joined as they are and tokenised
once: a token that spans the border belongs to the prompt. The format `chat` reads the same records
as a user's turn and its answer.
"""

from collections.abc import Iterable

import numpy as np

from engine.data.formats import Document, Recipe, marks
from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer

FIELDS = ("prompt", "completion")


def encode(
    records: Iterable[tuple[Place, Record]],
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    bad: BadRecords,
) -> list[Document]:
    """Return prompt, completion and marks; of the marks the end is trained."""
    texts: list[str] = []
    borders: list[int] = []
    for place, record in records:
        prompt, completion = (record.get(field) for field in FIELDS)
        if isinstance(prompt, str) and isinstance(completion, str):
            texts.append(prompt + completion)
            borders.append(len(prompt))
            continue
        kinds = [
            f"{field!r} {type(record[field]).__name__ if field in record else 'missing'}"
            for field in FIELDS
        ]
        bad.report(place, f"two texts are expected, and here are {' and '.join(kinds)}")
    bos, eos = marks(tokenizer, recipe)
    documents: list[Document] = []
    for (ids, begins), border in zip(tokenizer.encode_with_begins(texts), borders, strict=True):
        is_trained = np.concatenate(
            [np.zeros(len(bos), bool), begins >= border, np.ones(len(eos), bool)]
        )
        mask = None if recipe.train_on == "all" else is_trained
        documents.append(Document(bos + ids + eos if ids else [], mask if ids else None))
    return documents
