"""How records become token ids: `engine/data/formats/<data.format>.py` holds one `encode`."""

import hashlib
from collections.abc import Iterable
from importlib import import_module
from inspect import getsourcefile, unwrap
from pathlib import Path
from typing import Protocol

from engine.data.readers import BadRecords, Place, Record
from engine.data.tokenizer import Tokenizer


class Encode(Protocol):
    """Turns records into documents of token ids; records it cannot use go to `bad`."""

    def __call__(
        self,
        records: Iterable[tuple[Place, Record]],
        *,
        tokenizer: Tokenizer,
        text_field: str,
        bad: BadRecords,
    ) -> list[list[int]]:
        """Return one list of ids for each usable record, in order."""
        ...


def load_format(name: str) -> Encode:
    """Return the `encode` of a format file, or of a module of one's own by its dotted path."""
    if "." in name:
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
    """Return a digest of the file that defines a format, so that an edit tokenises anew."""
    path = getsourcefile(unwrap(encode))  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
