"""Pairs of answers for the parity check: uneven rows of them, and the loss that a plan trains on.

Objectives that use a reference ask a second model, frozen and on the same plan, with other weights;
those of a plan with adapters the model itself without them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Batch, document_offsets
from engine.objectives import Objective, ObjectiveConfig, combine
from engine.step import Reference, added_up
from engine.verify.case import Case
from models.registry import load_member
from parallelisms.collectives import SequenceSum
from parallelisms.materialise import Draw
from parallelisms.mesh import ParallelDims

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "dpo": {"beta": 0.5, "label_smoothing": 0.1, "nll_weight": 0.3},
    "orpo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "nll_weight": 0.3},
    "kto": {"beta": 0.5, "desirable_weight": 1.5},
}
"""Objectives that a plan may name, and settings with which all their terms count."""

DOCUMENTS = ((3, 4, 5, 3), (6, 7), (), (2, 8, 1, 4))
"""Lengths of the documents of one row after the other, in sixteenths; two are a pair."""

OTHER_WEIGHTS = 0.8  # the reference's are the policy's times this


def objective_of(name: str) -> Objective:
    """Return an objective with the settings above."""
    config = ObjectiveConfig(name=name, **SETTINGS[name])
    return load_member("engine.objectives", name, "build")(config)


def of_reference(draw: Draw, case: Case) -> Draw:
    """Return what draws the reference's values: the base of adapters, or else other weights."""
    if case.adapter != "none":
        return draw
    return lambda name, slices: OTHER_WEIGHTS * draw(name, slices)


def with_pairs(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rows of tokens and labels as rows of pairs, of which the later half is an answer."""
    documents_BT = torch.full_like(rows["tokens_BT"], PADDING_DOCUMENT)
    positions_BT = torch.zeros_like(documents_BT)
    labels_BT = torch.full_like(documents_BT, IGNORED_LABEL)
    sixteenth = documents_BT.shape[1] // 16
    for row, lengths in enumerate(_lengths(len(documents_BT))):
        begin = 0
        for number, length in enumerate((n * sixteenth for n in lengths), start=1):
            here = slice(begin, begin + length)
            documents_BT[row, here] = number
            positions_BT[row, here] = torch.arange(length)
            answer = slice(begin + length // 2, begin + length)
            labels_BT[row, answer] = rows["labels_BT"][row, answer].clamp(min=1)
            begin += length
        positions_BT[row, begin:] = torch.arange(documents_BT.shape[1] - begin)
    found = {"labels_BT": labels_BT, "positions_BT": positions_BT, "documents_BT": documents_BT}
    return {**rows, **found}


def desirable_BP(num_rows: int, objective: str) -> Tensor:
    """Return `Batch.desirable_BP` of rows of pairs; labels of both kinds for kto."""
    found = torch.zeros(num_rows, max(map(len, DOCUMENTS)) // 2, dtype=torch.int64)
    for row, lengths in enumerate(_lengths(num_rows)):
        for number in range(len(lengths) // 2):
            found[row, number] = -1 if objective == "kto" and (row + number) % 3 == 1 else 1
    return found


def batch_of(rows: Mapping[str, Tensor], pairs_BP: Tensor) -> Batch:
    """Return rows, or a rank's tokens of them, as an objective reads them."""
    return Batch(
        tokens_BT=rows["tokens_BT"],
        labels_BT=rows["labels_BT"],
        positions_BT=rows["positions_BT"],
        documents_BT=rows["documents_BT"],
        document_offsets=rows.get("document_offsets", document_offsets(rows["documents_BT"])),
        longest_document_tokens=rows["documents_BT"].numel(),
        rows_B=torch.arange(len(pairs_BP), device=pairs_BP.device),
        sources_B=torch.zeros_like(pairs_BP[:, 0]),
        one_document_per_row=False,
        squared_document_tokens=0,
        desirable_BP=pairs_BP,
    )


class Judge:
    """The loss of a case that compares answers."""

    def __init__(
        self, case: Case, rows: dict[str, Tensor], dims: ParallelDims, reference: Reference
    ) -> None:
        self._objective = objective_of(case.objective)
        self._reference = reference if self._objective.uses_reference else None
        self._sequence_sum = SequenceSum(dims)
        pairs_BP = desirable_BP(len(rows["tokens_BT"]), case.objective).to(rows["tokens_BT"].device)
        self._counts = added_up(self._objective.counts(batch_of(rows, pairs_BP)))
        rank, degree = (0, 1) if dims.world_size == 1 else (dims.batch_rank, dims.batch_degree)
        self._pairs = pairs_BP.chunk(degree)[rank].chunk(case.accumulate)

    def loss(
        self, forward: Callable[[], Tensor], rows: dict[str, Tensor], microbatch: int
    ) -> Tensor:
        """Return the loss of this rank's tokens of a microbatch, divided by global counts."""
        batch = batch_of(rows, self._pairs[microbatch])
        if self._reference is not None:
            batch = self._reference(batch, self._sequence_sum)
        sums = self._objective.sums(forward(), batch, self._sequence_sum)
        return combine(added_up(sums), self._counts, self._objective.coefficients)


def _lengths(num_rows: int) -> list[tuple[int, ...]]:
    return [DOCUMENTS[row % len(DOCUMENTS)] for row in range(num_rows)]
