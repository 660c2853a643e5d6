"""Tokenising a source in parallel processes: pieces in, the files of a token file out.

Memory does not grow with the source: processes hand back a few thousand documents at a time, and
what comes of a large piece waits on disk until its turn.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.cache import file_digest
from engine.data.formats import Document, Encode, Recipe
from engine.data.progress import Progress
from engine.data.readers import NUM_EXAMPLES, BadRecords, Piece, Place, Reader, Record
from engine.data.tokenizer import Tokenizer

MASK_NAME = "is_trained.bin"
PAIRS_NAME = "pairs.npy"
PIECES_AHEAD = 4
BATCH_CHARACTERS = 4 << 20
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What tokenising a source found, and what it took."""

    num_empty: int = 0
    """Records without text, left out."""

    num_untrained: int = 0
    """Documents without a token that is a label, left out."""

    num_bad: int = 0
    """Records that could not be used, left out under `data.on_bad_record` "skip"."""

    bad_examples: Sequence[str] = ()
    """The first of those: where they stand, and why they are bad."""

    seconds: float = 0.0
    """Wall-clock time that tokenising took."""

    num_processes: int = 1
    """Processes that tokenised."""


@dataclass(kw_only=True, slots=True)
class _Encoded:
    """Some documents of a piece, of about `BATCH_CHARACTERS`."""

    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    is_trained: npt.NDArray[np.bool_] | None
    pairs: npt.NDArray[np.int64] | None
    num_empty: int
    num_untrained: int
    num_bad: int
    bad_examples: list[tuple[Place, str]]


class Worker:
    """Encodes pieces; inherited by forked children, so nothing of it is pickled."""

    def __init__(
        self, *, reader: Reader, encode: Encode, tokenizer: Tokenizer, recipe: Recipe, name: str
    ) -> None:
        self.reader = reader
        self.name = name
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._encode = encode
        self._tokenizer = tokenizer
        self._recipe = recipe

    def pieces(self) -> list[Piece]:
        """Return the pieces to encode, numbered where the recipe draws by number."""
        return self.reader.pieces(numbered=bool(self._recipe.system_prompts))

    def encode(self, piece: Piece) -> Iterator[_Encoded]:
        """Yield the documents of a piece in parts, so that it may be larger than memory."""
        bad = BadRecords(self._recipe.on_bad_record)
        try:
            for records in _batches(self.reader.read(piece, bad)):
                yield self._encode_batch(records, bad)
        except OSError as error:
            raise ValueError(
                f"{error.filename or self.name} cannot be read ({error.strerror or error}); mend "
                "its permissions or its path"
            ) from error
        if bad.count:
            yield self._encode_batch((), bad)

    def _encode_batch(self, records: Iterable[tuple[Place, Record]], bad: BadRecords) -> _Encoded:
        """Return the documents of some records; empty and untrained ones are only counted."""
        found = self._encode(records, tokenizer=self._tokenizer, recipe=self._recipe, bad=bad)
        with_text = [document for document in found if document.ids]
        documents = [document for document in with_text if document.has_label]
        lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
        tokens = np.empty(int(lengths.sum()), dtype=self.dtype)
        start = 0
        for document in documents:
            tokens[start : start + len(document.ids)] = document.ids
            start += len(document.ids)
        num_bad, examples = bad.count, bad.examples
        bad.count, bad.examples = 0, []
        return _Encoded(
            tokens=tokens,
            lengths=lengths,
            is_trained=_mask(documents),
            pairs=_pairs(documents),
            num_empty=len(found) - len(with_text),
            num_untrained=len(with_text) - len(documents),
            num_bad=num_bad,
            bad_examples=examples,
        )


def _batches(
    records: Iterator[tuple[Place, Record]],
) -> Iterator[Iterator[tuple[Place, Record]]]:
    """Cut a stream of records into streams of about `BATCH_CHARACTERS`, without reading ahead."""
    for first in records:
        yield chain([first], _first_of(records, BATCH_CHARACTERS - _num_characters(first[1])))


def _first_of(
    records: Iterator[tuple[Place, Record]], num_characters: int
) -> Iterator[tuple[Place, Record]]:
    while num_characters > 0 and (found := next(records, None)) is not None:
        yield found
        num_characters -= _num_characters(found[1])


def _num_characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_num_characters, value))
    return 1


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


def _pairs(documents: list[Document]) -> npt.NDArray[np.int64] | None:
    """Return ids of the first sequence and whether it is wanted, (documents, 2); None: no pairs."""
    pairs = [document.pair for document in documents if document.pair is not None]
    assert len(pairs) in (0, len(documents)), "a format makes pairs of all its records, or of none"
    if not pairs:
        return None
    return np.array([(pair.first_tokens, pair.is_desirable) for pair in pairs], dtype=np.int64)


def _num_cpus() -> int:
    """Count the CPUs this process may use, which a container or a job can make fewer."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def write_tokens(target: Path, worker: Worker, num_processes: int) -> None:
    """Tokenise a source into the files of the empty folder `target`.

    `num_processes` 0 means one for each CPU that this process may use. Raises ValueError for a bad
    record where the recipe says so, and for a source without tokens.
    """
    started = time.perf_counter()
    pieces = worker.pieces()
    num_processes = max(1, min(num_processes or _num_cpus(), len(pieces)))
    digest = hashlib.blake2b(digest_size=16)
    lengths: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    pairs: list[npt.NDArray[np.int64]] = []
    examples: list[tuple[Place, str]] = []
    num_empty = num_untrained = num_bad = num_tokens = num_trained = 0
    with (
        open(target / "tokens.bin", "wb") as file,
        Progress(f"tokenising {worker.name}", total=len(pieces)) as progress,
    ):
        for batches in _encode_all(worker, pieces, num_processes, target):
            for encoded in batches:
                file.write(encoded.tokens.data)
                digest.update(encoded.tokens.data)
                _append_mask(target / MASK_NAME, encoded, num_tokens)
                lengths.append(encoded.lengths)
                pairs += [] if encoded.pairs is None else [encoded.pairs]
                mask = encoded.is_trained
                num_tokens += encoded.tokens.size
                num_trained += encoded.tokens.size if mask is None else int(mask.sum())
                num_empty += encoded.num_empty
                num_untrained += encoded.num_untrained
                num_bad += encoded.num_bad
                examples += encoded.bad_examples[: NUM_EXAMPLES - len(examples)]
                progress.say(f"{num_tokens:,} tokens")
            progress.advance(f"{num_tokens:,} tokens")
    offsets = np.cumsum(np.concatenate(lengths))
    if num_tokens == 0:
        raise ValueError(
            f"{worker.name} is empty: no document has text ({num_bad} bad records, {num_empty} "
            f"empty texts, {num_untrained} without a token to train); check the path, data.format "
            "and data.text_field"
        )
    np.save(target / "offsets.npy", offsets)
    digest.update(offsets.data)
    if pairs:
        np.save(target / PAIRS_NAME, joined := np.concatenate(pairs))
        digest.update(joined.data)
    if (target / MASK_NAME).exists():
        digest.update(file_digest(target / MASK_NAME).encode())
    facts = Facts(
        num_empty=num_empty,
        num_untrained=num_untrained,
        num_bad=num_bad,
        bad_examples=[f"{place}: {reason}" for place, reason in examples],
        seconds=round(time.perf_counter() - started, 3),
        num_processes=num_processes,
    )
    stored = {"dtype": worker.dtype.name, "digest": digest.hexdigest(), "num_trained": num_trained}
    (target / "facts.json").write_text(json.dumps({**stored, "facts": asdict(facts)}))


def _append_mask(path: Path, encoded: _Encoded, num_tokens_before: int) -> None:
    """Write which of a piece's tokens are labels; until a piece leaves one out there is no file."""
    mask = encoded.is_trained
    if mask is None and not path.exists():
        return
    with path.open("ab") as file:
        if file.tell() == 0:
            file.write(np.ones(num_tokens_before, dtype=np.bool_).data)
        file.write(np.ones(encoded.tokens.size, dtype=np.bool_).data if mask is None else mask.data)


def _encode_all(
    worker: Worker, pieces: list[Piece], num_processes: int, folder: Path
) -> Iterator[Iterable[_Encoded]]:
    """Yield the batches of each piece, in order; large pieces wait in files in `folder`."""
    if num_processes <= 1:
        yield from map(worker.encode, pieces)
        return
    executor = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_child,
        initargs=(worker, os.getpid()),
    )
    waiting: deque[Future[list[_Encoded] | Path]] = deque()
    try:
        for number, piece in enumerate(pieces):
            file = folder / f"piece-{number}.pickle"
            waiting.append(executor.submit(_encode_in_child, piece, file))
            if len(waiting) > PIECES_AHEAD * num_processes:
                yield _results(waiting.popleft().result())
        while waiting:
            yield _results(waiting.popleft().result())
    except BrokenProcessPool as error:
        raise ValueError(
            f"data.num_processes = {num_processes}: a tokenising process died, most likely for "
            "want of memory; use fewer"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_child_worker: list[Worker] = []


def _start_child(worker: Worker, parent_pid: int) -> None:
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


def _encode_in_child(piece: Piece, file: Path) -> list[_Encoded] | Path:
    """Return the batches of a piece, or if there are several the file that holds them."""
    batches = _child_worker[0].encode(piece)
    found = list(islice(batches, 2))
    if len(found) < 2:
        return found
    with file.open("wb") as opened:
        for encoded in chain(found, batches):
            pickle.dump(encoded, opened, protocol=pickle.HIGHEST_PROTOCOL)
    return file


def _results(found: list[_Encoded] | Path) -> Iterator[_Encoded]:
    if not isinstance(found, Path):
        yield from found
        return
    with found.open("rb") as opened:
        end = found.stat().st_size
        while opened.tell() < end:
            yield pickle.load(opened)
    found.unlink()
