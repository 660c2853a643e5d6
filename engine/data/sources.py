"""Rows by global number: the one thing training and validation read, whatever the data is.

Row `i` is a pure function of (seed, epoch, i), with epoch = i // rows_per_epoch; nothing here knows
of ranks. Dealing rows to ranks is `loader.py`'s.
"""

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.cache import cache_root, digest_of
from engine.data.packing import ConcatPacking, OneDocumentPacking, Packing, mix_words
from engine.data.readers import JsonLines, Parquet, Reader, TextFiles, find_files
from engine.data.stdlib import Split, stdlib_files
from engine.data.token_file import Recipe, TokenFile, open_token_file
from engine.data.tokenizer import Tokenizer

log = logging.getLogger("tessera")

BUILTIN_DATASET = "python_stdlib"
BUILTIN_ALIASES = ("c4_test", "c4_validation")
FILE_SUFFIXES = {
    "text": (".txt", ".md", ".py"),
    "json": (".jsonl", ".json"),
    "jsonl": (".jsonl", ".json"),
    "parquet": (".parquet",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How text becomes rows of tokens."""

    format: str = "text"
    """What a record holds: the name of a file in engine/data/formats, or the dotted path of a
    module of one's own with a function `encode`."""

    text_field: str = "text"
    """Field or column of a record that holds its text."""

    bos: bool = True
    """Begin each document with the tokenizer's beginning mark, if it has one."""

    eos: bool = True
    """End each document with the tokenizer's end mark, if it has one."""

    packing: Literal["concat", "none"] = "concat"
    """Join documents and cut the stream into full rows, or put one document in each row."""

    stride: int = 0
    """Tokens from the start of one row to the next under packing "concat"; 0 is the row's length.
    A smaller stride repeats context, whose labels are trained once."""

    last_row: Literal["keep", "drop"] = "keep"
    """Pad the unfilled last row of an epoch under packing "concat", or leave it out."""

    long_document: Literal["truncate", "drop", "error"] = "truncate"
    """What happens under packing "none" to a document longer than the row; the first two count."""

    on_bad_record: Literal["raise", "skip"] = "raise"
    """Stop at a record that cannot be read or has no text, or count it and go on."""

    cache_folder: str = ""
    """Folder of the token files and the built-in tokenizer; empty means `tessera` in the user's
    cache folder."""

    num_processes: int = 0
    """Processes that tokenise on the first start; 0 is one for each CPU this process may use."""

    dummy_tokens: int = 1 << 30
    """Tokens in an epoch of the `dummy` dataset."""

    def __post_init__(self) -> None:
        for name, least in (("stride", 0), ("num_processes", 0), ("dummy_tokens", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"data.{name} = {value}; give a whole number from {least} up")
        if self.stride and self.packing != "concat":
            raise ValueError(
                f"data.stride = {self.stride} has no meaning with data.packing = "
                f"{self.packing!r}; remove it or use packing 'concat'"
            )


class RowSource(Protocol):
    """Endless rows of one length; `row(i)` is the same on every rank, worker and run."""

    seq_len: int
    rows_per_epoch: int
    vocab_size: int

    one_document_per_row: bool
    """No row ever holds a second document. A property of the source, not of a batch, so that the
    compiled model sees one kind of mask for the whole run."""

    fingerprint: str
    """Digest of everything that decides the rows, for a run's provenance."""

    def row(self, index: int) -> Row:
        """Return the row with a global number, counted over all epochs."""
        ...


class TokenRows:
    """Rows packed from a token file."""

    def __init__(
        self, file: TokenFile, packing: Packing, *, seq_len: int, vocab_size: int, fingerprint: str
    ) -> None:
        self._file = file
        self._packing = packing
        self.one_document_per_row = isinstance(packing, OneDocumentPacking)
        self.seq_len = seq_len
        self.rows_per_epoch = packing.rows_per_epoch
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint

    def row(self, index: int) -> Row:
        """Return a row: its documents numbered from 1, and padding behind them."""
        plan = self._packing.plan(*divmod(index, self.rows_per_epoch))
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORED_LABEL, dtype=np.int64)
        positions = np.zeros(self.seq_len, dtype=np.int64)
        documents = np.full(self.seq_len, PADDING_DOCUMENT, dtype=np.int64)
        begin = 0
        for number, part in enumerate(plan.slices, start=1):
            end = begin + part.stop - part.start
            first, past = self._file.offsets[part.document : part.document + 2]
            text = self._file.tokens[first + part.start : min(first + part.stop + 1, past)]
            tokens[begin:end] = text[: end - begin]
            labels[begin : begin + len(text) - 1] = text[1:]
            positions[begin:end] = np.arange(end - begin)
            documents[begin:end] = number
            begin = end
        positions[begin:] = np.arange(self.seq_len - begin)
        labels[: plan.num_counted_labels] = IGNORED_LABEL
        return _row(tokens, labels, positions, documents)


class DummyRows:
    """Random tokens, one document a row, a function of the seed and the row's number alone."""

    one_document_per_row = True

    def __init__(self, *, seq_len: int, vocab_size: int, num_tokens: int, seed: int) -> None:
        self.seq_len = seq_len
        self.rows_per_epoch = -(-num_tokens // seq_len)
        self.vocab_size = vocab_size
        self.fingerprint = digest_of("dummy", seq_len, vocab_size, num_tokens, seed)
        self._key = int(digest_of("dummy", seed)[:16], 16)

    def row(self, index: int) -> Row:
        """Return a row; the label of its last token is drawn like the others."""
        first = index * (self.seq_len + 1)
        places = np.arange(first, first + self.seq_len + 1, dtype=np.uint64)
        tokens = (mix_words(places, self._key) % self.vocab_size).astype(np.int64)
        positions = np.arange(self.seq_len, dtype=np.int64)
        return _row(tokens[:-1], tokens[1:], positions, np.ones(self.seq_len, dtype=np.int64))


def open_rows(
    dataset: str,
    dataset_path: str | None,
    *,
    split: Split,
    seq_len: int,
    seed: int,
    tokenizer: Tokenizer,
    config: DataConfig,
    shuffle: bool,
) -> RowSource:
    """Return the rows of a dataset; a machine's first rank tokenises it, the others wait.

    `dataset` is `python_stdlib` (the built-in corpus, split by a hash of each file's path),
    `dummy`, one of `text`, `jsonl` (or `json`) and `parquet`, whose `dataset_path` is a file, a
    folder or a pattern, or else a name or folder for the `datasets` package, which `dataset_path`
    overrides. Files serve whole for the split that names them.
    """
    section = "training" if split == "train" else "validation"
    if dataset == "dummy":
        return DummyRows(
            seq_len=seq_len,
            vocab_size=tokenizer.vocab_size,
            num_tokens=config.dummy_tokens,
            seed=int(digest_of(seed, split)[:8], 16),
        )
    root = cache_root(config.cache_folder)
    name = " ".join(filter(None, (dataset, dataset_path, split)))
    file = open_token_file(
        _open_reader(dataset, dataset_path, split, section, config),
        name=name,
        tokenizer=tokenizer,
        recipe=Recipe(
            format=config.format,
            text_field=config.text_field,
            add_bos=config.bos,
            add_eos=config.eos,
            on_bad_record=config.on_bad_record,
        ),
        root=root,
        num_processes=config.num_processes,
    )
    packing = _open_packing(file, name, seq_len=seq_len, seed=seed, config=config, shuffle=shuffle)
    settings = (config.packing, config.stride, config.last_row, config.long_document)
    return TokenRows(
        file,
        packing,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        fingerprint=digest_of(file.digest, seq_len, seed if shuffle else None, *settings),
    )


def _open_reader(
    dataset: str, path: str | None, split: Split, section: str, config: DataConfig
) -> Reader:
    if dataset == BUILTIN_DATASET or (dataset in BUILTIN_ALIASES and not path):
        if dataset != BUILTIN_DATASET:
            log.info("%s.dataset = %r stands for %r", section, dataset, BUILTIN_DATASET)
        return TextFiles(stdlib_files(split), text_field=config.text_field, errors="replace")
    suffixes = FILE_SUFFIXES.get(dataset)
    if suffixes is None:
        from engine.data.hugging_face import DatasetRows, open_dataset  # slow to import

        key = f"{section}.dataset_path" if path else f"{section}.dataset"
        opened = open_dataset(path or dataset, split=split, key=key)
        return DatasetRows(opened, name=path or dataset, text_field=config.text_field)
    if not path:
        raise ValueError(
            f"{section}.dataset = {dataset!r} needs {section}.dataset_path: a file, a folder or a "
            "pattern"
        )
    files = find_files(path, suffixes, f"{section}.dataset_path")
    if dataset == "parquet":
        return Parquet(files, text_field=config.text_field)
    if dataset == "text":
        return TextFiles(files, text_field=config.text_field)
    return JsonLines(files)


def _open_packing(
    file: TokenFile, name: str, *, seq_len: int, seed: int, config: DataConfig, shuffle: bool
) -> Packing:
    if config.packing == "none":
        num_long = int((file.lengths() > seq_len).sum())
        if num_long and config.long_document == "error":
            raise ValueError(
                f"{name}: {num_long:,} documents are longer than a row of {seq_len:,} tokens (the "
                f"longest has {file.lengths().max():,}); raise training.seq_len, use data.packing "
                "= 'concat', or set data.long_document to 'truncate' or 'drop'"
            )
        if num_long:
            done = "left out" if config.long_document == "drop" else "cut"
            log.info("%s: %s documents longer than a row are %s", name, f"{num_long:,}", done)
        packing: Packing = OneDocumentPacking(
            file.offsets,
            seq_len=seq_len,
            drop_long=config.long_document == "drop",
            seed=seed,
            shuffle=shuffle,
        )
    else:
        if config.stride > seq_len:
            raise ValueError(
                f"data.stride = {config.stride} is longer than a row of {seq_len} tokens, so text "
                "would be passed over; use 0 or at most the row's length"
            )
        packing = ConcatPacking(
            file.offsets,
            seq_len=seq_len,
            stride=config.stride or seq_len,
            keep_last=config.last_row == "keep",
            seed=seed,
            shuffle=shuffle,
        )
        done = "padded" if config.last_row == "keep" else "left out"
        log.info("%s: last row of %s tokens is %s", name, f"{packing.num_tail_tokens:,}", done)
    if packing.rows_per_epoch == 0:
        raise ValueError(
            f"{name}: its {len(file.tokens):,} tokens fill no row of {seq_len:,}; give more text, "
            "lower training.seq_len, or set data.last_row = 'keep'"
        )
    return packing


def _row(
    tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray, documents: np.ndarray
) -> Row:
    return Row(
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        positions_T=torch.from_numpy(positions),
        documents_T=torch.from_numpy(documents),
    )
