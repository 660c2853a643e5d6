"""A source's tokens in one memory-mapped file, written once by parallel processes.

The file holds the documents back to back, with their marks, in the source's own order; shuffling
and cutting into rows happens in `packing.py`. Where not all tokens are labels, a second file says
which are.
"""

import ctypes
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.cache import build_once, digest_of, file_digest
from engine.data.formats import Document, Encode, Recipe, load_format, source_digest
from engine.data.progress import Progress
from engine.data.readers import NUM_EXAMPLES, BadRecords, Piece, Reader
from engine.data.tokenizer import Tokenizer

__all__ = ["Recipe", "TokenFile", "open_token_file"]

log = logging.getLogger("tessera")

LAYOUT = 2
MASK_NAME = "is_trained.bin"
PIECES_AHEAD = 4
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """Documents of token ids: document i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]

    digest: str
    """Digest of the tokens, the document borders and which tokens are labels."""

    is_trained: npt.NDArray[np.bool_] | None = None
    """For each token whether it is a label; None: all are. A document's first token never is one,
    whatever stands here."""

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document, its marks included."""
        return np.diff(self.offsets)


@dataclass(kw_only=True, slots=True)
class _Encoded:
    """What a process hands back for one piece."""

    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    is_trained: npt.NDArray[np.bool_] | None
    num_empty: int
    num_untrained: int
    bad: BadRecords

    @property
    def num_trained(self) -> int:
        """Tokens that are labels."""
        return self.tokens.size if self.is_trained is None else int(self.is_trained.sum())


def open_token_file(
    reader: Reader,
    *,
    name: str,
    tokenizer: Tokenizer,
    recipe: Recipe,
    root: Path,
    num_processes: int,
) -> TokenFile:
    """Return the token file of a source, tokenising it first if no process ever did.

    The key under `root` covers the bytes of the data, of the tokenizer and of the format's source,
    and `recipe`.
    `num_processes` 0 means one for each CPU that this process may use.
    """
    encode = load_format(recipe.format)
    made_by = (tokenizer.fingerprint, asdict(recipe), source_digest(encode))
    key = digest_of(LAYOUT, reader.digest(root), *made_by)
    worker = _Worker(reader=reader, encode=encode, tokenizer=tokenizer, recipe=recipe)
    folder = build_once(
        root / "tokens" / key,
        f"tokenising {name}",
        lambda target: _write(target, worker, name, num_processes or _num_cpus()),
    )
    facts = json.loads((folder / "facts.json").read_text())
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    log.info(
        "%s: %s documents, %s tokens, %s empty texts left out, %s bad records skipped",
        *(name, *(f"{n:,}" for n in (len(offsets) - 1, offsets[-1], facts["num_empty"]))),
        f"{facts['num_bad']:,}",
    )
    for example in facts["bad_examples"]:
        log.info("skipped %s", example)
    is_trained = None
    if (folder / MASK_NAME).is_file():
        is_trained = np.memmap(folder / MASK_NAME, dtype=np.bool_, mode="r")
        log.info(
            "%s: %s tokens are trained, %s documents without such a token left out",
            *(name, f"{facts['num_trained']:,}", f"{facts['num_untrained']:,}"),
        )
    return TokenFile(
        tokens=np.memmap(folder / "tokens.bin", dtype=np.dtype(facts["dtype"]), mode="r"),
        offsets=offsets,
        digest=facts["digest"],
        is_trained=is_trained,
    )


class _Worker:
    """Encodes pieces; inherited by forked children, so nothing of it is pickled."""

    def __init__(
        self, *, reader: Reader, encode: Encode, tokenizer: Tokenizer, recipe: Recipe
    ) -> None:
        self.reader = reader
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._encode = encode
        self._tokenizer = tokenizer
        self._recipe = recipe

    def pieces(self) -> list[Piece]:
        """Return the pieces to encode, numbered where the recipe draws by number."""
        return self.reader.pieces(numbered=bool(self._recipe.system_prompts))

    def encode(self, piece: Piece) -> _Encoded:
        """Return the documents of one piece; empty and untrained ones are only counted."""
        bad = BadRecords(self._recipe.on_bad_record)
        records = self.reader.read(piece, bad)
        found = self._encode(records, tokenizer=self._tokenizer, recipe=self._recipe, bad=bad)
        with_text = [document for document in found if document.ids]
        documents = [document for document in with_text if document.has_label]
        lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
        tokens = np.empty(int(lengths.sum()), dtype=self.dtype)
        start = 0
        for document in documents:
            tokens[start : start + len(document.ids)] = document.ids
            start += len(document.ids)
        return _Encoded(
            tokens=tokens,
            lengths=lengths,
            is_trained=_mask(documents),
            num_empty=len(found) - len(with_text),
            num_untrained=len(with_text) - len(documents),
            bad=bad,
        )


def _mask(documents: list[Document]) -> npt.NDArray[np.bool_] | None:
    """Return which tokens of all documents are labels, None where no document leaves one out."""
    if all(document.is_trained is None for document in documents):
        return None
    return np.concatenate(
        [
            np.ones(len(document.ids), dtype=np.bool_)
            if document.is_trained is None
            else document.is_trained
            for document in documents
        ]
    )


def _num_cpus() -> int:
    """Count the CPUs this process may use, which a container or a job can make fewer."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _write(target: Path, worker: _Worker, name: str, num_processes: int) -> None:
    pieces = worker.pieces()
    digest = hashlib.blake2b(digest_size=16)
    lengths: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    bad = BadRecords("skip")
    num_empty = num_untrained = num_tokens = num_trained = 0
    with (
        open(target / "tokens.bin", "wb") as file,
        Progress(f"tokenising {name}", total=len(pieces)) as progress,
    ):
        for encoded in _encode_all(worker, pieces, num_processes):
            file.write(encoded.tokens.data)
            digest.update(encoded.tokens.data)
            _append_mask(target / MASK_NAME, encoded, num_tokens)
            lengths.append(encoded.lengths)
            num_tokens += encoded.tokens.size
            num_trained += encoded.num_trained
            num_empty += encoded.num_empty
            num_untrained += encoded.num_untrained
            bad.count += encoded.bad.count
            bad.examples += encoded.bad.examples[: NUM_EXAMPLES - len(bad.examples)]
            progress.advance(f"{num_tokens:,} tokens")
    offsets = np.cumsum(np.concatenate(lengths))
    if num_tokens == 0:
        raise ValueError(
            f"{name} is empty: no document has text ({bad.count} bad records, {num_empty} empty "
            f"texts, {num_untrained} without a token to train); check the path, data.format and "
            "data.text_field"
        )
    np.save(target / "offsets.npy", offsets)
    digest.update(offsets.data)
    if (target / MASK_NAME).exists():
        digest.update(file_digest(target / MASK_NAME).encode())
    facts = {
        "dtype": worker.dtype.name,
        "digest": digest.hexdigest(),
        "num_empty": num_empty,
        "num_trained": num_trained,
        "num_untrained": num_untrained,
        "num_bad": bad.count,
        "bad_examples": [f"{place}: {reason}" for place, reason in bad.examples],
    }
    (target / "facts.json").write_text(json.dumps(facts))


def _append_mask(path: Path, encoded: _Encoded, num_tokens_before: int) -> None:
    """Write which of a piece's tokens are labels; until a piece leaves one out there is no file."""
    mask = encoded.is_trained
    if mask is None and not path.exists():
        return
    with path.open("ab") as file:
        if file.tell() == 0:
            file.write(np.ones(num_tokens_before, dtype=np.bool_).data)
        file.write(np.ones(encoded.tokens.size, dtype=np.bool_).data if mask is None else mask.data)


def _encode_all(worker: _Worker, pieces: list[Piece], num_processes: int) -> Iterator[_Encoded]:
    num_processes = min(num_processes, len(pieces))
    if num_processes <= 1:
        yield from map(worker.encode, pieces)
        return
    executor = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_child,
        initargs=(worker, os.getpid()),
    )
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for piece in pieces:
            waiting.append(executor.submit(_encode_in_child, piece))
            if len(waiting) > PIECES_AHEAD * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"data.num_processes = {num_processes}: a tokenising process died, most likely for "
            "want of memory; use fewer"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_child_worker: list[_Worker] = []


def _start_child(worker: _Worker, parent_pid: int) -> None:
    # The parent decides when to stop; a killed parent takes its children along.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    # The threads of the tokenizers package do not survive a fork; waiting for them would hang.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _child_worker[:] = [worker]


def _encode_in_child(piece: Piece) -> _Encoded:
    return _child_worker[0].encode(piece)
