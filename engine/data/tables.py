"""Records of tables on disk: Parquet and Arrow files, read in rows, a thousand at a time."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from engine.data.cache import digest_of, file_digest
from engine.data.readers import BadRecords, Piece, Place, Record, require_column

ROWS_AT_ONCE = 1000
ARROW_FILE_MAGIC = b"ARROW1"
PIECES_PER_FILE = 64


class Parquet:
    """Parquet files, of which only the text column is read, or all columns if none is named."""

    def __init__(self, files: Sequence[Path], *, text_field: str | None) -> None:
        self._files = files
        self._columns = None if text_field is None else [text_field]
        self._row_groups: list[list[int]] = []
        for file in files:
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    columns = opened.schema_arrow.names
                    groups = map(opened.metadata.row_group, range(opened.num_row_groups))
                    self._row_groups.append([group.num_rows for group in groups])
            except (OSError, ValueError) as error:
                raise _unreadable(file, "Parquet", error) from error
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
        name, row = f"{path}, row group {group}", 0
        try:
            with pyarrow.parquet.ParquetFile(path) as opened:
                for batch in opened.iter_batches(
                    ROWS_AT_ONCE, row_groups=[group], columns=self._columns, use_threads=False
                ):
                    for record in batch.to_pylist():
                        yield Place(name=name, row=row, number=piece.first_record + row), record
                        row += 1
        except (OSError, ValueError) as error:
            raise _damaged(path, f"row group {group}", error) from error


class ArrowFiles:
    """Arrow IPC files or streams, mapped into memory; columns as in `Parquet`."""

    def __init__(self, files: Sequence[Path], *, text_field: str | None) -> None:
        self._files = files
        self._columns = None if text_field is None else [text_field]
        for file in files:
            try:
                with pa.memory_map(str(file)) as mapped:
                    columns = _open_arrow(file, mapped).schema.names
            except (OSError, ValueError) as error:
                raise _unreadable(file, "Arrow", error) from error
            if text_field is not None:
                require_column(str(file), columns, text_field)

    def digest(self, root: Path) -> str:
        """Return the digest of all files' bytes in order."""
        return digest_of("arrow", [file_digest(file, root) for file in self._files])

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Cut files into ranges of record batches; counting rows reads the heads of all batches.

        To reach a batch of a stream all before it are passed over, so a file is cut into
        `PIECES_PER_FILE` at most.
        """
        pieces, first_record = [], 0
        for number, file in enumerate(self._files):
            sizes = [batch.num_rows for batch in _batches(file, 0, None)]
            step = -(-len(sizes) // PIECES_PER_FILE)
            for start in range(0, len(sizes), max(step, 1)):
                stop = min(start + step, len(sizes))
                pieces.append(Piece(number, start, stop, first_record))
                first_record += sum(sizes[start:stop])
        return pieces

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a row; a record batch that cannot be read raises."""
        path = self._files[piece.file]
        number = piece.first_record
        for index, batch in enumerate(_batches(path, piece.start, piece.stop), piece.start):
            name = f"{path}, record batch {index}"
            if self._columns is not None:
                batch = batch.select(self._columns)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                records = batch.slice(start, ROWS_AT_ONCE).to_pylist()
                for row, record in enumerate(records, start):
                    yield Place(name=name, row=row, number=number), record
                    number += 1


def _open_arrow(path: Path, mapped: Any) -> Any:
    """Return the reader of a file's batches; an IPC file says at its head that it is one."""
    with open(path, "rb") as file:
        is_file = file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    return pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)


def _batches(path: Path, start: int, stop: int | None) -> Iterator[pa.RecordBatch]:
    reached = start
    try:
        with pa.memory_map(str(path)) as mapped:
            reader = _open_arrow(path, mapped)
            if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
                numbers = range(reader.num_record_batches)[start:stop]
                found = (reader.get_batch(number) for number in numbers)
            else:
                found = islice(reader, start, stop)
            for batch in found:
                yield batch
                reached += 1
    except (OSError, ValueError) as error:
        raise _damaged(path, f"record batch {reached}", error) from error


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable {kind} file ({error}); write it again or remove it")


def _damaged(path: Path, part: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: {part} cannot be read ({error}); the file is damaged, write it again"
    )
