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
from typing import Literal, Protocol

from engine.data.cache import digest_of, file_digest

Record = Mapping[str, object]
Piece = tuple[int, int, int]
"""File number, first and one past the last unit (byte, row group or row) of a piece."""

PIECE_BYTES = 2 << 20
NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a record stands: a file or table, and a row or the byte where a line begins."""

    name: str
    row: int | None = None
    byte: int | None = None

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

    def pieces(self) -> list[Piece]:
        """Cut the source into pieces, in order."""
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

    def pieces(self) -> list[Piece]:
        """Cut between files, at about `PIECE_BYTES`; a piece is a range of files."""
        pieces, start, size = [], 0, 0
        for stop, file in enumerate(self._files, start=1):
            size += file.stat().st_size
            if size >= PIECE_BYTES or stop == len(self._files):
                pieces.append((0, start, stop))
                start, size = stop, 0
        return pieces

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a file; a file that is not UTF-8 is a bad record."""
        for file in self._files[piece[1] : piece[2]]:
            place = Place(name=str(file))
            try:
                yield place, {self._field: file.read_text("utf-8", self._errors)}
            except UnicodeDecodeError as error:
                bad.report(place, f"not UTF-8 text ({error.reason} at byte {error.start})")


class JsonLines:
    """Files of one JSON object a line; empty lines are passed over."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def digest(self, root: Path) -> str:
        """Return the digest of all files' bytes in order."""
        return digest_of("jsonl", [file_digest(file, root) for file in self._files])

    def pieces(self) -> list[Piece]:
        """Cut files into byte ranges; a line belongs to the range that holds its first byte."""
        return [
            (number, start, start + PIECE_BYTES)
            for number, file in enumerate(self._files)
            for start in range(0, file.stat().st_size, PIECE_BYTES)
        ]

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a line; a line that is not a JSON object is a bad record."""
        number, start, stop = piece
        path = self._files[number]
        with open(path, "rb") as file:
            if start > 0:
                file.seek(start - 1)
                file.readline()
            while (offset := file.tell()) < stop and (line := file.readline()):
                if not line.strip():
                    continue
                place = Place(name=str(path), byte=offset)
                try:
                    record = json.loads(line)
                except ValueError as error:
                    bad.report(place, f"not valid JSON ({error})")
                    continue
                if isinstance(record, dict):
                    yield place, record
                else:
                    bad.report(place, f"a JSON {type(record).__name__} where an object is expected")


class Parquet:
    """Parquet files, of which only the text column is read."""

    def __init__(self, files: Sequence[Path], *, text_field: str) -> None:
        import pyarrow.parquet  # slow to import, and not needed by other sources

        self._open = pyarrow.parquet.ParquetFile
        self._files = files
        self._field = text_field
        self._row_groups: list[int] = []
        for file in files:
            try:
                with self._open(file) as opened:
                    columns = opened.schema_arrow.names
                    self._row_groups.append(opened.num_row_groups)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{file}: not a readable Parquet file ({error}); write it again or remove it"
                ) from error
            require_column(str(file), columns, text_field)

    def digest(self, root: Path) -> str:
        """Return the digest of all files' bytes in order."""
        return digest_of("parquet", [file_digest(file, root) for file in self._files])

    def pieces(self) -> list[Piece]:
        """Cut files into their row groups."""
        return [
            (number, group, group + 1)
            for number, groups in enumerate(self._row_groups)
            for group in range(groups)
        ]

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a row; a row group that cannot be read raises."""
        number, group, _ = piece
        path = self._files[number]
        try:
            with self._open(path) as opened:
                column = opened.read_row_group(group, [self._field], use_threads=False).column(0)
                texts = column.to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: row group {group} cannot be read ({error}); the file is damaged, "
                "write it again"
            ) from error
        for row, text in enumerate(texts):
            yield Place(name=f"{path}, row group {group}", row=row), {self._field: text}


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
