from typing import Literal

import numpy as np
import pytest

from engine.data.packing import ConcatPacking, OneDocumentPacking, Packing, Permutation
from engine.data.slices import DocumentSlices


def random_offsets(num_documents: int = 1000, longest: int = 300) -> np.ndarray:
    lengths = np.random.default_rng(0).integers(1, longest, num_documents)
    return np.concatenate([[0], np.cumsum(lengths)])


def concat(offsets: np.ndarray, **changes: object) -> ConcatPacking:
    settings = {"seq_len": 128, "stride": 128, "keep_last": True, "seed": 3, "shuffle": False}
    return ConcatPacking(offsets, **{**settings, **changes})  # pyright: ignore[reportArgumentType]


def places(packing: Packing, offsets: np.ndarray, epoch: int, row: int) -> list[int]:
    """Return where in the token file each token of a row stands."""
    return [
        int(offsets[part.document]) + place
        for part in packing.plan(epoch, row).slices
        for place in range(part.start, part.stop)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 40_000])
def test_a_permutation_has_every_number_once_and_answers_single_places(size: int):
    permutation = Permutation(size, 5, 0, "rows")
    numbers = permutation.all()
    assert sorted(numbers) == list(range(size))
    some = range(0, size, max(1, size // 50))
    assert [permutation(place) for place in some] == [numbers[place] for place in some]


def test_a_permutation_changes_with_every_part_of_its_key_and_scatters_neighbours():
    size = 10_000
    orders = [Permutation(size, *key).all() for key in [(1, 0), (2, 0), (1, 1)]]
    for order, other in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[order] == orders[other]).sum() < 10, "about one fixed place is expected"
    for order in orders:
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).sum() < 20


def test_the_order_of_a_permutation_never_changes():
    # Resuming an old run needs the same shuffle under every version of every library.
    numbers = Permutation(10, 7, 0, "documents").all()
    assert numbers.tolist() == [1, 0, 7, 8, 5, 2, 4, 6, 3, 9]


def test_windows_joined_give_exactly_the_token_stream():
    offsets = random_offsets()
    packing = concat(offsets)
    joined = [
        place for row in range(packing.rows_per_epoch) for place in places(packing, offsets, 0, row)
    ]
    assert joined == list(range(offsets[-1]))


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_shuffled_epoch_has_every_token_once_and_keeps_the_order_inside_documents(epoch: int):
    offsets = random_offsets()
    packing = concat(offsets, shuffle=True)
    rows = [places(packing, offsets, epoch, row) for row in range(packing.rows_per_epoch)]
    assert sorted(place for row in rows for place in row) == list(range(offsets[-1]))
    for row in range(packing.rows_per_epoch):
        slices = packing.plan(epoch, row).slices
        assert all(part.start == 0 for part in slices[1:]), "only a row's first document is cut"
    assert sum(len(row) != 128 for row in rows) == (1 if offsets[-1] % 128 else 0)


def test_epochs_and_seeds_differ_and_repeat():
    offsets = random_offsets()
    plans = {
        (seed, epoch): [concat(offsets, seed=seed, shuffle=True).plan(epoch, row) for row in (0, 9)]
        for seed in (1, 2)
        for epoch in (0, 1, 2)
    }
    assert len({str(plan) for plan in plans.values()}) == 6
    packing = concat(offsets, seed=1, shuffle=True)
    for epoch in (2, 0, 1, 2, 0):
        assert [packing.plan(epoch, row) for row in (0, 9)] == plans[1, epoch]


@pytest.mark.parametrize("stride", [1, 40, 100])
def test_a_smaller_stride_overlaps_by_the_difference_and_counts_each_label_once(stride: int):
    offsets = random_offsets(40)
    packing = concat(offsets, stride=stride)
    counted: list[int] = []
    for row in range(packing.rows_per_epoch):
        here = places(packing, offsets, 0, row)
        if row:
            before = places(packing, offsets, 0, row - 1)
            assert here[: len(before) - stride] == before[stride:]
        counted += [place + 1 for place in here[packing.plan(0, row).num_counted_labels :]]
    assert counted == list(range(1, offsets[-1] + 1))


def test_the_unfilled_last_row_is_kept_or_dropped_and_its_tokens_are_counted():
    offsets = np.array([0, 100, 300])
    kept, dropped = concat(offsets), concat(offsets, keep_last=False)
    assert (kept.rows_per_epoch, dropped.rows_per_epoch) == (3, 2)
    assert kept.num_tail_tokens == dropped.num_tail_tokens == 300 - 2 * 128
    assert concat(np.array([0, 256])).rows_per_epoch == 2
    assert concat(np.array([0, 5])).rows_per_epoch == 1
    assert concat(np.array([0, 5]), keep_last=False).rows_per_epoch == 0


def test_the_tokens_of_an_epoch_are_those_that_its_rows_hold():
    settings = [{}, {"keep_last": False}, {"stride": 50}, {"stride": 50, "keep_last": False}]
    for offsets in (random_offsets(40), np.array([0, 256]), np.array([0, 5])):
        for changes in settings:
            packing = concat(offsets, **changes)
            held = [len(places(packing, offsets, 0, row)) for row in range(packing.rows_per_epoch)]
            assert packing.tokens_per_epoch == sum(held)


def test_one_document_per_row_cuts_splits_or_leaves_out_long_documents():
    offsets = np.array([0, 4, 14, 20, 28])
    cut = OneDocumentPacking(slices_of(offsets, "truncate"), seed=0, shuffle=False)
    assert [places(cut, offsets, 0, row) for row in range(cut.rows_per_epoch)] == [
        [0, 1, 2, 3],
        list(range(4, 12)),
        list(range(14, 20)),
        list(range(20, 28)),
    ]
    split = OneDocumentPacking(slices_of(offsets, "split"), seed=0, shuffle=False)
    assert [places(split, offsets, 0, row) for row in (1, 2)] == [
        list(range(4, 12)),
        list(range(12, 14)),
    ]
    left_out = OneDocumentPacking(slices_of(offsets, "drop"), seed=0, shuffle=True)
    documents = [left_out.plan(0, row).slices[0].document for row in range(3)]
    assert [one.rows_per_epoch for one in (cut, split, left_out)] == [4, 5, 3]
    assert [one.tokens_per_epoch for one in (cut, split, left_out)] == [26, 28, 18]
    assert sorted(documents) == [0, 2, 3]


def slices_of(
    offsets: np.ndarray, long_document: Literal["truncate", "drop", "split"]
) -> DocumentSlices:
    return DocumentSlices(offsets, seq_len=8, long_document=long_document)
