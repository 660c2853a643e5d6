"""Tensor and sequence parallelism: each role of a plan becomes a DTensor style.

The only file that knows those styles. The vocabulary-parallel loss is in `vocabulary.py`.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from models.plan import Role
from parallelisms.adapters import adapted_styles
from parallelisms.collectives import wait_differentiably
from parallelisms.resolve import ResolvedPlan
from parallelisms.vocabulary import VocabularyLogps


class Replicated(ParallelStyle):
    """Parameters are whole on every rank, activations are plain tensors of equal value."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(_as_replicated(x, mesh) for x in inputs)

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local() if isinstance(output, DTensor) else output

        return distribute_module(module, device_mesh, None, enter, leave)  # pyright: ignore[reportArgumentType]


def _as_replicated(value: Any, mesh: DeviceMesh) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    return DTensor.from_local(value, mesh, (Replicate(),), run_check=False)


class AcrossColumns(ParallelStyle):
    """Columns arrive split; the module sees all of a token, and each rank goes on with its share.

    Costs a gather of the columns in the forward, and one of their gradients in the backward.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            split = DTensor.from_local(inputs[0], mesh, (Shard(inputs[0].ndim - 1),))
            return (split.redistribute(placements=(Replicate(),)), *inputs[1:])

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=(Shard(output.ndim - 1),)).to_local()

        return distribute_module(module, device_mesh, None, enter, leave)  # pyright: ignore[reportArgumentType]


class WholeOutput(ParallelStyle):
    """What leaves the module is a plain tensor that holds everything."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            return output.full_tensor() if isinstance(output, DTensor) else output

        module.register_forward_hook(leave)
        return module


class SplitTokens(ParallelStyle):
    """Tokens arrive whole and each rank goes on with its share."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            whole = _as_replicated(args[0], device_mesh)
            return (whole.redistribute(placements=(Shard(1),)).to_local(), *args[1:])

        module.register_forward_pre_hook(enter)
        return module


class VocabularyColumns(ParallelStyle):
    """The head's weight is split over the vocabulary, and its scores stay split."""

    def __init__(self, tokens: Placement, *, loss_parallel: bool) -> None:
        self.tokens = tokens
        self.loss_parallel = loss_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters()):
            split = distribute_tensor(parameter, device_mesh, (Shard(0),))
            module.register_parameter(name, nn.Parameter(split, parameter.requires_grad))

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, (self.tokens,), run_check=False)
            return (x.redistribute(placements=(Replicate(),)), *args[1:])

        module.register_forward_pre_hook(enter)
        head: Any = module
        head.label_logps = VocabularyLogps(
            device_mesh,
            whole=head.label_logps,
            softcap=head.softcap,
            keep_split=self.loss_parallel,
        )
        return module


def styles(*, sequence_parallel: bool, loss_parallel: bool) -> dict[Role, ParallelStyle | None]:
    """Return the style of each role; None where nothing has to be done."""
    tokens = Shard(1) if sequence_parallel else Replicate()
    per_token = SequenceParallel(use_local_output=True) if sequence_parallel else Replicated()
    return {
        "vocab_rows": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
        "vocab_rows_whole": RowwiseParallel(input_layouts=Replicate()),
        "columns": ColwiseParallel(),
        "rows": RowwiseParallel(output_layouts=tokens),
        "columns_whole": ColwiseParallel(output_layouts=Replicate()),
        "rows_whole": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
        "per_token": per_token,
        "across_columns": AcrossColumns(),
        "per_head": SequenceParallel(sequence_dim=2, use_local_output=True),
        # The module gets a DTensor, so that the input gradients of all its projections are added
        # before one reduction, instead of being reduced one by one.
        "gather_tokens": PrepareModuleInput(
            input_layouts=(tokens,), desired_input_layouts=(Replicate(),), use_local_output=False
        ),
        "split_tokens": SplitTokens() if sequence_parallel else None,
        "vocab_columns": VocabularyColumns(tokens, loss_parallel=loss_parallel),
        "replicated": Replicated(),
        "whole_output": WholeOutput(),
        # The adapted linear around them does what there is to do.
        "adapter_columns": None,
        "adapter_rows": None,
        "adapter_whole": None,
    }


def apply_tensor(
    model: nn.Module,
    plan: ResolvedPlan,
    mesh: DeviceMesh,
    *,
    sequence_parallel: bool,
    loss_parallel: bool,
) -> None:
    """Split the model over `mesh`, in place; parameters become DTensors.

    Ties are broken and frozen parameters thawed by the styles: the caller repairs both.
    """
    table = styles(sequence_parallel=sequence_parallel, loss_parallel=loss_parallel)
    of_adapted = adapted_styles(Shard(1) if sequence_parallel else Replicate())
    adapted = plan.adapted
    for name, role in plan.roles.items():
        style = of_adapted[role] if name in adapted else table[role]
        if style is not None:
            parallelize_module(model.get_submodule(name), mesh, style)
    for name in plan.first:
        model.get_submodule(name).register_forward_hook(_wait)
    if sequence_parallel:
        model.register_forward_pre_hook(_check_length(mesh.size()))


def _wait(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return wait_differentiably(output)


def _check_length(degree: int) -> Any:
    """Refuse rows that cannot be dealt evenly; gloo would abort the process instead."""

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        num_tokens = args[0].shape[1]
        if num_tokens % degree:
            raise ValueError(
                f"rows of {num_tokens} tokens cannot be split over "
                f"parallelism.tensor_parallel_degree = {degree} ranks; pad them to a multiple of "
                f"{degree}, or set parallelism.sequence_parallel = false"
            )

    return check
