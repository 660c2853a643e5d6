"""A family against transformers: logits, gradients, import and export alone, gradients in layouts.

The models are those of `variants.py`. `families_command.py` runs them and prints the table.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from engine import hf_io, hf_weights
from engine.verify import parity
from engine.verify.case import Case
from engine.verify.parity import Comparison
from engine.verify.ranks import Job
from engine.verify.subject import Subject
from engine.verify.variants import named_as_ours, random_model
from models.decoder import DecoderConfig
from models.plan import ModelPlan
from models.registry import ModelFamily, family_for_hf
from parallelisms.mesh import ParallelDims

FP32_REORDERED_SUM = 1e-5  # the same products, added up in another order
ROWS, TOKENS = 2, 96  # longer than the original context of the scaled rotary embeddings
LAYOUTS = {"TP2": Case(tp=2), "FSDP2 x TP2": Case(shard=2, tp=2)}
COLUMNS = ("logits", "gradients", "export", *LAYOUTS)

_EXPECTED = "expected.pt"
_RESOLVED = {"rope_parameters", "rope_theta", "rope_scaling", "original_max_position_embeddings"}
"""Written with every default filled in, so their spelling differs."""

_WITHOUT_EFFECT = {"_name_or_path", "dtype", "max_window_layers", "_sliding_window_pattern"}
"""The last two beside layer_types."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What was found for one model in one column of the table."""

    error: float
    """Largest difference: of logits and gradients relative to the largest of the same tensor."""

    problems: tuple[str, ...] = ()
    """What is wrong besides."""

    tolerance: float = FP32_REORDERED_SUM

    crashed: bool = False
    """Nothing was compared: `problems` says why."""

    @property
    def passed(self) -> bool:
        """Say whether it equals transformers; what is not a number never does."""
        return self.error <= self.tolerance and not self.problems


@dataclass(frozen=True, kw_only=True)
class FamilyCase(Case):
    """A layout of one of the models of `variants.py`."""

    variant: str


@dataclass(frozen=True, kw_only=True)
class FamilyFault:
    """An error to plant, and the columns that it must make fail."""

    sentence: str
    columns: tuple[str, ...]
    planted: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    plan: ModelPlan = field(default_factory=ModelPlan)
    """Roles that replace those of the model's own plan."""


def read_sizes(folder: Path) -> tuple[ModelFamily, DecoderConfig]:
    """Return the family of a Hugging Face folder and what its config.json says."""
    hf_config = hf_io.read_hf_config(folder)
    family = family_for_hf(hf_config, or_any=True)
    return family, family.config_from_hf(hf_config)


def subject_of(folder: Path) -> Subject:
    """Return the model of a folder with the batch that every column is computed on."""
    family, config = read_sizes(folder)
    return Subject(family_name=family.name, config=config, num_rows=ROWS, num_tokens=TOKENS)


def case_of(folder: Path, layout: Case, variant: str) -> FamilyCase:
    """Return a layout with the switches that leave the model of a folder as it is."""
    _, config = read_sizes(folder)
    return FamilyCase(
        variant=variant,
        tp=layout.tp,
        shard=layout.shard,
        sequence=config.refusal("sequence_parallel") is None,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        attention=config.attention,
        packed=False,
    )


def check_alone(variant: str, folder: Path, fault: str | None = None) -> dict[str, Cell]:
    """Compare one model in this process; return the cells of the columns that need no layout.

    Leaves transformers' weights and config.json in `folder`, our export in `folder`/export, and
    the loss and gradients of transformers, for the layouts.
    """
    theirs = random_model(variant)
    theirs.save_pretrained(folder)
    with FAULTS[fault].planted() if fault else contextlib.nullcontext():
        subject = subject_of(folder)
        case = case_of(folder, Case(), variant)
        key_map = subject.family.key_map(subject.config)
        ours: Any = subject.family.build(subject.config)
        hf_weights.load_into(ours, folder, key_map)
        rows = parity.batch(case, subject)
        logits, loss, gradients = _of_transformers(theirs, rows)
        expected = named_as_ours(gradients, ours, key_map)
        torch.save((loss, expected), folder / _EXPECTED)
        found = ours(rows["tokens_BT"], positions_BT=rows["positions_BT"])
        logps = parity.forward(ours, rows, case)
        alone = -logps.sum() / (rows["labels_BT"] != parity.IGNORED_LABEL).sum()
        alone.backward()
        return {
            "logits": Cell(error=_relative(found, logits)),
            "gradients": cell_of(parity.compare_with(ours, alone.item(), loss, expected)),
            "export": _check_export(ours, subject, folder, rows["tokens_BT"], logits),
        }


def _of_transformers(
    theirs: Any, rows: dict[str, Tensor]
) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Return logits, loss and gradients of the same batch."""
    logits = theirs(rows["tokens_BT"], use_cache=False).logits
    labels = rows["labels_BT"].flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=parity.IGNORED_LABEL)
    loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return logits.detach(), loss.item(), gradients


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def cell_of(comparison: Comparison) -> Cell:
    """Return the cell of a loss with its gradients."""
    error = max(comparison.worst_error, comparison.loss_error, key=_nan_last)
    return Cell(error=error, problems=comparison.problems)


def _nan_last(value: float) -> float:
    return value if value == value else float("inf")


def _check_export(
    ours: Any, subject: Subject, folder: Path, tokens_BT: Tensor, logits: Tensor
) -> Cell:
    """Write the model back and compare: each tensor bit for bit, config.json, logits again."""
    from transformers import AutoConfig, AutoModelForCausalLM  # slow to import

    family, target = subject.family, folder / "export"
    assets = hf_io.HfAssets(
        key_map=family.key_map(subject.config),
        config=family.config_to_hf(subject.config),
        save_tokenizer=lambda folder: None,
    )
    hf_io.export(ours, target, assets, dtype=torch.float32)
    before, after = (load_file(side / hf_weights.SINGLE_NAME) for side in (folder, target))
    problems = [f"{name} is on one side only" for name in sorted(before.keys() ^ after.keys())]
    both = sorted(before.keys() & after.keys())
    problems += [f"{n} has another dtype" for n in both if before[n].dtype != after[n].dtype]
    problems += [f"{n} has other bits" for n in both if not torch.equal(before[n], after[n])]
    errors = [(before[n] - after[n]).abs().max().item() for n in both]
    if read_sizes(target)[1] != subject.config:
        problems.append("config.json reads back as another model")
    one, other = (AutoConfig.from_pretrained(side).to_dict() for side in (folder, target))
    problems += [
        f"config.json has {key} = {other.get(key)!r}, was {one[key]!r}"
        for key in sorted(one.keys() - _RESOLVED - _WITHOUT_EFFECT)
        if other.get(key) != one[key]
    ]
    again: Any = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    with torch.no_grad():
        if not torch.equal(again(tokens_BT).logits, logits):
            problems.append("transformers computes other logits from the export")
    return Cell(error=max(errors, key=_nan_last), problems=tuple(problems), tolerance=0.0)


@dataclass(frozen=True, kw_only=True)
class FamilyJob(Job):
    """Compares layouts of models, each imported shard by shard, with transformers."""

    cases: tuple[FamilyCase, ...]  # pyright: ignore[reportIncompatibleVariableOverride]
    folder: Path
    """Holds the folder of each model, by its name, as `check_alone` left it."""

    device_type: str = "cpu"
    fault: str | None = None

    def compare(self, case: Case, dims: ParallelDims) -> Comparison:
        """Import one model into a layout, train one step, compare; every rank calls this."""
        assert isinstance(case, FamilyCase), "the cases of this job are layouts of a model"
        folder = self.folder / case.variant
        with FAULTS[self.fault].planted() if self.fault else contextlib.nullcontext():
            subject = subject_of(folder)
            plan = subject.family.plan(subject.config)
            if self.fault is not None:
                plan = plan | FAULTS[self.fault].plan
            model, dims = parity.build_case(
                case, subject=subject, dims=dims, plan=plan, filled=False
            )
            hf_weights.load_into(model, folder, subject.family.key_map(subject.config))
            loss, expected = torch.load(folder / _EXPECTED)
            mine = parity.train(model, dims, case, subject)
            return parity.compare_with(model, mine, loss, expected)


@contextlib.contextmanager
def _another_epsilon() -> Iterator[None]:
    original = read_sizes

    def wrong(folder: Path) -> tuple[ModelFamily, DecoderConfig]:
        family, config = original(folder)
        return family, replace(config, norm_eps=1e-2)

    with patch(f"{__name__}.read_sizes", wrong):
        yield


def _rounded_export() -> AbstractContextManager[Any]:
    def wrong(tensor: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        return original(tensor).bfloat16().to(tensor.dtype)

    return patch.object(hf_io, "whole", partial(wrong, original=hf_io.whole))


FAULTS = {
    "other_epsilon": FamilyFault(
        sentence="the epsilon of the norms is read wrong from config.json",
        columns=COLUMNS,
        planted=_another_epsilon,
    ),
    "rounded_export": FamilyFault(
        sentence="exported weights are rounded to 16 bits on their way",
        columns=("export",),
        planted=_rounded_export,
    ),
    "wrong_norm_role": FamilyFault(
        sentence="the last norm treats a share of the tokens as all of them",
        columns=tuple(LAYOUTS),
        plan=ModelPlan(tensor={"model.norm": "replicated"}),
    ),
}
"""What `--fault` may name."""
