"""How records become token ids: `engine/data/formats/<data.format>.py` holds one `encode`."""

import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from inspect import getmodule, getsourcefile, unwrap
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The settings that a format reads. All of them are part of the key of a token file."""

    format: str
    text_field: str
    add_bos: bool
    add_eos: bool
    on_bad_record: Literal["raise", "skip"]

    chat_template: str = ""
    """Text of the template, not its name; empty means the tokenizer's own."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    system_prompts: tuple[str, ...] = ()
    system_prompt_rate: float = 1.0

    seed: int = 0
    """Of what a format draws at random; 0 where it draws nothing, so that seeds share the file."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sequences that a document holds back to back: always in one row, and never cut."""

    first_tokens: int
    """Ids of the first; the others are the second's."""

    is_desirable: bool = True
    """Whether the first is an answer that is wanted."""


@dataclass(frozen=True, slots=True)
class Document:
    """One record as the model will see it, marks included. No ids: the record held no text."""

    ids: list[int]

    is_trained: npt.NDArray[np.bool_] | None = None
    """Which ids are labels, as many as there are ids; None: all. The first never is one."""

    pair: Pair | None = None
    """Where the ids are of two sequences, which do not see each other; all documents of a format
    are of two, or none is."""

    @property
    def has_label(self) -> bool:
        """Whether any token but the first is trained."""
        return self.is_trained is None or bool(self.is_trained[1:].any())


class Encode(Protocol):
    """Turns records into documents; records it cannot use go to `bad`."""

    def __call__(
        self,
        records: Iterable[tuple[Place, Record]],
        *,
        tokenizer: Tokenizer,
        recipe: Recipe,
        bad: BadRecords,
    ) -> list[Document]:
        """Return one document for each usable record, in order."""
        ...


def load_format(name: str) -> Encode:
    """Return the `encode` of a format file, or of a module of one's own by its dotted path."""
    if "." in name:
        if os.getcwd() not in sys.path:  # where scripts are started from, as well as train.py
            sys.path.insert(0, os.getcwd())
        try:
            members = vars(import_module(name))
        except ModuleNotFoundError as error:
            raise ValueError(f"data.format = {name!r} cannot be imported: {error}") from error
        if "encode" not in members:
            raise ValueError(f"data.format = {name!r} has no function 'encode'; define one there")
        return members["encode"]
    folder = Path(__file__).parent
    present = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    if name not in present:
        raise ValueError(
            f"data.format = {name!r} is not one of {', '.join(present)}, nor the dotted path of a "
            "module of your own"
        )
    return vars(import_module(f"{__name__}.{name}"))["encode"]


def source_digest(encode: Encode) -> str:
    """Return a digest of the code that defines a format, so that an edit tokenises anew.

    That is the file of `encode`, and the modules that this file lists as `MADE_OF`.
    """
    function = unwrap(encode)  # pyright: ignore[reportArgumentType, reportCallIssue]
    module = getmodule(function)
    parts = [getsourcefile(function)]
    parts += [part.__file__ for part in vars(module).get("MADE_OF", ())] if module else []
    digest = hashlib.sha256()
    for part in parts:
        digest.update(Path(part).read_bytes() if part else b"")
    return digest.hexdigest()


def marks(tokenizer: Tokenizer, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Return the ids with which plain text begins and ends: none or one each."""
    bos = [tokenizer.bos_id] if recipe.add_bos and tokenizer.bos_id is not None else []
    eos = [tokenizer.eos_id] if recipe.add_eos and tokenizer.eos_id is not None else []
    return bos, eos
