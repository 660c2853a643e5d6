"""What is compared of a plan with adapters, beside its loss and its gradients.

A check is one function and one line of `CHECKS`.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.adapters import fill_adapters
from engine.checkpoint_state import model_tensors
from engine.checkpoint_storage import RankGroup
from engine.hf_io import AdapterAssets, HfAssets, low_ranks
from engine.peft_export import export_adapters, place_of
from engine.peft_io import AdapterFolder, fill_from, read_adapter
from engine.verify import parity
from engine.verify.case import Case
from engine.verify.faults import FAULTS
from engine.verify.parity import Comparison
from engine.verify.ranks import Job
from engine.verify.subject import Subject, adapters_of
from models.layers.lora import adapted_linears, merged_weight
from parallelisms import ParallelDims
from parallelisms.fsdp import reshard
from parallelisms.materialise import fill


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A plan whose adapters have an effect, and the model without them on the same plan."""

    model: nn.Module
    plain: nn.Module
    dims: ParallelDims
    case: Case
    subject: Subject

    def logits(self, model: nn.Module) -> Tensor:
        """Return those of this rank's tokens; leaves nothing gathered, so values may change."""
        rows = parity.batch(self.case, self.subject)
        rows = {name: value.to(self.dims.device_type) for name, value in rows.items()}
        mine = parity.local_rows(rows, self.dims, self.case)
        mine |= parity.noise(rows, self.dims, self.case, self.subject)
        mine.pop("labels_BT")
        with torch.no_grad():
            found = parity.forward(model, parity.with_offsets(mine, rows), self.case)
        reshard(model)
        return found.float()

    def difference(self) -> float:
        """Return how far the logits of both models are apart, relative to the largest."""
        ours_BTV, plain_BTV = self.logits(self.model), self.logits(self.plain)
        return ((ours_BTV - plain_BTV).abs().max() / plain_BTV.abs().max()).item()


def merge_parity(adapted: Adapted) -> float:
    """Compare with the plain model that has the merged weights."""
    merged = merged_weights(adapted.model)
    draw = parity.start_values(adapted.plain, adapted.subject.sizes(adapted.case))
    fill(
        adapted.plain, lambda name, part: merged[name][part] if name in merged else draw(name, part)
    )
    return adapted.difference()


def peft_round_trip(adapted: Adapted) -> float:
    """Compare with the same model after its adapters have been to a folder of PEFT and back."""
    expected_BTV, model, subject = adapted.logits(adapted.model), adapted.model, adapted.subject
    sizes, specs = subject.sizes(adapted.case), adapters_of(adapted.case)
    assets = HfAssets(
        key_map=subject.family.key_map(sizes),
        config=subject.family.config_to_hf(sizes),
        save_tokenizer=lambda folder: None,
        adapters=AdapterAssets(specs=specs, base="", merge=False),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    ranks = RankGroup()
    home = Path(ranks.on_first(mkdtemp))
    folder = home / "adapters"

    def read() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for spec in specs:
            stored = AdapterFolder(folder / place_of(spec, specs))
            found |= read_adapter(stored, spec, shapes, assets.key_map)
        return found

    try:
        export_adapters(model, folder, assets, dtype=torch.float32, ranks=ranks)
        stored = ranks.on_first(read)  # the others may be on a machine without the folder
    finally:
        ranks.on_first(lambda: rmtree(home, ignore_errors=True))
        ranks.close()
    fill_adapters(model, seed=parity.SEED)
    fill_from(model, stored)
    found_BTV = adapted.logits(model)
    return ((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item()


def init_identity(adapted: Adapted) -> float:
    """Compare with the plain model when adapters have their initial values."""
    draw = parity.start_values(adapted.plain, adapted.subject.sizes(adapted.case))
    fill(adapted.plain, draw)
    fill_adapters(adapted.model, seed=parity.SEED)
    return adapted.difference()


CHECKS: Mapping[str, Callable[[Adapted], float]] = {
    "merge parity": merge_parity,
    "PEFT round trip": peft_round_trip,
    "init identity": init_identity,
}
"""By the column, in the order in which they are made; the last one changes the adapters."""


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole merged weight of every adapted linear by name, fp32, on the CPU.

    Every rank must call this.
    """
    found: dict[str, Tensor] = {}
    for name, linear in adapted_linears(model):
        adapters = low_ranks(linear, lambda _, parameter: _whole(parameter))
        found[f"{name}.weight"] = merged_weight(_whole(linear.weight), adapters)
    return found


def _whole(parameter: Any) -> Tensor:
    tensor = parameter.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.float().cpu()


@dataclass(frozen=True, kw_only=True)
class AdapterJob(Job):
    """Compares plans with adapters of one model of random weights."""

    subject: Subject
    fault: str | None = None

    def compare(self, case: Case, dims: ParallelDims) -> Comparison:
        """Compare loss and gradients with one process, then make every check."""
        parity.reference(parity.reference_case(case), self.subject, self.device_type)
        options: dict[str, Any] = {"device_type": self.device_type, "subject": self.subject}
        plan = self.subject.family.plan(self.subject.sizes(case))
        with ExitStack() as stack:
            if self.fault is not None:
                plan = plan | FAULTS[self.fault].plan
                stack.enter_context(FAULTS[self.fault].planted())
            model, dims = parity.build_case(case, plan=plan, dims=dims, **options)
            loss = parity.train(model, dims, case, self.subject)
            found = parity.compare(model, loss, case, **options)
            plain, _ = parity.build_case(
                replace(case, adapter="none"), plan=plan, dims=dims, filled=False, **options
            )
            adapted = Adapted(model=model, plain=plain, dims=dims, case=case, subject=self.subject)
            reshard(model)
            return replace(found, checks={name: check(adapted) for name, check in CHECKS.items()})
