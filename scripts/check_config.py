"""Look at a configuration before paying for it: no GPU, no data, any number of ranks.

    python scripts/check_config.py --job.config_file X.toml --world_size N [--section.key value]

Prints what each pattern of the model's plan means, and what the first rank will hold. A fake
process group and the meta device stand in for the cluster. Exit code 2 and one message where the
configuration would be refused.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.adapters import build_adapted, frozen_dtype
from engine.cli import load_config, run_command
from engine.combinations import refusals
from engine.config import JobConfig
from engine.low_precision import packs_frozen
from engine.model import Architecture, find_architecture
from engine.rules import gather_facts
from engine.schema import raise_mistakes
from models.flops import parameter_counts
from models.plan import ModelPlan
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.apply import parallelize
from parallelisms.compile import CompileConfig
from parallelisms.fsdp import PrecisionConfig
from parallelisms.mesh import ParallelDims
from parallelisms.nf4 import num_bytes
from parallelisms.resolve import resolve

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdings:
    """Bytes that one rank holds all the time."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """The largest unit whole, in the compute dtype, while it runs."""

    @property
    def total(self) -> int:
        """Sum of what training holds between forward passes."""
        return self.parameters + self.gradients + self.optimizer


def main(arguments: list[str]) -> None:
    """Check one configuration and print what it means."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--world_size", type=int, default=1)
    ours, rest = parser.parse_known_args(arguments)
    if ours.world_size < 1:
        raise ValueError(f"--world_size {ours.world_size}: give the number of ranks, at least 1")
    config = load_config(rest, prog="check_config.py --world_size N")
    config, notes = _without_absent_assets(config)
    # Files, packages and GPUs of this machine say nothing about the cluster.
    device_type = "cpu" if config.job.device == "cpu" else "cuda"
    facts, problems = gather_facts(config, ours.world_size, device_type=device_type, is_here=False)
    raise_mistakes(problems + refusals(facts))
    with fake_process_group(ours.world_size):
        _report(config, find_architecture(config.model), ours.world_size)
    for note in notes:
        print(f"note: {note}")


def _without_absent_assets(config: JobConfig) -> tuple[JobConfig, list[str]]:
    """Leave out a Hugging Face folder that is not on this machine; the flavor gives the sizes."""
    folder = config.model.hf_assets_path
    if not folder or Path(folder).is_dir():
        return config, []
    note = (
        f"model.hf_assets_path = {folder!r} is not on this machine: the sizes are those of flavor "
        f"{config.model.flavor}; training needs the folder with its tokenizer"
    )
    return replace(config, model=replace(config.model, hf_assets_path="")), [note]


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Let this process be rank 0 of `world_size`; nothing is ever sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _report(config: JobConfig, architecture: Architecture, world_size: int) -> None:
    dims = ParallelDims.of(config.parallelism, world_size)
    training = config.training
    dealing = training.dealing(dims.batch_degree)
    rows, fillers = dealing.rows_per_step, 100 * dealing.filler_share
    total, _ = parameter_counts(architecture.config)
    print(f"model:   {config.model.name}, {architecture.origin}: {total:,} parameters")
    print(f"ranks:   {world_size} = {dims.describe()}")
    budget = config.data.batch_tokens
    unit, tokens = ("batches", budget) if budget else ("rows", training.seq_len)
    print(
        f"step:    {rows:,} {unit} = {dealing.rows_per_microbatch} x {dims.batch_degree} "
        f"data-parallel ranks x {dealing.microbatches} microbatches"
        f"{f' less {fillers:.1f}% fillers' if fillers else ''}; x {tokens:,} = "
        f"{'at most ' * (budget > 0)}{rows * tokens:,} tokens\n"
    )
    param_dtype = getattr(torch, training.mixed_precision_param)
    precision = PrecisionConfig(
        param_dtype=param_dtype,
        frozen_dtype=frozen_dtype(config.adapter, param_dtype),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        master_dtype=getattr(torch, training.dtype),
    )
    model, plan = build_adapted(architecture, config.adapter)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(precision.stored(parameter.requires_grad))
    gathered = _largest_unit(model, plan, dims) * precision.param_dtype.itemsize
    # Checkpointing, compilation and how GPUs communicate move no parameter.
    resolved = parallelize(
        model,
        plan,
        dims.build("cpu"),
        parallel=replace(
            config.parallelism, enable_async_tensor_parallel=False, fsdp_copy_engine=False
        ),
        precision=precision,
        activation_checkpoint=ActivationCheckpointConfig(mode="none"),
        compile=CompileConfig(),
        frozen=config.model.freeze,
        packs_frozen=packs_frozen(config),
    )
    print(resolved.table())
    _print_holdings(holdings(model, gathered), precision)


def _largest_unit(model: nn.Module, plan: ModelPlan, dims: ParallelDims) -> int:
    """Return how many parameters the largest unit has that is gathered at once, on one tp rank."""
    resolved = resolve(model, plan, dims)
    units = [(name,) for name in (*resolved.first, *resolved.blocks)] + [resolved.last]
    return max(sum(_numel(model.get_submodule(n)) for n in unit) for unit in units) // dims.tp


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def holdings(model: nn.Module, gathered: int) -> Holdings:
    """Count what this rank holds of a parallelised meta model under AdamW."""
    parameters = trainable = 0
    for parameter in model.parameters():
        size = num_bytes(parameter)
        parameters += size
        trainable += size if parameter.requires_grad else 0
    return Holdings(
        parameters=parameters, gradients=trainable, optimizer=2 * trainable, gathered=gathered
    )


def _print_holdings(held: Holdings, precision: PrecisionConfig) -> None:
    master = str(precision.master_dtype).removeprefix("torch.")
    compute = str(precision.param_dtype).removeprefix("torch.")
    stored = f"{master}, frozen {compute}" if precision.frozen_dtype else master
    rows = (
        (f"parameters ({stored})", held.parameters),
        (f"gradients ({master})", held.gradients),
        (f"optimizer ({master}, two moments)", held.optimizer),
        ("held at all times", held.total),
        (f"largest unit, gathered ({compute})", held.gathered),
    )
    print("\nOn the first rank, which holds the largest share:")
    for name, size in rows:
        print(f"  {name:<36} {size:>20,} bytes {size / GIB:>10.3f} GiB")
    print("Activations come on top. No combination of settings is refused.")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
