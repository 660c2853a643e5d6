"""What `training.dataset` and `training.dataset_path` name, as a reader of records."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.data.config import SourceConfig
from engine.data.readers import JsonLines, Reader, TextFiles, find_files
from engine.data.stdlib import Split, stdlib_files
from engine.data.stdlib_chats import stdlib_chats
from engine.data.stdlib_pairs import stdlib_pairs

log = logging.getLogger("tessera")

BUILTIN_DATASET = "python_stdlib"
BUILTIN_ALIASES = ("c4_test", "c4_validation")
BUILTIN_RECORDS: Mapping[str, Callable[[Split, Path], Path]] = {
    "python_stdlib_chat": stdlib_chats,
    "python_stdlib_preference": stdlib_pairs,
}
TEXT_SUFFIXES = (".txt", ".md", ".py", ".txt.gz", ".md.gz", ".py.gz")
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
FILE_SUFFIXES = {
    "text": TEXT_SUFFIXES,
    "json": JSON_SUFFIXES,
    "jsonl": JSON_SUFFIXES,
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}


def open_reader(
    dataset: str,
    path: str | None,
    *,
    split: Split,
    text_field: str,
    only_text: bool,
    root: Path,
    source: SourceConfig | None = None,
    streaming: bool = False,
) -> Reader:
    """Return the reader of a dataset.

    `dataset` is `python_stdlib` (the built-in corpus, split by a hash of each file's path),
    `python_stdlib_chat` (chats about it, written below the cache folder `root`),
    `python_stdlib_preference` (pairs of answers, likewise; JSON lines in `path` take the place of
    either), one of `text`, `jsonl` (or `json`), `parquet` and `arrow`, whose `path` is a file, a
    folder or a pattern, or else a name or folder for the `datasets` package, which `path`
    overrides. Files serve whole for the split that names them. Of tables `only_text` reads the
    column `text_field` alone. `source` is the table of the configuration that names the dataset,
    for messages and its split. With `streaming` a dataset of the package is not downloaded first,
    but read as it is asked for.
    """
    dataset_key, path_key = _keys(split, source)
    column = text_field if only_text else None
    if dataset in BUILTIN_RECORDS:
        if path:
            return JsonLines(find_files(path, JSON_SUFFIXES, path_key))
        return JsonLines([BUILTIN_RECORDS[dataset](split, root)])
    if dataset == BUILTIN_DATASET and path:
        raise ValueError(
            f"{path_key} = {path!r} would not be read: {dataset_key} = {dataset!r} is the built-in "
            f"corpus; leave the path out, or set {dataset_key} to 'text', 'jsonl' or what it is"
        )
    if dataset == BUILTIN_DATASET or (dataset in BUILTIN_ALIASES and not path):
        if dataset != BUILTIN_DATASET:
            log.info("%s = %r stands for %r", dataset_key, dataset, BUILTIN_DATASET)
        return TextFiles(stdlib_files(split), text_field=text_field, errors="replace")
    suffixes = FILE_SUFFIXES.get(dataset)
    if suffixes is None:
        from engine.data.hugging_face import read_dataset  # slow to import

        key = path_key if path else dataset_key
        part = (source and source.split) or split
        name = path or dataset
        return read_dataset(name, split=part, key=key, text_field=column, streaming=streaming)
    if not path:
        raise ValueError(
            f"{dataset_key} = {dataset!r} needs {path_key}: a file, a folder or a pattern"
        )
    files = find_files(path, suffixes, path_key)
    if dataset in ("parquet", "arrow"):
        from engine.data.tables import ArrowFiles, Parquet  # slow to import

        return (Parquet if dataset == "parquet" else ArrowFiles)(files, text_field=column)
    if dataset == "text":
        return TextFiles(files, text_field=text_field)
    return JsonLines(files)


def _keys(split: Split, source: SourceConfig | None) -> tuple[str, str]:
    """Return the settings that name the dataset and its path."""
    if source is not None:
        section = "data" if split == "train" else "validation"
        return f"{section}.sources.{source.name}.dataset", f"{section}.sources.{source.name}.path"
    section = "training" if split == "train" else "validation"
    return f"{section}.dataset", f"{section}.dataset_path"
