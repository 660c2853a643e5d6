"""Records of text sources on disk, in pieces that processes can read on their own.

Every reader walks its files in a fixed order, so the documents of a source have one order however
many processes read it. What a record means is up to `formats/`.
"""

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from engine.data.cache import digest_of, file_digest

Record = Mapping[str, object]
PIECE_BYTES = 2 << 20
NUM_EXAMPLES = 5


class Piece(NamedTuple):
    """A part of a source that one process reads."""

    file: int
    """Its number among the source's files."""

    start: int
    """First unit: byte, row group, row, or file of text."""

    stop: int
    """One past the last unit."""

    first_record: int = 0
    """Number of its first record in the source, from 0, if numbers were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a record stands: a file or table, and a row or the byte where a line begins."""

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
        with open(self.name, "rb") as file:
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


class TextFiles:
    """Whole files, each one document in the text field.

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
        """Return the digest of all files' bytes in order."""
        return digest_of("text", [file_digest(file, root) for file in self._files])

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
                yield place, {self._field: file.read_text("utf-8", self._errors)}
            except UnicodeDecodeError as error:
                bad.report(place, f"not UTF-8 text ({error.reason} at byte {error.start})")


class JsonLines:
    """Files of one JSON object a line, empty lines passed over, or of one array of objects."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def digest(self, root: Path) -> str:
        """Return the digest of all files' bytes in order."""
        return digest_of("jsonl", [file_digest(file, root) for file in self._files])

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Cut files into byte ranges; a line belongs to the range that holds its first byte.

        An array is one piece. Numbering reads all files through.
        """
        pieces: list[Piece] = []
        first_record = 0
        for number, file in enumerate(self._files):
            size = file.stat().st_size
            step = max(size, 1) if _is_array(file) else PIECE_BYTES
            for start in range(0, size, step):
                piece = Piece(number, start, start + step, first_record)
                pieces.append(piece)
                first_record += _count_records(file, piece) if numbered else 0
        return pieces

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a line; a line that is not a JSON object is a bad record."""
        path = self._files[piece.file]
        if _is_array(path):
            yield from _read_array(path, piece, bad)
            return
        number = piece.first_record - 1
        with open(path, "rb") as file:
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
    if path.suffix != ".json":
        return False
    with open(path, "rb") as file:
        return file.read(64).lstrip()[:1] == b"["


def _count_records(path: Path, piece: Piece) -> int:
    if _is_array(path):
        return sum(1 for _ in _read_array(path, piece, BadRecords("skip")))
    with open(path, "rb") as file:
        # A line begins at the file's first byte, and behind each line end but the file's last.
        last = min(piece.stop, path.stat().st_size) - 1
        start = max(piece.start - 1, 0)
        file.seek(start)
        return file.read(last - start).count(b"\n") + (piece.start == 0)


def _read_array(path: Path, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        bad.report(Place(name=str(path)), f"not valid JSON ({error})")
        return
    for row, record in enumerate(records):
        place = Place(name=str(path), row=row, number=piece.first_record + row)
        if isinstance(record, dict):
            yield place, record
        else:
            bad.report(place, f"a JSON {type(record).__name__} where an object is expected")


class Parquet:
    """Parquet files, of which only the text column is read, or all columns if none is named."""

    def __init__(self, files: Sequence[Path], *, text_field: str | None) -> None:
        import pyarrow.parquet  # slow to import, and not needed by other sources

        self._open = pyarrow.parquet.ParquetFile
        self._files = files
        self._columns = None if text_field is None else [text_field]
        self._row_groups: list[list[int]] = []
        for file in files:
            try:
                with self._open(file) as opened:
                    columns = opened.schema_arrow.names
                    groups = map(opened.metadata.row_group, range(opened.num_row_groups))
                    self._row_groups.append([group.num_rows for group in groups])
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{file}: not a readable Parquet file ({error}); write it again or remove it"
                ) from error
            if text_field is not None:
                require_column(str(file), columns, text_field)

    def digest(self, root: Path) -> str:
        """Return the digest of all files' bytes in order."""
        return digest_of("parquet", [file_digest(file, root) for file in self._files])

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Cut files into their row groups."""
        pieces, first_record = [], 0
        for number, groups in enumerate(self._row_groups):
            for group, num_rows in enumerate(groups):
                pieces.append(Piece(number, group, group + 1, first_record))
                first_record += num_rows
        return pieces

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a row; a row group that cannot be read raises."""
        path, group = self._files[piece.file], piece.start
        try:
            with self._open(path) as opened:
                table = opened.read_row_group(group, self._columns, use_threads=False)
                records = table.to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: row group {group} cannot be read ({error}); the file is damaged, "
                "write it again"
            ) from error
        name = f"{path}, row group {group}"
        for row, record in enumerate(records):
            yield Place(name=name, row=row, number=piece.first_record + row), record


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
