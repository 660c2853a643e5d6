"""How records become token ids: `engine/data/formats/<data.format>.py` holds one `encode`."""

from collections.abc import Iterable, Mapping
from importlib import import_module
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
    """Return the `encode` of a format file; the error lists the files present."""
    folder = Path(__file__).parent
    present = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    if name not in present:
        raise ValueError(f"data.format = {name!r} is not one of {', '.join(present)}")
    members: Mapping[str, Encode] = vars(import_module(f"{__name__}.{name}"))
    return members["encode"]
