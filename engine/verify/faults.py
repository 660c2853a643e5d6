"""Errors to plant in a plan, to see that the check notices them: `--fault NAME`."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn import functional

import parallelisms.apply
import parallelisms.fsdp
import parallelisms.tensor
from engine.verify import parity
from engine.verify.case import Case
from models.plan import ModelPlan
from parallelisms.adapters import SplitLayout

Planted = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One error, and the plans that it makes wrong."""

    sentence: str
    """What is wrong, for `--fault list`."""

    example: Case
    """The plan that it is planted in where none is named."""

    applies: Callable[[Case], bool]
    """Whether a plan has the part that the fault breaks."""

    planted: Planted
    """Context in which a plan is built and trained with the error."""

    plan: ModelPlan = field(default_factory=ModelPlan)
    """Roles that replace those of the model's own plan."""

    may_crash: bool = False
    """Whether an exception or a lost rank is a sign of this fault, and not of another one."""


class _UnreducedEntrance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return DTensor.from_local(x, mesh, (Replicate(),), run_check=False)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: DTensor
    ) -> tuple[Tensor, None]:
        return grad.to_local(), None


class _DroppedReduce(ParallelStyle):
    """Enter a split region whole, and let each rank keep its own part of the gradient's sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_UnreducedEntrance.apply(args[0], device_mesh), *args[1:])

        module.register_forward_pre_hook(enter)
        return module


def _without_the_reduce() -> AbstractContextManager[Any]:
    styles = parallelisms.tensor.styles

    def wrong(**options: bool) -> dict[Any, Any]:
        return {**styles(**options), "gather_tokens": _DroppedReduce()}

    return patch("parallelisms.tensor.styles", wrong)


@contextmanager
def _nothing_patched() -> Iterator[None]:
    yield


def _one_core_alone() -> AbstractContextManager[Any]:
    apply_context = parallelisms.apply.apply_context

    def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, *, mask: object) -> Tensor:
        q_BHTC, k_BKTC, v_BKTC = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
        out_BHTC = functional.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=True
        )
        return out_BHTC.transpose(1, 2)

    def wrong(model: nn.Module, plan: Any, *args: Any, **options: Any) -> None:
        apply_context(model, plan, *args, **options)
        model.get_submodule(plan.attention[-1]).forward = attend

    return patch("parallelisms.apply.apply_context", wrong)


def _labels_in_another_order() -> AbstractContextManager[Any]:
    split_tokens = parity.split_tokens

    def wrong(tensors: Any, dims: Any) -> dict[str, Tensor]:
        others = replace(dims, balanced=not dims.balanced)
        return split_tokens(tensors, dims) | {
            "labels_BT": split_tokens({"": tensors["labels_BT"]}, others)[""]
        }

    return patch.object(parity, "split_tokens", wrong)


def _one_document_a_row() -> AbstractContextManager[Any]:
    forward = parity.forward

    def wrong(model: nn.Module, rows: dict[str, Tensor], case: Case) -> Tensor:
        return forward(model, rows, replace(case, packed=False))

    return patch.object(parity, "forward", wrong)


def _one_gradient_lost() -> AbstractContextManager[Any]:
    train = parity.train

    def wrong(model: nn.Module, *args: Any) -> float:
        loss = train(model, *args)
        parameters = [p for p in model.parameters() if p.grad is not None]
        parameters[len(parameters) // 2].grad = None
        return loss

    return patch.object(parity, "train", wrong)


def _own_part(layout: SplitLayout, part: str, parameter: DTensor) -> Tensor | None:
    return None if layout.split == "rows" and part == "bias" else parameter.to_local()


def _last_rank(act: Callable[[], None]) -> Planted:
    def planted() -> AbstractContextManager[Any]:
        train = parity.train

        def wrong(model: nn.Module, *args: Any) -> float:
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                act()
            return train(model, *args)

        return patch.object(parity, "train", wrong)

    return planted


def _sleep() -> None:
    while True:
        time.sleep(60.0)


FAULTS = {
    "dropped_reduce": Fault(
        sentence="gradients that enter a tensor-parallel region are not summed over its ranks",
        example=Case(tp=2, sequence=False),
        applies=lambda case: case.tp > 1 and not case.sequence and not case.backend,
        planted=_without_the_reduce,
    ),
    "wrong_norm_role": Fault(
        sentence="the norms before attention treat a share of the tokens as all of them",
        example=Case(tp=2),
        applies=lambda case: case.tp > 1 and case.sequence and not case.backend,
        planted=_nothing_patched,
        plan=ModelPlan(tensor={"model.layers.*.input_layernorm": "replicated"}),
    ),
    "averaged_gradients": Fault(
        sentence="gradients are averaged over data-parallel ranks instead of summed",
        example=Case(shard=2),
        applies=lambda case: case.replicate * case.shard * case.cp > 1,
        planted=lambda: patch("parallelisms.fsdp._sum_gradients", lambda module, mesh: None),
    ),
    "untied_weights": Fault(
        sentence="embedding and head are not tied again after tensor parallelism cut them",
        example=Case(tp=2, tied=True),
        applies=lambda case: case.tied and case.tp > 1,
        planted=lambda: patch("parallelisms.apply.tie", lambda model, owner, other: None),
        may_crash=True,
    ),
    "missing_context_hook": Fault(
        sentence="one attention core sees only the keys and values of its own rank",
        example=Case(cp=2),
        applies=lambda case: case.cp > 1,
        planted=_one_core_alone,
    ),
    "wrong_token_order": Fault(
        sentence="labels are dealt to context-parallel ranks in another order than tokens",
        example=Case(cp=2),
        applies=lambda case: case.cp > 1,
        planted=_labels_in_another_order,
    ),
    "ignored_documents": Fault(
        sentence="packed documents see each other",
        example=Case(shard=2),
        applies=lambda case: case.packed,
        planted=_one_document_a_row,
    ),
    "unsummed_adapter": Fault(
        sentence="an adapter's matrix that ranks share keeps the gradient of one rank's part",
        example=Case(tp=2, adapter="lora"),
        applies=lambda case: case.tp > 1 and case.adapter != "none",
        planted=lambda: patch("parallelisms.adapters.SplitLayout.local", _own_part),
    ),
    "length_of_a_part": Fault(
        sentence="DoRA divides by the length of the part of a row that its rank holds",
        example=Case(tp=2, adapter="dora"),
        applies=lambda case: case.tp > 1 and case.adapter == "dora",
        planted=lambda: patch(
            "parallelisms.adapters.SplitLayout.sum_over_inputs", lambda layout, partial: partial
        ),
    ),
    "lost_gradient": Fault(
        sentence="one parameter has no gradient",
        example=Case(shard=2),
        applies=lambda case: True,
        planted=_one_gradient_lost,
    ),
    "dead_rank": Fault(
        sentence="the last rank is killed in the middle of a plan",
        example=Case(shard=2),
        applies=lambda case: True,
        planted=_last_rank(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        may_crash=True,
    ),
    "hung_rank": Fault(
        sentence="the last rank stops in the middle of a plan and never goes on",
        example=Case(shard=2),
        applies=lambda case: case.world_size > 1,
        planted=_last_rank(_sleep),
        may_crash=True,
    ),
}
"""What `--fault` may name."""
