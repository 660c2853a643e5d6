"""Plans to compare with one fp32 process: a tiny model, its reference gradients, and one case.

`python -m tests.parity.print_table` prints every eager case with its worst gradient error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.decoder import DecoderConfig, DecoderLM, decoder_plan
from models.initialise import initial_values
from models.layers.rope import RopeConfig
from models.plan import ModelPlan
from parallelisms import ParallelConfig, ParallelDims, parallelize
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.collectives import sum_over
from parallelisms.compile import CompileConfig
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import fill, materialise

FP32_REORDERED_SUM = 5e-6  # another order of the same sums; the worst seen is about half of it
BF16_ARITHMETIC = 0.1  # eight bits of mantissa through three blocks
ZERO_GRADIENT_FLOOR = 1e-6  # below this a gradient counts as zero in theory
ROWS, TOKENS = 8, 16
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout and its switches; the defaults are one plain rank."""

    replicate: int = 1
    shard: int = 1
    tp: int = 1
    sequence: bool = True
    loss_parallel: bool = True
    checkpointing: str = "none"  # none, full, op, 2, budget
    backend: str = ""  # of torch.compile; empty is eager
    tied: bool = False
    vocab: int = 64
    bias: bool = False
    packed: bool = True
    chunks: bool = False
    accumulate: int = 1
    offload: bool = False
    bfloat16: bool = False
    reshard: str = "default"

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard * self.tp

    def __str__(self) -> str:
        degrees = [f"{n}{d}" for n, d in zip(("rep", "fsdp", "tp"), self.degrees, strict=True)]
        parts = [d for d in degrees if not d.endswith("p1")] or ["one"]
        if self.tp > 1 and not self.sequence:
            parts.append("no-sp")
        if not self.loss_parallel:
            parts.append("whole-loss")
        if self.checkpointing != "none":
            parts.append(f"ac-{self.checkpointing}")
        parts += [self.backend] if self.backend else []
        parts += [f"v{self.vocab}"] if self.vocab != 64 else []
        parts += [] if self.packed else ["unpacked"]
        parts += [f"accumulate{self.accumulate}"] if self.accumulate > 1 else []
        parts += [f"reshard-{self.reshard}"] if self.reshard != "default" else []
        flags = ("tied", "bias", "chunks", "offload", "bfloat16")
        return "-".join(parts + [name for name in flags if getattr(self, name)])

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.replicate, self.shard, self.tp


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far one case is from one fp32 process."""

    loss: float
    reference_loss: float
    worst_error: float
    worst_name: str

    def check(self, tolerance: float = FP32_REORDERED_SUM) -> None:
        """Fail unless the loss and every gradient are within `tolerance`."""
        assert abs(self.loss - self.reference_loss) <= tolerance * abs(self.reference_loss), self
        assert self.worst_error <= tolerance, self


def model_config(case: Case) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=case.vocab,
        hidden_size=32,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=48,
        rope=RopeConfig(theta=10_000.0),
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=case.tied,
        attention_bias=case.bias,
        mlp_bias=case.bias,
        head_chunk_tokens=10 if case.chunks else 4096,
    )


def batch(case: Case) -> dict[str, Tensor]:
    """Return the global batch: two documents a row, and unevenly many labels that count."""
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, TOKENS)
    tokens = torch.randint(case.vocab, shape, generator=generator)
    labels = torch.randint(case.vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = -100
    labels[0, 3:] = -100
    first = 6 if case.packed else TOKENS
    positions = torch.cat([torch.arange(first), torch.arange(TOKENS - first)]).expand(shape)
    documents = (torch.arange(TOKENS) >= first).long().add(1).expand(shape)
    return {
        "tokens_BT": tokens,
        "labels_BT": labels,
        "positions_BT": positions.contiguous(),
        "documents_BT": documents.contiguous(),
    }


def forward(model: nn.Module, rows: dict[str, Tensor], case: Case) -> Tensor:
    rows = dict(rows)
    if not case.packed:
        del rows["documents_BT"]
    return model(rows.pop("tokens_BT"), **rows)


def start_values(model: nn.Module, config: DecoderConfig) -> Callable[[str, tuple], Tensor]:
    """Draw the engine's initial values, with norms and biases moved off one and zero."""
    draw = initial_values(model, config, seed=SEED)

    def moved(name: str, slices: tuple[slice, ...]) -> Tensor:
        values = draw(name, slices)
        if values.ndim == 1:
            rows = torch.arange(slices[0].start, slices[0].stop, dtype=torch.float32)
            values = values + 0.1 * torch.sin(rows + len(name))
        return values

    return moved


@lru_cache
def reference(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one fp32 process that knows no parallelism."""
    config = model_config(case)
    model = DecoderLM(config)
    fill(model, start_values(model, config))
    rows = batch(case)
    loss = -forward(model, rows, case).sum() / (rows["labels_BT"] != -100).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def build_case(
    case: Case,
    *,
    plan: ModelPlan | None = None,
    frozen: tuple[str, ...] = (),
    device_type: str = "cpu",
) -> tuple[DecoderLM, ParallelDims]:
    """Return the parallel model of a case, with the reference's values, and its meshes."""
    config = model_config(case)
    parallel = ParallelConfig(
        data_parallel_replicate_degree=case.replicate,
        data_parallel_shard_degree=case.shard,
        tensor_parallel_degree=case.tp,
        sequence_parallel=case.sequence,
        disable_loss_parallel=not case.loss_parallel,
        fsdp_reshard_after_forward=case.reshard,  # pyright: ignore[reportArgumentType]
    )
    dims = ParallelDims.of(parallel, case.world_size).build(device_type)
    with torch.device("meta"):
        model = DecoderLM(config)
    parallelize(
        model,
        plan or decoder_plan(config),
        dims,
        parallel=parallel,
        precision=PrecisionConfig(
            param_dtype=torch.bfloat16 if case.bfloat16 else torch.float32,
            cpu_offload=case.offload,
        ),
        activation_checkpoint=checkpoint_config(case.checkpointing),
        compile=CompileConfig(enable=bool(case.backend), backend=case.backend or "inductor"),
        frozen=frozen,
    )
    materialise(model, "cpu" if case.offload else device_type)
    fill(model, start_values(model, config))
    return model, dims


def checkpoint_config(name: str) -> ActivationCheckpointConfig:
    if name in ("op", "2"):
        return ActivationCheckpointConfig(mode="selective", selective_ac_option=name)
    mode: Any = "memory_budget" if name == "budget" else name
    return ActivationCheckpointConfig(mode=mode, memory_budget=0.4)


def train(model: nn.Module, dims: ParallelDims, case: Case) -> float:
    """Run forward and backward over this rank's rows; return the global loss."""
    rows = {k: v.to(dims.device_type) for k, v in batch(case).items()}
    count = (rows["labels_BT"] != -100).sum()
    mine = {k: v.chunk(dims.batch_degree)[dims.batch_rank] for k, v in rows.items()}
    total = torch.zeros((), device=dims.device_type)
    for index in range(case.accumulate):
        part = {k: v.chunk(case.accumulate)[index].contiguous() for k, v in mine.items()}
        loss = -forward(model, part, case).sum() / count
        loss.backward()
        total += loss.detach()
    return sum_over(dims, "loss", total).item()


def compare(model: nn.Module, loss: float, case: Case) -> Comparison:
    """Compare every gradient with the reference's; one that is missing or zero is a failure."""
    reference_loss, expected = reference(reference_case(case))
    worst_error, worst_name = 0.0, ""
    names = {name for name, _ in model.named_parameters()}
    assert names == set(expected), names ^ set(expected)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        size = expected[name].abs().max().item()
        if size > ZERO_GRADIENT_FLOOR:
            assert gradient.abs().max() > 0, f"{name} is zero everywhere in its gradient"
        difference = (gradient.float().cpu() - expected[name]).abs().max().item()
        error = difference / max(size, ZERO_GRADIENT_FLOOR)
        if not error <= worst_error:  # also when it is not a number
            worst_error, worst_name = error, name
    return Comparison(
        loss=loss, reference_loss=reference_loss, worst_error=worst_error, worst_name=worst_name
    )


def reference_case(case: Case) -> Case:
    """Return the single plain process that computes the same thing."""
    kept = ("tied", "vocab", "bias", "packed")
    return Case(**{name: getattr(case, name) for name in kept})


def run_case(rank: int, world_size: int, case: Case, device_type: str = "cpu") -> Comparison:
    """Train one step on one rank and compare; called on every rank."""
    model, dims = build_case(case, device_type=device_type)
    return compare(model, train(model, dims, case), case)


def table(rows: list[tuple[Case, Comparison]]) -> str:
    """Return the parity table as Markdown: each plan, its ranks and its worst gradient error."""
    lines = ["| plan | ranks | worst gradient error | of |", "|---|---|---|---|"]
    for case, result in rows:
        cells = (str(case), case.world_size, f"{result.worst_error:.1e}", result.worst_name)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


LAYOUTS = [
    Case(),
    Case(shard=2),
    Case(shard=4),
    Case(replicate=2),
    Case(replicate=2, shard=2),
    Case(tp=2),
    Case(tp=2, sequence=False),
    Case(tp=4),
    Case(shard=2, tp=2),
    Case(shard=2, tp=2, sequence=False),
    Case(replicate=2, tp=2),
]
"""Every way to divide up to four ranks."""

SETTINGS: dict[str, tuple[object, ...]] = {
    "degrees": ((1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1)),
    "sequence": (True, False),
    "loss_parallel": (True, False),
    "checkpointing": ("none", "full", "op", "2"),
    "tied": (False, True),
    "vocab": (64, 61),
    "bias": (False, True),
    "packed": (True, False),
    "chunks": (False, True),
    "accumulate": (1, 2),
    "offload": (False, True),
    "reshard": ("default", "always", "never"),
}


def pairwise() -> list[Case]:
    """Return few cases in which every two settings of two features meet, greedily."""
    names = list(SETTINGS)
    missing = {
        frozenset(((a, x), (b, y)))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for x in SETTINGS[a]
        for y in SETTINGS[b]
    }
    chosen = []
    while missing:
        picked: dict[str, object] = {}
        first = min(missing, key=lambda pair: sorted(map(repr, pair)))
        picked.update(first)
        for name in names:
            if name in picked:
                continue
            picked[name] = max(
                SETTINGS[name],
                key=lambda v: sum(frozenset(((name, v), o)) in missing for o in picked.items()),
            )
        items = list(picked.items())
        missing -= {frozenset((a, b)) for i, a in enumerate(items) for b in items[i + 1 :]}
        replicate, shard, tp = picked.pop("degrees")  # pyright: ignore[reportGeneralTypeIssues]
        chosen.append(Case(replicate=replicate, shard=shard, tp=tp, **picked))  # pyright: ignore
    return chosen
