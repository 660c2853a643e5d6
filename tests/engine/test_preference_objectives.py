"""Objectives on answers against their closed forms, written out with floats, and their slopes."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.batch import IGNORED_LABEL, Batch, document_offsets
from engine.objectives import Objective, ObjectiveConfig, combine
from engine.objectives.orpo import log_one_minus_exp
from engine.step import added_up, known_ratios, ratios
from models.registry import load_member
from parallelisms.collectives import SequenceSum
from parallelisms.mesh import ParallelDims

alone = SequenceSum(ParallelDims(dp_replicate=1, dp_shard=1, tp=1))

DOCUMENTS = [[1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 0], [1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0], [0] * 12]
TRAINED = [[0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 12]
POLICY = [[(-2.25, -0.5), (-1.5, -0.75)], [(-3.0, -2.5)]]
"""Sums of the answers of each pair of each row, chosen or own first; the third row is a filler."""

REFERENCE = [[(-2.0, -1.0), (-1.75, -1.25)], [(-2.5, -3.5)]]
LENGTHS = [[(2, 1), (2, 1)], [(2, 2)]]
DESIRABLE = [[1, -1], [1, 0], [0, 0]]
FLAT = [
    (*policy, *reference, *lengths, label)
    for p, r, n, d in zip(POLICY, REFERENCE, LENGTHS, DESIRABLE[:2], strict=True)
    for policy, reference, lengths, label in zip(p, r, n, d, strict=False)
]
CHOSEN_TOKENS = 6


def objective_of(name: str, **settings: Any) -> Objective:
    return load_member("engine.objectives", name, "build")(ObjectiveConfig(name=name, **settings))


def batch_of_pairs(*, unpaired: bool = False) -> Batch:
    documents_BT, trained_BT = torch.tensor(DOCUMENTS), torch.tensor(TRAINED, dtype=torch.bool)
    desirable_BP = torch.tensor(DESIRABLE)
    reference = torch.zeros(3, 2, 2, dtype=torch.float64)
    for row, pairs in enumerate(REFERENCE):
        reference[row, : len(pairs)] = torch.tensor(pairs, dtype=torch.float64)
    return Batch(
        tokens_BT=torch.zeros_like(documents_BT),
        labels_BT=torch.where(trained_BT, 5, IGNORED_LABEL),
        positions_BT=torch.zeros_like(documents_BT),
        documents_BT=documents_BT,
        document_offsets=document_offsets(documents_BT),
        longest_document_tokens=documents_BT.shape[1],
        rows_B=torch.tensor([0, 1, -1]),
        sources_B=torch.zeros(3, dtype=torch.int64),
        one_document_per_row=False,
        squared_document_tokens=0,
        desirable_BP=desirable_BP if unpaired else desirable_BP.abs(),
        reference_logps_BP2=reference,
    )


def logps_of_policy() -> Tensor:
    """Log-probabilities of labels whose sums over answers are `POLICY`; noise where none is."""
    logps_BT = torch.full((3, 12), -9.0, dtype=torch.float64)
    for row, pairs in enumerate(POLICY):
        for number, sums in enumerate(pairs):
            for side, total in enumerate(sums):
                of_answer = torch.tensor(DOCUMENTS[row]) == 2 * number + side + 1
                places = (of_answer & torch.tensor(TRAINED[row], dtype=torch.bool)).nonzero()
                shares = torch.tensor([0.25, 0.75] if len(places) == 2 else [1.0]).double()
                logps_BT[row, places.squeeze(1)] = total * shares
    return logps_BT.requires_grad_()


def loss_of(objective: Objective, logps_BT: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    counts = added_up(objective.counts(batch))
    sums = added_up(objective.sums(logps_BT, batch, alone))
    told = ratios({k: v.detach() for k, v in sums.items()}, counts, objective.metrics)
    loss = combine(sums, counts, objective.coefficients)
    return loss, known_ratios(objective.metrics, told.tolist())


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def dpo(of_margin: Callable[[float], float], nll: float = 0.0) -> float:
    chosen = -sum(one[0] for one in FLAT) / CHOSEN_TOKENS
    return mean([of_margin((c - rc) - (r - rr)) for c, r, rc, rr, *_ in FLAT]) + nll * chosen


def log_odds(total: float, length: int) -> float:
    p = math.exp(total / length)
    return math.log(p / (1 - p))


def orpo(beta: float) -> float:
    odds = [log_odds(c, n) - log_odds(r, m) for c, r, _, _, n, m, _ in FLAT]
    nll = -sum(one[0] for one in FLAT) / CHOSEN_TOKENS
    return nll + beta * mean([-log_sigmoid(one) for one in odds])


def simpo(beta: float, gamma: float) -> float:
    return mean([-log_sigmoid(beta * (c / n - r / m) - gamma) for c, r, _, _, n, m, _ in FLAT])


def kto(beta: float, wanted: float, unwanted: float) -> float:
    rows = [FLAT[:2], FLAT[2:]]
    losses: list[float] = []
    for row in rows:
        point = max(0.0, mean([other - ref for _, other, _, ref, *_ in row]))
        for own, _, reference, _, _, _, label in row:
            gain = (own - reference) - point
            weight = wanted if label == 1 else unwanted
            losses.append(weight * (1 - sigmoid(beta * gain * label)))
    return mean(losses)


CASES: list[tuple[str, dict[str, Any], float]] = [
    *[
        (
            "dpo",
            {"beta": beta, "label_smoothing": e},
            dpo(lambda h, b=beta, e=e: -(1 - e) * log_sigmoid(b * h) - e * log_sigmoid(-b * h)),
        )
        for beta in (0.05, 0.1, 0.5)
        for e in (0.0, 0.1)
    ],
    ("dpo", {"loss": "ipo", "beta": 0.25}, dpo(lambda h: (h - 2.0) ** 2)),
    ("dpo", {"loss": "hinge", "beta": 0.5}, dpo(lambda h: max(0.0, 1 - 0.5 * h))),
    ("dpo", {"nll_weight": 0.5}, dpo(lambda h: -log_sigmoid(0.1 * h), nll=0.5)),
    ("orpo", {}, orpo(0.1)),
    ("orpo", {"beta": 0.7}, orpo(0.7)),
    ("simpo", {}, simpo(2.0, 1.0)),
    ("simpo", {"beta": 1.5, "gamma": 0.3}, simpo(1.5, 0.3)),
    ("kto", {"beta": 0.5}, kto(0.5, 1.0, 1.0)),
    ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5}, kto(0.1, 1.5, 0.5)),
]


@pytest.mark.parametrize(("name", "settings", "expected"), CASES)
def test_the_loss_is_the_closed_form_and_its_gradient_the_slope(
    name: str, settings: dict[str, Any], expected: float
):
    objective = objective_of(name, **settings)
    batch, logps_BT = batch_of_pairs(unpaired=name == "kto"), logps_of_policy()
    loss, _ = loss_of(objective, logps_BT, batch)
    assert loss.item() == pytest.approx(expected, rel=2e-7), "sums are kept in fp32"
    loss.backward()
    assert logps_BT.grad is not None
    trained = torch.tensor(TRAINED, dtype=torch.bool)
    assert not logps_BT.grad[~trained].any(), "prompts and padding have no gradient"
    step = 2.0**-6  # slopes of fp32 sums: the curve over this is smaller than their rounding
    beside = batch.documents_BT % 2 == 0 if name == "kto" else torch.zeros_like(trained)
    assert not logps_BT.grad[beside].any(), "the reference point has no gradient"
    for row, place in (trained & ~beside).nonzero().tolist():
        moved = [logps_BT.detach().clone() for _ in range(2)]
        moved[0][row, place] += step
        moved[1][row, place] -= step
        up, down = (loss_of(objective, one, batch)[0].item() for one in moved)
        slope = (up - down) / (2 * step)
        assert logps_BT.grad[row, place].item() == pytest.approx(slope, rel=2e-3, abs=2e-5)


def test_equal_policy_and_reference_give_ln_2_and_no_rewards():
    batch = batch_of_pairs()
    whole = torch.zeros(3, 2, 2)
    for row, pairs in enumerate(POLICY):
        whole[row, : len(pairs)] = torch.tensor(pairs)
    batch = replace(batch, reference_logps_BP2=whole)
    loss, told = loss_of(objective_of("dpo"), logps_of_policy().float(), batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert told[name] == pytest.approx(0.0, abs=1e-6)


def test_metrics_are_means_over_pairs_and_over_chosen_tokens():
    _, told = loss_of(objective_of("dpo", beta=0.5), logps_of_policy(), batch_of_pairs())
    chosen = [0.5 * (c - rc) for c, _, rc, *_ in FLAT]
    rejected = [0.5 * (r - rr) for _, r, _, rr, *_ in FLAT]
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    expected = {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean([float(margin > 0) for margin in margins]),
        "logps/chosen": mean([one[0] for one in FLAT]),
        "logps/rejected": mean([one[1] for one in FLAT]),
        "nll": -sum(one[0] for one in FLAT) / CHOSEN_TOKENS,
    }
    assert told == pytest.approx(expected, rel=1e-6)
    _, told = loss_of(objective_of("kto"), logps_of_policy(), batch_of_pairs(unpaired=True))
    wanted = [one[0] - one[2] for one in FLAT if one[-1] == 1]
    assert told["rewards/chosen"] == pytest.approx(0.1 * mean(wanted), rel=1e-6)
    assert told["kl"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_the_loss_is_a_mean_over_all_pairs_however_rows_fall_into_microbatches():
    for name in ("dpo", "orpo", "simpo", "kto"):
        objective, batch = objective_of(name), batch_of_pairs(unpaired=name == "kto")
        logps_BT = logps_of_policy()
        whole, _ = loss_of(objective, logps_BT, batch)
        counts = added_up(objective.counts(batch))
        parts: list[Tensor] = []
        for row in range(3):
            tensors = {k: v for k, v in vars_of(batch).items() if isinstance(v, Tensor)}
            one = replace(
                batch, **{k: v[row : row + 1] for k, v in tensors.items() if v.shape[0] == 3}
            )
            sums = added_up(objective.sums(logps_BT[row : row + 1], one, alone))
            parts.append(combine(sums, counts, objective.coefficients))
        assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), rel=1e-6), name


def vars_of(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in Batch.__dataclass_fields__}


def test_orpo_stays_finite_where_an_answer_is_certain():
    for value in (0.0, -1e-12, -1e-7, -1e-3, -0.7, -30.0, -1000.0):
        x = torch.tensor([value], requires_grad=True)
        clamped = x.clamp(max=-1e-7)
        found = log_one_minus_exp(clamped)
        found.sum().backward()
        assert x.grad is not None and found.isfinite().all() and x.grad.isfinite().all()
        exact = math.log(-math.expm1(clamped.item())) if value > -40 else 0.0
        assert found.item() == pytest.approx(exact, rel=1e-6, abs=1e-12)
    batch, objective = batch_of_pairs(), objective_of("orpo")
    for value in (0.0, -1e-7):
        logps_BT = torch.full((3, 12), value, requires_grad=True)
        loss, _ = loss_of(objective, logps_BT, batch)
        loss.backward()
        assert loss.isfinite() and logps_BT.grad is not None and logps_BT.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dpo", "beta": 0.0}, r"objective\.beta = 0\.0; give a number above 0"),
        ({"name": "dpo", "label_smoothing": 0.5}, r"label_smoothing = 0\.5; give a probability"),
        ({"name": "dpo", "label_smoothing": 0.1, "loss": "ipo"}, r"no meaning with.*'ipo'"),
        (
            {"name": "kto", "reference": "adapters_off", "reference_path": "x"},
            r"reference_path = 'x' has no meaning with objective\.reference = 'adapters_off'",
        ),
        ({"name": "orpo", "reference": "precomputed"}, r"use one of dpo, kto"),
        ({"beta": 0.2}, r"objective\.beta = 0\.2 has no meaning with objective\.name = 'pretrain'"),
        ({"name": "kto", "desirable_weight": -1.0}, r"desirable_weight = -1\.0; give 0"),
    ],
)
def test_settings_without_meaning_are_refused_with_a_remedy(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


def test_orpo_and_simpo_have_the_losses_of_trl():
    """Its DPO and KTO are parts of trainers, which take a whole model."""
    orpo_trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    cpo_trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    trainer = SimpleNamespace(beta=0.3, alpha=0.0, loss_type="simpo", simpo_gamma=0.4)
    trainer.label_smoothing, trainer.accelerator = 0.0, SimpleNamespace(device="cpu")
    chosen, rejected = (
        torch.tensor([one[side] / one[4 + side] for one in FLAT], dtype=torch.float64)
        for side in range(2)
    )
    batch = batch_of_pairs()
    found, _ = loss_of(objective_of("simpo", beta=0.3, gamma=0.4), logps_of_policy(), batch)
    assert found.item() == pytest.approx(cpo_trl.cpo_loss(trainer, chosen, rejected)[0].mean())
    found, told = loss_of(objective_of("orpo", beta=0.3), logps_of_policy(), batch)
    expected = told["nll"] - orpo_trl.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # trl computes in fp32
