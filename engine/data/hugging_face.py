"""Text from the Hugging Face `datasets` package: a name on the hub, or a folder.

Importing this file imports `datasets`, which is slow: only those who need it do.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets

from engine.data.cache import digest_of, file_digest
from engine.data.readers import BadRecords, Piece, Place, Record, require_column

PIECE_ROWS = 1000
CONFIGURATIONS = {"c4": ("allenai/c4", "en")}


class DatasetRows:
    """A Hugging Face dataset with random access; only its text column, or all if none is named."""

    def __init__(self, dataset: datasets.Dataset, *, name: str, text_field: str | None) -> None:
        if text_field is not None:
            require_column(name, dataset.column_names, text_field)
            dataset = dataset.select_columns([text_field])
        self._dataset = dataset
        self._name = name

    def digest(self, root: Path) -> str:
        """Return the digest of the Arrow files behind the dataset, index files included."""
        files = [Path(str(file["filename"])) for file in self._dataset.cache_files]
        if not files:
            return digest_of("datasets", self._dataset._fingerprint)
        return digest_of(
            "datasets", [file_digest(file, root) for file in files], len(self._dataset)
        )

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Cut the rows into ranges."""
        num_rows = len(self._dataset)
        return [
            Piece(0, start, min(start + PIECE_ROWS, num_rows), first_record=start)
            for start in range(0, num_rows, PIECE_ROWS)
        ]

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a row."""
        columns = self._dataset[piece.start : piece.stop]
        for row, values in enumerate(zip(*columns.values(), strict=True), start=piece.start):
            record = dict(zip(columns, values, strict=True))
            yield Place(name=self._name, row=row, number=row), record


class DatasetStream:
    """A Hugging Face dataset that is read as it goes; each of its shards is a piece.

    Only its text column, or all if none is named, or if the dataset does not tell its columns.
    """

    def __init__(
        self, dataset: datasets.IterableDataset, *, name: str, text_field: str | None
    ) -> None:
        if text_field is not None and dataset.column_names:
            require_column(name, dataset.column_names, text_field)
            dataset = dataset.select_columns([text_field])
        self._dataset = dataset
        self._name = name

    def digest(self, root: Path) -> str:
        """Return a digest of the name and the number of shards: the content is not known."""
        return digest_of("stream", self._name, self._dataset.num_shards)

    def pieces(self, *, numbered: bool = False) -> list[Piece]:
        """Name the shards; their records are not numbered."""
        return [Piece(number, 0, 0) for number in range(self._dataset.num_shards)]

    def read(self, piece: Piece, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        """Yield one record a row of a shard."""
        shard = self._dataset.shard(num_shards=self._dataset.num_shards, index=piece.file)
        name = f"{self._name}, shard {piece.file}"
        for row, record in enumerate(shard):
            yield Place(name=name, row=row), record


def read_dataset(
    name: str, *, split: str, key: str, text_field: str | None, streaming: bool
) -> DatasetRows | DatasetStream:
    """Return a reader of the dataset that `open_dataset` finds."""
    opened = open_dataset(name, split=split, key=key, streaming=streaming)
    if isinstance(opened, datasets.IterableDataset):
        return DatasetStream(opened, name=name, text_field=text_field)
    return DatasetRows(opened, name=name, text_field=text_field)


def open_dataset(
    name: str, *, split: str, key: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Return one split of the dataset at a folder or hub name, or `name:configuration`.

    A folder written by `save_to_disk` is never streamed, since nothing of it must be fetched; one
    that holds a single dataset serves for every split. `key` is the setting that holds `name`, for
    messages.
    """
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            path, _, configuration = name.partition(":")
            path, configuration = CONFIGURATIONS.get(path, (path, configuration))
            loaded = datasets.load_dataset(path, configuration or None, streaming=streaming)
    except Exception as error:  # the package raises its own, the hub's and the network's kinds
        raise ValueError(
            f"{key} = {name!r} is no dataset of ours (python_stdlib, dummy, text, jsonl, parquet, "
            f"arrow, python_stdlib_chat, python_stdlib_preference) and the datasets package "
            f"cannot open it: {error}"
        ) from error
    if isinstance(loaded, datasets.Dataset | datasets.IterableDataset):
        return loaded
    if split not in loaded:
        raise ValueError(
            f"{key} = {name!r} has no split {split!r}, only {', '.join(map(repr, loaded))}; "
            "name a dataset that has it"
        )
    return loaded[split]
