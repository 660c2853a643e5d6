"""Rows by global number: the one thing training and validation read, whatever the data is.

Row `i` is a pure function of (seed, epoch, i), with epoch = i // rows_per_epoch; nothing here knows
of ranks. Dealing rows to ranks is `loader.py`'s.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.best_fit import BestFitPacking
from engine.data.cache import cache_root, digest_of
from engine.data.chat_templates import template_text
from engine.data.named_sources import open_reader
from engine.data.packing import ConcatPacking, OneDocumentPacking, Packing, mix_words
from engine.data.slices import cut_documents
from engine.data.stdlib import Split
from engine.data.token_file import Recipe, TokenFile, open_token_file
from engine.data.tokenizer import Tokenizer

log = logging.getLogger("tessera")

CHAT_KEYS = {
    "chat_template": "",
    "train_on": "assistant",
    "system_prompts": [],
    "system_prompt_rate": 1.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How text becomes rows of tokens."""

    format: str = "text"
    """What a record holds: the name of a file in engine/data/formats, or the dotted path of a
    module of one's own with a function `encode`."""

    text_field: str = "text"
    """Field or column of a record that holds its text; chats also stand in `messages` or
    `conversations`."""

    bos: bool = True
    """Begin each document with the tokenizer's beginning mark, if it has one; chats have only the
    marks of their template."""

    eos: bool = True
    """End each document with the tokenizer's end mark, if it has one; chats likewise."""

    chat_template: str = ""
    """How chats are written: the name of a file in engine/data/chat_templates, or the path of a
    Jinja file; empty takes the tokenizer's own. The model is exported with it."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of chats and completions are trained: what the assistant writes, in all its
    turns or in the last one, its end of turn included; or every token, prompts too."""

    system_prompts: list[str] = field(default_factory=list[str])
    """Texts of which a chat without a system turn gets one, drawn by the seed and the number of
    the record."""

    system_prompt_rate: float = 1.0
    """Share of the chats without a system turn that get one of `system_prompts`."""

    packing: Literal["concat", "best_fit", "none"] = "concat"
    """Join documents and cut the stream into full rows; fit whole documents into rows and cut none
    that fits; or put one document in each row."""

    stride: int = 0
    """Tokens from the start of one row to the next under packing "concat"; 0 is the row's length.
    A smaller stride repeats context, whose labels are trained once."""

    last_row: Literal["keep", "drop"] = "keep"
    """Pad the unfilled last row of an epoch under packing "concat", or leave it out."""

    long_document: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What happens under packing "best_fit" and "none" to a document longer than the row: cut it
    there, leave it out, cut it into several that do not see each other, or stop. Each is counted
    in the log."""

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
        self._check_chat_keys()
        others = ("last_row", "stride") if self.packing != "concat" else ("long_document",)
        default = {"last_row": "keep", "stride": 0, "long_document": "truncate"}
        for name in others:
            if (value := getattr(self, name)) != default[name]:
                uses_it = "'best_fit' or 'none'" if self.packing == "concat" else "'concat'"
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.packing = "
                    f"{self.packing!r}; remove it or use packing {uses_it}"
                )

    def _check_chat_keys(self) -> None:
        for name, default in CHAT_KEYS.items():
            if self.format == "text" and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.format = 'text'; remove it, "
                    "or set data.format = 'chat'"
                )
        if not 0.0 <= self.system_prompt_rate <= 1.0:
            raise ValueError(
                f"data.system_prompt_rate = {self.system_prompt_rate}; give a share from 0 to 1"
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
            here = slice(first + part.start, min(first + part.stop + 1, past))
            text = self._file.tokens[here]
            tokens[begin:end] = text[: end - begin]
            labels[begin : begin + len(text) - 1] = self._labels(here)[1:]
            positions[begin:end] = np.arange(end - begin)
            documents[begin:end] = number
            begin = end
        positions[begin:] = np.arange(self.seq_len - begin)
        labels[: plan.num_counted_labels] = IGNORED_LABEL
        return _row(tokens, labels, positions, documents)

    def _labels(self, here: slice) -> npt.NDArray[np.int64]:
        """Return the tokens of a part of the file, those that are not trained masked."""
        labels = self._file.tokens[here].astype(np.int64)
        if self._file.is_trained is not None:
            labels[~self._file.is_trained[here]] = IGNORED_LABEL
        return labels


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

    `dataset` and `dataset_path` are those of `open_reader`, or `dummy`.
    """
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
        open_reader(
            dataset,
            dataset_path,
            split=split,
            text_field=config.text_field,
            # Plain text is one column of a table; other formats look at whole records.
            only_text=config.format == "text",
            root=root,
        ),
        name=name,
        tokenizer=tokenizer,
        recipe=_recipe(config, seed),
        root=root,
        num_processes=config.num_processes,
    )
    if config.format == "chat" and config.packing == "concat":
        log.warning("%s: chats are cut where a row ends; data.packing = 'best_fit' cuts none", name)
    packing = _open_packing(file, name, seq_len=seq_len, seed=seed, config=config, shuffle=shuffle)
    settings = (config.packing, config.stride, config.last_row, config.long_document)
    return TokenRows(
        file,
        packing,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        fingerprint=digest_of(file.digest, seq_len, seed if shuffle else None, *settings),
    )


def _recipe(config: DataConfig, seed: int) -> Recipe:
    return Recipe(
        format=config.format,
        text_field=config.text_field,
        add_bos=config.bos,
        add_eos=config.eos,
        on_bad_record=config.on_bad_record,
        chat_template=template_text(config.chat_template),
        train_on=config.train_on,
        system_prompts=tuple(config.system_prompts),
        system_prompt_rate=config.system_prompt_rate,
        seed=seed if config.system_prompts else 0,
    )


def _open_packing(
    file: TokenFile, name: str, *, seq_len: int, seed: int, config: DataConfig, shuffle: bool
) -> Packing:
    if config.stride > seq_len:
        raise ValueError(
            f"data.stride = {config.stride} is longer than a row of {seq_len} tokens, so text "
            "would be passed over; use 0 or at most the row's length"
        )
    if config.packing == "concat":
        packing: Packing = ConcatPacking(
            file.offsets,
            seq_len=seq_len,
            stride=config.stride or seq_len,
            keep_last=config.last_row == "keep",
            seed=seed,
            shuffle=shuffle,
        )
        done = "padded" if config.last_row == "keep" else "left out"
        note = f"last row of {packing.num_tail_tokens:,} tokens is {done}"
    else:
        slices = cut_documents(
            file.offsets,
            name,
            seq_len=seq_len,
            long_document=config.long_document,
            is_trained=file.is_trained,
        )
        note = slices.summary
        if config.packing == "best_fit":
            packing = BestFitPacking(slices, seq_len=seq_len, seed=seed, shuffle=shuffle)
        else:
            packing = OneDocumentPacking(slices, seed=seed, shuffle=shuffle)
    if packing.rows_per_epoch == 0:
        remedy = (
            "give more text, lower training.seq_len, or set data.last_row = 'keep'"
            if config.packing == "concat"
            else "raise training.seq_len, or set data.long_document = 'truncate' or 'split'"
        )
        raise ValueError(
            f"{name}: its {len(file.tokens):,} tokens fill no row of {seq_len:,}; {remedy}"
        )
    fill = packing.tokens_per_epoch / (packing.rows_per_epoch * seq_len)
    log.info(
        "%s: packing %s puts %s documents in %s rows of %s tokens, fill %.4f; %s",
        *(name, config.packing, f"{len(file.offsets) - 1:,}"),
        *(f"{packing.rows_per_epoch:,}", f"{seq_len:,}", fill, note),
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
