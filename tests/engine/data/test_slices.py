from typing import Literal

import numpy as np
import pytest

from engine.data.slices import DocumentSlices, Slice

Policy = Literal["truncate", "drop", "split"]
POLICIES: tuple[Policy, ...] = ("truncate", "drop", "split")


def offsets_of(*lengths: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def cut(
    offsets: np.ndarray, long_document: Policy, seq_len: int = 8, **changes: np.ndarray
) -> DocumentSlices:
    return DocumentSlices(offsets, seq_len=seq_len, long_document=long_document, **changes)


def triples(slices: DocumentSlices) -> list[tuple[int, int, int]]:
    return [(one.document, one.start, one.stop) for one in map(slices.__getitem__, every(slices))]


def every(slices: DocumentSlices) -> range:
    return range(len(slices))


def labels_of(one: Slice, offsets: np.ndarray) -> range:
    """Return the places in the file of a slice's labels: each token's is the one behind it."""
    begin, past = offsets[one.document : one.document + 2]
    return range(begin + one.start + 1, min(begin + one.stop + 1, past))


@pytest.mark.parametrize("long_document", POLICIES)
def test_a_document_that_fits_is_one_whole_slice(long_document: Policy):
    slices = cut(offsets_of(8, 1, 5), long_document)
    assert triples(slices) == [(0, 0, 8), (1, 0, 1), (2, 0, 5)]
    assert (slices.num_long, slices.num_lost_tokens, slices.num_tokens) == (0, 0, 14)


@pytest.mark.parametrize(
    ("long_document", "expected", "lost"),
    [
        ("truncate", [(0, 0, 3), (1, 0, 8), (2, 0, 4), (3, 0, 8), (4, 0, 8), (5, 0, 2)], 1 + 9 + 2),
        ("drop", [(0, 0, 3), (2, 0, 4), (5, 0, 2)], 9 + 17 + 10),
        (
            "split",
            [
                *[(0, 0, 3), (1, 0, 8), (2, 0, 4), (3, 0, 8), (3, 8, 16)],
                *[(4, 0, 8), (4, 8, 10), (5, 0, 2)],
            ],
            0,
        ),
    ],
)
def test_a_longer_document_is_cut_left_out_or_split_and_counted(
    long_document: Policy, expected: list[tuple[int, int, int]], lost: int
):
    slices = cut(offsets_of(3, 9, 4, 17, 10, 2), long_document)
    assert triples(slices) == expected
    assert (slices.num_long, slices.num_lost_tokens) == (3, lost)
    assert slices.num_tokens == sum(stop - start for _, start, stop in expected)


def random_offsets(seed: int) -> np.ndarray:
    return offsets_of(*np.random.default_rng(seed).integers(1, 40, 300))


@pytest.mark.parametrize("long_document", POLICIES)
@pytest.mark.parametrize("masked", [False, True])
def test_lengths_counts_and_single_slices_agree(long_document: Policy, masked: bool):
    for seed in range(5):
        offsets = random_offsets(seed)
        is_trained = np.random.default_rng(seed).random(offsets[-1]) < 0.1
        slices = cut(offsets, long_document, **({"is_trained": is_trained} if masked else {}))
        found = triples(slices)
        assert found == sorted(set(found)), "in the order of the documents, each once"
        lengths = [stop - start for _, start, stop in found]
        assert slices.lengths().tolist() == lengths
        assert slices.num_tokens == sum(lengths)
        assert max(lengths) == 8
        whole = [document for document, length in enumerate(np.diff(offsets)) if length <= 8]
        assert [one[0] for one in found if one[0] in whole] == whole


def test_a_split_trains_every_label_once_and_has_no_piece_without_one():
    for seed in range(5):
        offsets = offsets_of(*(1 + np.diff(random_offsets(seed))))
        slices = cut(offsets, "split")
        labels = [[*labels_of(slices[number], offsets)] for number in every(slices)]
        assert all(labels)
        firsts = set(offsets[:-1].tolist())
        expected = [place for place in range(offsets[-1]) if place not in firsts]
        assert [place for some in labels for place in some] == expected


@pytest.mark.parametrize("long_document", POLICIES)
def test_no_cut_leaves_a_slice_whose_labels_are_all_untrained(long_document: Policy):
    left_out = {policy: 0 for policy in POLICIES}
    for seed in range(5):
        offsets = random_offsets(seed)
        is_trained = np.random.default_rng(seed).random(offsets[-1]) < 0.1
        slices = cut(offsets, long_document, is_trained=is_trained)
        plain = cut(offsets, long_document)
        long = np.diff(offsets) > 8

        def has_label(
            one: Slice, offsets: np.ndarray = offsets, is_trained: np.ndarray = is_trained
        ) -> bool:
            return any(is_trained[place] for place in labels_of(one, offsets))

        kept = [
            one
            for one in map(plain.__getitem__, every(plain))
            if not long[one.document] or has_label(one)
        ]
        assert [*map(slices.__getitem__, every(slices))] == kept
        assert slices.num_unlabelled == len(plain) - len(kept)
        left_out[long_document] += slices.num_unlabelled
    assert (left_out[long_document] > 0) == (long_document != "drop")


def test_a_long_prompt_with_its_answer_cut_off_is_left_out_when_truncated():
    offsets = offsets_of(4, 20, 12)
    is_trained = np.zeros(36, dtype=bool)
    is_trained[4 + 15 : 4 + 20] = True
    is_trained[24 + 8] = True  # the label of the last token that is kept
    slices = cut(offsets, "truncate", is_trained=is_trained)
    assert triples(slices) == [(0, 0, 4), (2, 0, 8)]
    assert (slices.num_unlabelled, slices.num_lost_tokens) == (1, 20 + 4)
    split = cut(offsets, "split", is_trained=is_trained)
    assert triples(split) == [(0, 0, 4), (1, 8, 16), (1, 16, 20), (2, 0, 8)]
    assert (split.num_unlabelled, split.num_lost_tokens) == (2, 8 + 4)


def test_no_document_at_all_and_none_that_is_kept_give_no_slices():
    assert len(cut(offsets_of(9, 10), "drop")) == 0
    assert cut(offsets_of(9, 10), "drop").lengths().tolist() == []
