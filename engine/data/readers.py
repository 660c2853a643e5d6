"""Records of text and JSON files, in pieces that processes can read on their own.

Every reader walks its files in a fixed order, so the documents of a source have one order however
many processes read it. Tables are `tables.py`'s; what a record means is up to `formats/`.
"""

import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol, cast

from engine.data.cache import digest_of, file_digest

log = logging.getLogger("tessera")

Record = Mapping[str, object]
PIECE_BYTES = 2 << 20
LARGE_ARRAY_BYTES = 256 << 20
NUM_EXAMPLES = 20
GZIP_MAGIC = b"\x1f\x8b"
TO_THE_END = 1 << 62


class Piece(NamedTuple):
    """A part of a source that one process reads."""

    file: int
    """Its number among the source's files."""

    start: int
    """First unit: byte, row group, record batch, row, or file of text."""

    stop: int
    """One past the last unit."""

    first_record: int = 0
    """Number of its first record in the source, from 0, if numbers were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a record stands: a file or table, and a row or the byte where a line begins.

    In a gzip file bytes count what is unpacked."""

    name: str
    row: int | None = None
    byte: int | None = None

    number: int = 0
    """Of the record in its source, from 0, if numbers were asked for. Empty lines and records that
    cannot be read have one too, so it does not depend on how the source is cut into pieces."""

    def __str__(self) -> str:
        if self.row is not None:
            return f"{self.name}, row {self.row}"
        if self.byte is None:
            return self.name
        lines_before, left = 0, self.byte
        with open_bytes(Path(self.name)) as file:
            while left > 0 and (block := file.read(min(left, PIECE_BYTES))):
                lines_before += block.count(b"\n")
                left -= len(block)
        return f"{self.name}, line {lines_before + 1}"


@dataclass(slots=True)
class BadRecords:
    """The policy for records that cannot be used: raise at the first, or count and go on."""

    policy: Literal["raise", "skip"]
    count: int = 0
    examples: list[tuple[Place, str]] = field(default_factory=list)
    """The first `NUM_EXAMPLES`; not yet text, because a line's number takes reading the file."""

    def report(self, place: Place, reason: str) -> None:
        """Raise ValueError naming the place and the reason, or count the record as skipped."""
        if self.policy == "raise":
            raise ValueError(
                f"{place}: {reason}; mend the record, or set data.on_bad_record = 'skip' to "
                "leave such records out and count them"
            )
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append((place, reason))


class Reader(Protocol):
    """Records of one source."""

    def digest(self, root: Path) -> str:
        """Return the digest of the source's content; `root` is the cache folder."""
        ...

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Cut the source into pieces, in order; number their records where that costs nothing, or
        if `numbered`."""
        ...

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield a piece's records, each with where it stands; unreadable ones go to `bad`."""
        ...


def is_gzip(path: Path) -> bool:
    """Say whether a file is packed by gzip, whatever its name: no text begins with these bytes."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, unpacked if gzip has packed it."""
    return cast(BinaryIO, gzip.open(path, "rb")) if is_gzip(path) else open(path, "rb")


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Name the file where what gzip has packed is cut off or damaged."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: not a readable gzip file ({error}); write it again or remove it"
        ) from error


class TextFiles:
    """Whole files, each one document in the text field; gzip files are unpacked.

    Bytes that are not UTF-8 make a bad record, or with `errors` "replace" are marked and kept.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        text_field: str = "text",
        errors: Literal["strict", "replace"] = "strict",
    ) -> None:
        self._files = files
        self._field = text_field
        self._errors = errors

    def digest(self, root: Path) -> str:
        """Return the digest of all files' bytes in order, and of what is done to wrong bytes."""
        return digest_of("text", self._errors, [file_digest(file, root) for file in self._files])

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Cut between files, at about `PIECE_BYTES`; a piece is a range of files."""
        pieces, start, size = [], 0, 0
        for stop, file in enumerate(self._files, start=1):
            size += file.stat().st_size
            if size >= PIECE_BYTES or stop == len(self._files):
                pieces.append(Piece(0, start, stop, first_record=start))
                start, size = stop, 0
        return pieces

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a file; a file that is not UTF-8 is a bad record."""
        for number in range(piece.start, piece.stop):
            file = self._files[number]
            place = Place(name=str(file), number=number)
            try:
                with (
                    _naming_damage(file),
                    TextIOWrapper(open_bytes(file), "utf-8", self._errors) as opened,
                ):
                    text = opened.read()
            except UnicodeDecodeError as error:
                bad.report(place, f"not UTF-8 text ({error.reason} at byte {error.start})")
            else:
                yield place, {self._field: text}


class JsonLines:
    """Files of one JSON object a line, empty lines passed over, or of one array of objects.

    Files may be packed by gzip. Only `.json` files, or `.json.gz`, hold arrays.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def digest(self, root: Path) -> str:
        """Return the digest of all files' bytes in order, and of which are arrays."""
        return digest_of("jsonl", [(file_digest(f, root), _is_array(f)) for f in self._files])

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Cut files into byte ranges; a line belongs to the range that holds its first byte.

        An array is one piece, as is a gzip file, which can only be read from its beginning.
        Numbering reads all files through.
        """
        pieces: list[Piece] = []
        first_record = 0
        for number, file in enumerate(self._files):
            size = file.stat().st_size
            ranges = [(start, start + PIECE_BYTES) for start in range(0, size, PIECE_BYTES)]
            if _is_array(file):
                _warn_of_large_array(file, size)
                ranges = [(0, TO_THE_END)]
            elif is_gzip(file):
                ranges = [(0, TO_THE_END)]
            for start, stop in ranges:
                piece = Piece(number, start, stop, first_record)
                pieces.append(piece)
                first_record += _count_records(file, piece) if numbered else 0
        return pieces

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a line; a line that is not a JSON object is a bad record."""
        path = self._files[piece.file]
        read = _read_array if _is_array(path) else _read_lines
        with _naming_damage(path):
            yield from read(path, piece, bad)


def _read_lines(path: Path, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
    number = piece.first_record - 1
    with open_bytes(path) as file:
        if piece.start > 0:
            file.seek(piece.start - 1)
            file.readline()
        while (offset := file.tell()) < piece.stop and (line := file.readline()):
            number += 1
            if not line.strip():
                continue
            place = Place(name=str(path), byte=offset, number=number)
            try:
                record = json.loads(line)
            except ValueError as error:
                bad.report(place, f"not valid JSON ({error})")
                continue
            if isinstance(record, dict):
                yield place, record
            else:
                bad.report(place, f"a JSON {type(record).__name__} where an object is expected")


def _is_array(path: Path) -> bool:
    if not path.name.endswith((".json", ".json.gz")):
        return False
    with _naming_damage(path), open_bytes(path) as file:
        return file.read(64).lstrip()[:1] == b"["


def _warn_of_large_array(path: Path, size: int) -> None:
    if size >= LARGE_ARRAY_BYTES:
        log.warning(
            "%s holds one JSON array of %d MB, which one process reads at once and holds in "
            "memory; JSON lines are read in parts",
            *(path, size // 10**6),
        )


def _count_records(path: Path, piece: Piece) -> int:
    if _is_array(path):
        return len(_load_array(path, BadRecords("skip")))
    if piece.stop == TO_THE_END:
        with _naming_damage(path), open_bytes(path) as file:
            return sum(1 for _ in file)
    with open(path, "rb") as file:
        # A line begins at the file's first byte, and behind each line end but the file's last.
        last = min(piece.stop, path.stat().st_size) - 1
        start = max(piece.start - 1, 0)
        file.seek(start)
        return file.read(last - start).count(b"\n") + (piece.start == 0)


def _read_array(path: Path, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
    for row, record in enumerate(_load_array(path, bad)):
        place = Place(name=str(path), row=row, number=piece.first_record + row)
        if isinstance(record, dict):
            yield place, record
        else:
            bad.report(place, f"a JSON {type(record).__name__} where an object is expected")


def _load_array(path: Path, bad: BadRecords) -> list[object]:
    with _naming_damage(path), open_bytes(path) as file:
        content = file.read()
    try:
        return json.loads(content)
    except ValueError as error:
        bad.report(Place(name=str(path)), f"not valid JSON ({error})")
        return []


def find_files(path: str, suffixes: tuple[str, ...], key: str) -> list[Path]:
    """Return the file, the folder's files with one of `suffixes`, or the pattern's matches; sorted.

    `key` is the setting that holds `path`, for messages.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.name.endswith(suffixes))
        if not files:
            raise ValueError(
                f"{key} = {path!r} is a folder without {' or '.join(suffixes)} files; name the "
                "folder that holds them, or another dataset kind"
            )
        return files
    files = sorted(Path(name) for name in glob.glob(str(root), recursive=True))
    if not files:
        raise ValueError(
            f"{key} = {path!r} does not exist; give a file, a folder or a pattern "
            f"(the current folder is {os.getcwd()})"
        )
    return files


def require_column(name: str, columns: Sequence[str], text_field: str) -> None:
    """Raise ValueError naming the columns there are if the text column is not among them."""
    if text_field not in columns:
        raise ValueError(
            f"data.text_field = {text_field!r} is not a column of {name}; it has "
            f"{', '.join(map(repr, columns))}"
        )
