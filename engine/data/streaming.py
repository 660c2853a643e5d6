"""Rows of a source that is read as it goes, without a preparation that tokenises it first.

Document d of the stream belongs to lane d mod V, V being the rows of one optimizer step. Each lane
packs its own documents, and global row i is row i // V of lane i mod V. So rows are a function of
the records, the seed and V alone, and a rank only reads past the documents of lanes that are not
its own. There is no state to save: to begin in the middle is to read from the beginning.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from engine.data.batch import Row
from engine.data.cache import digest_of
from engine.data.formats import Document, Recipe, load_format, source_digest
from engine.data.packing import Permutation, mix_words
from engine.data.readers import NUM_EXAMPLES, BadRecords, Place, Reader, Record
from engine.data.rows import Part, assemble
from engine.data.slices import cut_documents
from engine.data.tokenizer import Tokenizer

log = logging.getLogger("tessera")

BLOCK_RECORDS = 32
MOST_RECORDS_WITHOUT_TEXT = 10_000
ENDLESS = 1 << 62

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """What decides the rows of a stream, beside its records and the tokenizer."""

    seq_len: int
    seed: int
    num_lanes: int
    """Rows of one optimizer step."""

    buffer_size: int
    """Records among which the next one is drawn."""

    packing: Literal["concat", "none"]
    long_document: Literal["truncate", "drop", "split", "error"]


class StreamedRows:
    """Rows that are made as records come in; `row` is fast for rows in ascending order.

    A row that was passed by, or that belongs to a lane of which no row was asked so far, makes it
    read from the beginning again.
    """

    rows_per_epoch = tokens_per_epoch = ENDLESS
    batches = None

    def __init__(
        self,
        reader: Reader,
        *,
        name: str,
        tokenizer: Tokenizer,
        recipe: Recipe,
        settings: StreamSettings,
        lanes: Collection[int] = (),
    ) -> None:
        self.seq_len = settings.seq_len
        self.vocab_size = tokenizer.vocab_size
        self.source_names = (name,)
        self.one_document_per_row = settings.packing == "none"
        self._reader = reader
        self._name = name
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._settings = settings
        self._encode = load_format(recipe.format)
        made_by = (tokenizer.fingerprint, asdict(recipe), source_digest(self._encode))
        self.fingerprint = digest_of("stream", name, reader.pieces(), *made_by, asdict(settings))
        self._rewind(lanes)

    def sharing(self, lanes: Collection[int]) -> "StreamedRows":
        """Return the same rows, at their beginning, for one who will ask for those of `lanes`."""
        return StreamedRows(
            self._reader,
            name=self._name,
            tokenizer=self._tokenizer,
            recipe=self._recipe,
            settings=self._settings,
            lanes=lanes,
        )

    def row(self, index: int) -> Row:
        """Return the row with a global number."""
        place, number = divmod(index, self._settings.num_lanes)
        if number not in self._lanes or place < self._lanes[number].num_rows:
            self._rewind({*self._lanes, number})
        if place > self._lanes[number].num_rows:
            self._pass_by(place, index)
        return assemble(self._take(self._lanes[number]), seq_len=self.seq_len)

    def attention_cost(self, index: int) -> int:
        """Return 0: which rows a rank reads is decided before they are read."""
        return 0

    def _rewind(self, lanes: Collection[int]) -> None:
        self._lanes = {number: _Lane() for number in sorted(lanes)}
        self._unreadable = _BadRecords(self._recipe.on_bad_record)
        self._unusable = _BadRecords(self._recipe.on_bad_record)
        self._num_without_text = 0
        self._records = self._all_passes()

    def _pass_by(self, place: int, index: int) -> None:
        """Make every lane's rows up to `place` and drop them, all lanes alike: none piles up."""
        started, is_first = time.monotonic(), not any(one.num_rows for one in self._lanes.values())
        if is_first:
            log.info("%s: reading from the beginning again, to row %s", self._name, f"{index:,}")
        while any(one.num_rows < place for one in self._lanes.values()):
            for one in self._lanes.values():
                if one.num_rows < place:
                    self._take(one)
        if is_first:
            seconds = time.monotonic() - started
            log.info("%s: is at row %s again, after %.1f s", self._name, f"{index:,}", seconds)

    def _take(self, lane: "_Lane") -> list[Part]:
        """Return the next row of a lane as parts of its documents."""
        parts: list[Part] = []
        room = self.seq_len
        while room and not (parts and self.one_document_per_row):
            while not lane.waiting:
                self._read_block()
            one = lane.waiting.popleft()
            stop = min(one.start + room, one.stop)
            parts.append(one.part(stop))
            room -= stop - one.start
            if stop < one.stop:
                lane.waiting.appendleft(replace(one, start=stop))
        lane.num_rows += 1
        return parts

    def _read_block(self) -> None:
        """Read on, and hand the next documents of our own lanes to them."""
        num_lanes = self._settings.num_lanes
        ours = (one for one in self._records if one[0].number % num_lanes in self._lanes)
        mine = list(itertools.islice(ours, BLOCK_RECORDS))
        documents = self._encode(
            mine, tokenizer=self._tokenizer, recipe=self._recipe, bad=self._unusable
        )
        usable = [place for place, _ in mine if place.number not in self._unusable.numbers]
        self._unusable.numbers.clear()
        self._num_without_text += len(mine) - len(usable)
        for place, document in zip(usable, documents, strict=True):
            has_text = bool(document.ids) and document.has_label
            stretches = self._stretches(document, place) if has_text else []
            self._num_without_text = 0 if stretches else self._num_without_text + 1
            self._lanes[place.number % num_lanes].waiting += stretches
        if self._num_without_text > MOST_RECORDS_WITHOUT_TEXT:
            raise ValueError(
                f"{self._name}: no text to train in {self._num_without_text:,} records on end; "
                "check data.format, data.text_field, data.long_document and training.seq_len"
            )

    def _stretches(self, document: Document, place: Place) -> "list[_Stretch]":
        """Return what of a document goes into rows: all in one, or pieces that fit a row."""
        ids = np.array(document.ids, dtype=np.int32)
        if self._settings.packing == "concat":
            return [_Stretch(ids, document.is_trained, 0, len(ids))]
        slices = cut_documents(
            np.array([0, len(ids)], dtype=np.int64),
            str(place),
            seq_len=self.seq_len,
            long_document=self._settings.long_document,
            is_trained=document.is_trained,
        )
        parts = [slices[number] for number in range(len(slices))]
        return [_Stretch(ids, document.is_trained, part.start, part.stop) for part in parts]

    def _all_passes(self) -> Iterator[tuple[Place, Record]]:
        """Yield records without end, each pass in another order; places count them over all."""
        number = 0
        for epoch in itertools.count():
            first = number
            key = (self._settings.seed, epoch, "stream")
            for place, record in shuffled(self._pass(epoch), self._settings.buffer_size, *key):
                yield replace(place, number=number), record
                number += 1
            if number == first:
                raise ValueError(
                    f"{self._name} is empty: a whole pass gave no record "
                    f"({self._unreadable.count} cannot be read); check the path"
                )
            log.info(
                "%s: pass %d is read, of %s records; %s bad ones skipped so far",
                *(self._name, epoch + 1, f"{number - first:,}"),
                f"{self._unreadable.count + self._unusable.count:,}",
            )

    def _pass(self, epoch: int) -> Iterator[tuple[Place, Record]]:
        pieces = self._reader.pieces()
        order = Permutation(len(pieces), self._settings.seed, epoch, "pieces")
        if self._settings.buffer_size == 1:
            order = range(len(pieces)).__getitem__
        for place in range(len(pieces)):
            yield from self._reader.read(pieces[order(place)], self._unreadable)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Tokens `start` to `stop` of a document that waits for its rows."""

    ids: npt.NDArray[np.int32]
    is_trained: npt.NDArray[np.bool_] | None
    start: int
    stop: int

    def part(self, stop: int) -> Part:
        """Return the tokens up to `stop`, and the one behind them, which the last is trained on."""
        here = slice(self.start, stop + 1)
        is_trained = None if self.is_trained is None else self.is_trained[here]
        return Part(stop - self.start, self.ids[here], is_trained)


@dataclass(slots=True)
class _Lane:
    """One of the rows of every step: documents that wait, and the rows made of earlier ones."""

    waiting: deque[_Stretch] = field(default_factory=deque)
    num_rows: int = 0


@dataclass
class _BadRecords(BadRecords):
    """Tells of the first records that are skipped, and remembers the numbers of all."""

    numbers: set[int] = field(default_factory=set)

    def report(self, place: Place, reason: str) -> None:
        """Raise or count, as the policy says."""
        super().report(place, reason)
        self.numbers.add(place.number)
        if self.count <= NUM_EXAMPLES:
            log.info("skipped %s: %s", place, reason)


def shuffled(items: Iterable[Item], size: int, *key: object) -> Iterator[Item]:
    """Yield items in an order that is a function of the key, each drawn from a buffer of `size`.

    An item comes at most `size` - 1 places early, and most come within a few times `size`.
    """
    scramble = int(digest_of(*key)[:16], 16)
    buffer: list[Item] = []
    for number, item in enumerate(items):
        if len(buffer) < size:
            buffer.append(item)
            continue
        drawn = mix_words(number, scramble) % size
        yield buffer[drawn]
        buffer[drawn] = item
    order = Permutation(len(buffer), *key)
    for place in range(len(buffer)):
        yield buffer[order(place)]
