"""What `training.dataset` and `training.dataset_path` name, as a reader of records."""

import logging
from pathlib import Path

from engine.data.readers import JsonLines, Reader, TextFiles, find_files
from engine.data.stdlib import Split, stdlib_files
from engine.data.stdlib_chats import stdlib_chats

log = logging.getLogger("tessera")

BUILTIN_DATASET = "python_stdlib"
BUILTIN_ALIASES = ("c4_test", "c4_validation")
BUILTIN_CHATS = "python_stdlib_chat"
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
) -> Reader:
    """Return the reader of a dataset.

    `dataset` is `python_stdlib` (the built-in corpus, split by a hash of each file's path),
    `python_stdlib_chat` (chats about it, written below the cache folder `root`), one of `text`,
    `jsonl` (or `json`), `parquet` and `arrow`, whose `path` is a file, a folder or a pattern, or
    else a name or folder for the `datasets` package, which `path` overrides. Files serve whole for
    the split that names them. Of tables `only_text` reads the column `text_field` alone.
    """
    section = "training" if split == "train" else "validation"
    column = text_field if only_text else None
    if dataset == BUILTIN_CHATS:
        return JsonLines([stdlib_chats(split, root)])
    if dataset == BUILTIN_DATASET or (dataset in BUILTIN_ALIASES and not path):
        if dataset != BUILTIN_DATASET:
            log.info("%s.dataset = %r stands for %r", section, dataset, BUILTIN_DATASET)
        return TextFiles(stdlib_files(split), text_field=text_field, errors="replace")
    suffixes = FILE_SUFFIXES.get(dataset)
    if suffixes is None:
        from engine.data.hugging_face import DatasetRows, open_dataset  # slow to import

        key = f"{section}.dataset_path" if path else f"{section}.dataset"
        opened = open_dataset(path or dataset, split=split, key=key)
        return DatasetRows(opened, name=path or dataset, text_field=column)
    if not path:
        raise ValueError(
            f"{section}.dataset = {dataset!r} needs {section}.dataset_path: a file, a folder or a "
            "pattern"
        )
    files = find_files(path, suffixes, f"{section}.dataset_path")
    if dataset in ("parquet", "arrow"):
        from engine.data.tables import ArrowFiles, Parquet  # slow to import

        return (Parquet if dataset == "parquet" else ArrowFiles)(files, text_field=column)
    if dataset == "text":
        return TextFiles(files, text_field=text_field)
    return JsonLines(files)
