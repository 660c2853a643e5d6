"""Words that become tokens of a Hugging Face tokenizer: their ids, and the files that say so.

Old text keeps its ids: nothing else of the tokenizer changes. Rows of a model for the new ids are
made in `engine/extend.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_MAP_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewToken:
    """A word that becomes a token."""

    text: str
    id: int
    pieces: tuple[int, ...]
    """Ids of the tokens that the word was before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTokens:
    """What a list of words adds to a tokenizer."""

    new: tuple[NewToken, ...]
    known: tuple[str, ...]
    """Words that are one token already; they are left as they are."""

    old_size: int
    """One more than the highest id before."""

    is_special: bool
    """Control tokens, which decoding can leave out."""

    whole_words: bool
    """A word inside a longer one, such as "cat" in "concatenate", is left alone."""

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.old_size, *(token.id + 1 for token in self.new))


def new_tokens(
    folder: Path, words: Sequence[str], *, is_special: bool, whole_words: bool
) -> NewTokens:
    """Return what `words` add to the tokenizer in a folder; spaces around a word do not count.

    A ValueError where there is no tokenizer.json, nothing to add, or a word that would not come
    back from its token.
    """
    backend = _read(folder)
    texts = [text for text in dict.fromkeys(word.strip() for word in words) if text]
    known = tuple(text for text in texts if _is_token(backend, text))
    added = [text for text in texts if text not in known]
    if not added:
        what = "they are tokens already" if known else "the list is empty"
        raise ValueError(f"--tokens: there is nothing to add to {folder}: {what}")
    pieces = {text: tuple(_ids(backend, text)) for text in added}
    old_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    flags = _flags(is_special=is_special, whole_words=whole_words)
    backend.add_tokens([tokenizers.AddedToken(text, **flags) for text in added])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    ids = {text: vocabulary[text] for text in added}
    if garbled := {t: back for t in added if (back := _decoded(backend, [ids[t]])) != t}:
        shown = ", ".join(f"{text!r} as {back!r}" for text, back in garbled.items())
        raise ValueError(
            f"--tokens: the tokenizer in {folder} would decode {shown}: a byte-level one takes "
            "letters such as é of an added token for bytes; leave these words out"
        )
    return NewTokens(
        new=tuple(NewToken(text=text, id=ids[text], pieces=pieces[text]) for text in added),
        known=known,
        old_size=old_size,
        is_special=is_special,
        whole_words=whole_words,
    )


def _read(folder: Path) -> tokenizers.Tokenizer:
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {TOKENIZER_NAME}; transformers writes one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ValueError(f"{path} cannot be read ({error}); download it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _is_token(backend: tokenizers.Tokenizer, text: str) -> bool:
    """Say whether a text is one token that stands for all of it, not for an unknown word."""
    ids = _ids(backend, text)
    is_one = len(ids) == 1 and _decoded(backend, ids) == text
    return is_one or backend.token_to_id(text) is not None


def _decoded(backend: tokenizers.Tokenizer, ids: list[int]) -> str:
    return backend.decode(ids, skip_special_tokens=False).strip()


def _flags(*, is_special: bool, whole_words: bool) -> dict[str, bool]:
    """Return how the text is matched: as it is written, and without the space around it."""
    return {
        "single_word": whole_words,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def extended_files(folder: Path, tokens: NewTokens) -> dict[str, bytes]:
    """Return the tokenizer's files that change, by name; only the new tokens are written in."""
    flags = _flags(is_special=tokens.is_special, whole_words=tokens.whole_words)
    entries = [{"id": token.id, "content": token.text, **flags} for token in tokens.new]
    files: dict[str, Mapping[str, object]] = {}
    backend = _read_json(folder / TOKENIZER_NAME)
    files[TOKENIZER_NAME] = {**backend, "added_tokens": [*backend["added_tokens"], *entries]}
    if (folder / CONFIG_NAME).is_file():
        files[CONFIG_NAME] = _extended_config(_read_json(folder / CONFIG_NAME), tokens, flags)
    if tokens.is_special and (folder / SPECIAL_MAP_NAME).is_file():
        files[SPECIAL_MAP_NAME] = _with_special(_read_json(folder / SPECIAL_MAP_NAME), tokens)
    if (folder / ADDED_NAME).is_file():
        ids = {token.text: token.id for token in tokens.new}
        files[ADDED_NAME] = {**_read_json(folder / ADDED_NAME), **ids}
    return {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in files.items()
    }


def _extended_config(
    config: Mapping[str, object], tokens: NewTokens, flags: Mapping[str, bool]
) -> dict[str, object]:
    decoder = config.get("added_tokens_decoder")
    extended = dict(config)
    if isinstance(decoder, dict):
        entries = {str(token.id): {"content": token.text, **flags} for token in tokens.new}
        extended["added_tokens_decoder"] = {**decoder, **entries}
    return _with_special(extended, tokens) if tokens.is_special else extended


def _with_special(config: Mapping[str, object], tokens: NewTokens) -> dict[str, object]:
    """Add to the list of further special tokens: version 5 of transformers reads either name."""
    newer = "extra_special_tokens"
    key = newer if isinstance(config.get(newer), list) else "additional_special_tokens"
    listed = config.get(key)
    before = listed if isinstance(listed, list) else []
    return {**config, key: [*before, *(token.text for token in tokens.new)]}


def _read_json(path: Path) -> dict[str, list[object]]:
    return json.loads(path.read_text(encoding="utf-8"))
