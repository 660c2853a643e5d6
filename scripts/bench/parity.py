"""Gradients of every plan against one process, on this machine's devices.

`torchrun --nproc_per_node=4 -m scripts.bench.parity --out FILE.json` trains one step of a small
Llama under each plan and compares the loss and every parameter's gradient with one fp32 process on
the same device. Exits non-zero where a plan is outside its tolerance.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.distributed import CommConfig, choose_device, process_group
from models.decoder import DecoderConfig, DecoderLM, decoder_plan
from models.initialise import initial_values
from models.layers.rope import RopeConfig
from parallelisms import ParallelConfig, ParallelDims, parallelize
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.collectives import sum_over
from parallelisms.compile import CompileConfig
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import fill, materialise
from scripts.bench.__main__ import machine

FP32_REORDERED_SUM = 2e-5  # other kernels and another order of the same sums
BF16_ARITHMETIC = 6e-2  # eight bits of mantissa through four blocks
ROWS, TOKENS, VOCABULARY = 8, 256, 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout with its switches."""

    replicate: int = 1
    shard: int = 1
    tp: int = 1
    sequence: bool = True
    checkpointing: str = "none"
    compiled: bool = False
    tied: bool = False
    bfloat16: bool = False
    offload: bool = False
    attention: str = "sdpa"

    def __str__(self) -> str:
        degrees = f"replicate {self.replicate} x shard {self.shard} x tp {self.tp}"
        words = [degrees, f"AC {self.checkpointing}", self.attention]
        words += ["no SP"] if self.tp > 1 and not self.sequence else []
        names = ("compiled", "tied", "bfloat16", "offload")
        return ", ".join(words + [name for name in names if getattr(self, name)])


def plans(world_size: int, device: torch.device) -> Iterator[Plan]:
    """Yield the plans that `world_size` ranks (2 or 4) can run on such a device."""
    packed_kernel = "flex" if device.type == "cuda" else "sdpa"
    half = world_size // 2
    layouts = [(1, world_size, 1), (2, half, 1), (1, half, 2), (1, 1, world_size)]
    for (replicate, shard, tp), compiled in product(layouts, (False, True)):
        base: dict[str, Any] = {"replicate": replicate, "shard": shard, "tp": tp}
        yield Plan(**base, compiled=compiled)
        yield Plan(**base, compiled=compiled, bfloat16=True, attention=packed_kernel)
        if tp > 1:
            yield Plan(**base, compiled=compiled, sequence=False)
    for mode in ("full", "op", "2", "budget"):
        yield Plan(shard=half, tp=2, compiled=True, checkpointing=mode)
    yield Plan(shard=half, tp=2, compiled=True, tied=True)
    yield Plan(shard=world_size, offload=True)


def sizes(plan: Plan) -> DecoderConfig:
    """Return the small Llama that is compared."""
    return DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        intermediate_size=512,
        rope=RopeConfig(theta=10_000.0),
        max_position_embeddings=TOKENS,
        initializer_range=0.05,
        tie_word_embeddings=plan.tied,
        attention=plan.attention,
    )


def batch(device: torch.device) -> dict[str, Tensor]:
    """Return the global batch: two documents a row, and unevenly many labels that count."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    first = 100
    positions = torch.cat([torch.arange(first), torch.arange(TOKENS - first)])
    documents = (torch.arange(TOKENS) >= first).long() + 1
    rows = {
        "tokens_BT": tokens,
        "labels_BT": labels,
        "positions_BT": positions.repeat(ROWS, 1),
        "documents_BT": documents.repeat(ROWS, 1),
    }
    return {name: value.to(device) for name, value in rows.items()}


def backward(model: nn.Module, rows: dict[str, Tensor], count: Tensor) -> Tensor:
    """Run forward and backward; return this part of the loss."""
    inputs = dict(rows)
    loss = -model(inputs.pop("tokens_BT"), **inputs).sum() / count
    loss.backward()
    return loss.detach()


def reference(plan: Plan, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one fp32 process that knows no parallelism."""
    config = sizes(Plan(tied=plan.tied))
    model = DecoderLM(config).to(device)
    fill(model, initial_values(model, config, seed=7))
    rows = batch(device)
    loss = backward(model, rows, (rows["labels_BT"] != -100).sum())
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def checkpointing(mode: str) -> ActivationCheckpointConfig:
    """Return the configuration of a mode by its short name."""
    if mode == "budget":
        return ActivationCheckpointConfig(mode="memory_budget")
    if mode in ("op", "2"):
        return ActivationCheckpointConfig(mode="selective", selective_ac_option=mode)
    return ActivationCheckpointConfig(mode="full" if mode == "full" else "none")


def run(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Train one step under `plan`; return how far loss and gradients are from the reference."""
    torch._dynamo.reset()
    parallel = ParallelConfig(
        data_parallel_replicate_degree=plan.replicate,
        data_parallel_shard_degree=plan.shard,
        tensor_parallel_degree=plan.tp,
        sequence_parallel=plan.sequence,
    )
    dims = ParallelDims.of(parallel, dist.get_world_size()).build(device.type)
    config = sizes(plan)
    with torch.device("meta"):
        model = DecoderLM(config)
    parallelize(
        model,
        decoder_plan(config),
        dims,
        parallel=parallel,
        precision=PrecisionConfig(
            param_dtype=torch.bfloat16 if plan.bfloat16 else torch.float32,
            cpu_offload=plan.offload,
        ),
        activation_checkpoint=checkpointing(plan.checkpointing),
        compile=CompileConfig(enable=plan.compiled),
    )
    materialise(model, "cpu" if plan.offload else device)
    fill(model, initial_values(model, config, seed=7))
    rows = batch(device)
    count = (rows["labels_BT"] != -100).sum()
    mine = {k: v.chunk(dims.batch_degree)[dims.batch_rank] for k, v in rows.items()}
    loss = sum_over(dims, "loss", backward(model, mine, count)).item()
    return compare(model, loss, plan, device)


def compare(model: nn.Module, loss: float, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Compare loss and every gradient; a missing or all-zero gradient is an error of infinity."""
    reference_loss, expected = reference(plan, device)
    worst, worst_name = 0.0, ""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        whole = gradient.to(device) if gradient is not None else None
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        error = float("inf")
        if whole is not None and bool(whole.any()):
            difference = (whole.float() - expected[name]).abs().max()
            error = (difference / expected[name].abs().max()).item()
        if not error <= worst:
            worst, worst_name = error, name
    loss_error = abs(loss - reference_loss) / reference_loss
    tolerance = BF16_ARITHMETIC if plan.bfloat16 else FP32_REORDERED_SUM
    return {
        "plan": str(plan),
        "loss_error": loss_error,
        "worst_gradient_error": worst,
        "of": worst_name,
        "tolerance": tolerance,
        "passed": worst <= tolerance and loss_error <= tolerance,
    }


def main() -> int:
    """Run every plan; print and write the table."""
    parser = argparse.ArgumentParser(prog="scripts.bench.parity", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="record to write")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = choose_device("auto")
    with process_group(CommConfig(trace_buf_size=0), device, options.out.parent) as world:
        results = []
        for plan in plans(world.size, device):
            results.append(run(plan, device))
            if world.rank == 0:
                print(json.dumps(results[-1]), flush=True)
    if world.rank == 0:
        record = {"suite": "parity", "machine": machine(), "ranks": world.size, "rows": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
