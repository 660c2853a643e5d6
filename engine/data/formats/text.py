"""Plain text: one document from one field of each record."""

from collections.abc import Iterable

from engine.data.formats import Document, Recipe, marks
from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer


def encode(
    records: Iterable[tuple[Place, Record]],
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    bad: BadRecords,
) -> list[Document]:
    """Return each record's text with its marks; empty texts give empty documents."""
    field = recipe.text_field
    texts: list[str] = []
    for place, record in records:
        text = record.get(field)
        if isinstance(text, str):
            texts.append(text)
        elif field in record:
            bad.report(place, f"field {field!r} holds {type(text).__name__}, not text")
        else:
            bad.report(place, f"no field {field!r} (data.text_field), only {list(record)}")
    bos, eos = marks(tokenizer, recipe)
    return [Document(bos + ids + eos if ids else []) for ids in tokenizer.encode_batch(texts)]
