"""Plain text: one document from one field of each record."""

from collections.abc import Iterable

from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer


def encode(
    records: Iterable[tuple[Place, Record]],
    *,
    tokenizer: Tokenizer,
    text_field: str,
    bad: BadRecords,
) -> list[list[int]]:
    """Return the token ids of each record's text; empty texts give empty lists."""
    texts: list[str] = []
    for place, record in records:
        text = record.get(text_field)
        if isinstance(text, str):
            texts.append(text)
        elif text_field in record:
            bad.report(place, f"field {text_field!r} holds {type(text).__name__}, not text")
        else:
            bad.report(place, f"no field {text_field!r} (data.text_field), only {list(record)}")
    return tokenizer.encode_batch(texts)
