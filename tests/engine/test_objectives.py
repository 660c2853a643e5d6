import math

import pytest
import torch

from engine.data.batch import IGNORED_LABEL, Batch, document_offsets
from engine.objectives import ObjectiveConfig, combine
from engine.objectives.pretrain import build
from engine.step import added_up
from parallelisms.collectives import SequenceSum
from parallelisms.mesh import ParallelDims


def batch_of(labels: list[list[int]]) -> Batch:
    labels_BT = torch.tensor(labels)
    places_BT = torch.arange(labels_BT.shape[1]).expand_as(labels_BT)
    return Batch(
        tokens_BT=torch.zeros_like(labels_BT),
        labels_BT=labels_BT,
        positions_BT=places_BT,
        documents_BT=torch.ones_like(labels_BT),
        document_offsets=document_offsets(torch.ones_like(labels_BT)),
        longest_document_tokens=labels_BT.shape[1],
        rows_B=torch.arange(len(labels)),
        sources_B=torch.zeros(len(labels), dtype=torch.int64),
        one_document_per_row=True,
        squared_document_tokens=labels_BT.shape[1] ** 2 * len(labels),
    )


alone = SequenceSum(ParallelDims(dp_replicate=1, dp_shard=1, tp=1))


def test_three_tokens_give_the_cross_entropy_worked_out_by_hand():
    objective = build(ObjectiveConfig())
    batch = batch_of([[2, 0, IGNORED_LABEL]])
    # Logits 0, ln 2, ln 5 are probabilities 1/8, 2/8, 5/8; equal logits are 1/3 each.
    logits_BTV = torch.tensor([[[0.0, math.log(2), math.log(5)], [1.0, 1.0, 1.0], [9.0, 0.0, 0.0]]])
    picked_BT1 = batch.labels_BT.clamp(min=0).unsqueeze(-1)
    logps_BT = logits_BTV.log_softmax(-1).gather(-1, picked_BT1).squeeze(-1)
    counts = objective.counts(batch)
    sums = added_up(objective.sums(logps_BT, batch, alone))
    loss = combine(sums, added_up(counts), objective.coefficients)
    assert counts["nll"].tolist() == [2]
    assert loss.item() == pytest.approx((math.log(8 / 5) + math.log(3)) / 2, rel=1e-6)
    assert loss.exp().item() == pytest.approx(math.sqrt(8 / 5 * 3), rel=1e-6), "perplexity"


def test_the_loss_is_the_mean_over_all_tokens_however_they_fall_into_microbatches():
    objective = build(ObjectiveConfig())
    generator = torch.Generator().manual_seed(0)
    labels_BT = torch.randint(0, 9, (6, 8), generator=generator)
    labels_BT[0, 1:] = labels_BT[3, 2:7] = IGNORED_LABEL
    logps_BT = -torch.rand(6, 8, generator=generator, dtype=torch.float32)
    expected = -logps_BT[labels_BT != IGNORED_LABEL].mean()
    for size in (1, 2, 3, 6):
        batches = [batch_of(part.tolist()) for part in labels_BT.split(size)]
        total = torch.cat([objective.counts(batch)["nll"] for batch in batches]).sum()
        parts = [
            combine(
                added_up(objective.sums(part, batch, alone)),
                {"nll": total},
                objective.coefficients,
            )
            for part, batch in zip(logps_BT.split(size), batches, strict=True)
        ]
        assert torch.stack(parts).sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_only_trained_tokens_get_gradient_and_a_batch_of_fillers_gives_zero():
    objective = build(ObjectiveConfig())
    batch = batch_of([[1, IGNORED_LABEL, 2], [IGNORED_LABEL] * 3])
    logps_BT = torch.full((2, 3), -1.0, requires_grad=True)
    objective.sums(logps_BT, batch, alone)["nll"].sum().backward()
    assert logps_BT.grad is not None
    assert logps_BT.grad.tolist() == [[-1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    fillers = batch_of([[IGNORED_LABEL] * 3])
    sums = objective.sums(torch.zeros(1, 3), fillers, alone)
    assert combine(sums, objective.counts(fillers), objective.coefficients).tolist() == [0.0]
