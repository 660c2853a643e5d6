"""One plan against one fp32 process: the loss and every parameter's gradient.

The tests and `python -m engine.verify parity` compare through this file. `case.py` says what a
plan is, `subject.py` which model is compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.data.batch import document_offsets
from engine.neftune import EmbeddingNoise
from engine.reference import AdaptersOff, ReferenceModel
from engine.verify.case import Case
from engine.verify.preference import Judge, of_reference, with_pairs
from engine.verify.subject import TINY, Subject, adapters_of
from models.adapters import adapt
from models.decoder import DecoderConfig
from models.initialise import InitialRule, initial_slice, initial_values
from models.layers.lora import adapter_of
from models.plan import ModelPlan
from parallelisms import ParallelConfig, ParallelDims, parallelize
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.collectives import sum_over
from parallelisms.compile import CompileConfig
from parallelisms.context import split_tokens
from parallelisms.fsdp import PrecisionConfig
from parallelisms.low_precision import Float8
from parallelisms.materialise import fill, materialise

FP32_REORDERED_SUM = 5e-6  # another order of the same sums; 4.5e-6 is the worst seen, most 2e-6
FP32_OTHER_KERNELS = 2e-5  # a GPU's kernels add in an order that depends on the shapes
BF16_ARITHMETIC = 0.1  # eight bits of mantissa through three blocks
BF16_ON_GPUS = 6e-2  # wider tensors; 2.8e-2 is the worst seen
ZERO_GRADIENT_FLOOR = 1e-6  # below this a gradient counts as zero in theory
IGNORED_LABEL = -100
NOISE_ALPHA = 5.0
ADAPTED = InitialRule(kind="normal", std=0.1)  # B, which begins with zeros and would hide A
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far one case is from one fp32 process."""

    loss: float
    reference_loss: float
    worst_error: float
    """Largest of max|gradient - reference| / max|reference| over the parameters."""

    worst_name: str
    """The parameter it belongs to."""

    problems: tuple[str, ...] = ()
    """Gradients that are missing, or zero everywhere where the reference's are not."""

    checks: Mapping[str, float] = field(default_factory=dict[str, float])
    """What else was compared, by its column, with the relative error."""

    @property
    def loss_error(self) -> float:
        """Return the difference of the losses, relative to the reference."""
        return abs(self.loss - self.reference_loss) / abs(self.reference_loss)

    def is_within(self, tolerance: float) -> bool:
        """Say whether the loss and every gradient are; what is not a number never is."""
        errors = (self.loss_error, self.worst_error, *self.checks.values())
        return all(error <= tolerance for error in errors) and not self.problems

    def check(self, tolerance: float = FP32_REORDERED_SUM) -> None:
        """Fail unless the loss and every gradient are within `tolerance`."""
        assert self.is_within(tolerance), self


def batch(case: Case, subject: Subject = TINY) -> dict[str, Tensor]:
    """Return the global batch: two documents a row, and unevenly many labels that count."""
    generator = torch.Generator().manual_seed(1)
    num_tokens = subject.num_tokens
    shape = (subject.num_rows, num_tokens)
    tokens_BT = torch.randint(case.vocab, shape, generator=generator)
    labels_BT = torch.randint(case.vocab, shape, generator=generator)
    labels_BT[torch.rand(shape, generator=generator) < 0.3] = IGNORED_LABEL
    labels_BT[0, 3:] = IGNORED_LABEL
    first = num_tokens * 3 // 8 if case.packed else num_tokens
    positions = torch.cat([torch.arange(first), torch.arange(num_tokens - first)])
    documents = (torch.arange(num_tokens) >= first).long().add(1)
    rows = {
        "tokens_BT": tokens_BT,
        "labels_BT": labels_BT,
        "positions_BT": positions.expand(shape).contiguous(),
        "documents_BT": documents.expand(shape).contiguous(),
    }
    return rows if case.objective == "pretrain" else with_pairs(rows)


def with_offsets(rows: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rows, or a rank's part of them, with the document offsets of whole ones like these."""
    documents_BT = whole["documents_BT"][: len(rows["tokens_BT"])]
    return {**rows, "document_offsets": document_offsets(documents_BT)}


def forward(model: nn.Module, rows: dict[str, Tensor], case: Case) -> Tensor:
    """Return the log-probabilities of the labels; rows of one document come without ids."""
    rows = dict(rows)
    if not case.packed:
        for name in ("documents_BT", "document_offsets"):
            rows.pop(name, None)
    return model(rows.pop("tokens_BT"), **rows)


def start_values(model: nn.Module, config: DecoderConfig) -> Callable[[str, tuple], Tensor]:
    """Draw the engine's initial values, with all that are one or zero moved off it."""
    draw = initial_values(model, config, seed=SEED)

    def moved(name: str, slices: tuple[slice, ...]) -> Tensor:
        if ".lora_B." in name:
            return initial_slice(name, model.get_parameter(name).shape, ADAPTED, slices, SEED)
        values = draw(name, slices)
        if values.ndim == 1:
            rows = torch.arange(slices[0].start, slices[0].stop, dtype=torch.float32)
            values = values + 0.1 * torch.sin(rows + len(name))
        return values

    return moved


def reference_case(case: Case) -> Case:
    """Return the single plain process that computes the same thing."""
    kept = ("tied", "vocab", "bias", "packed", "neftune", "objective", "adapter")
    return Case(**{name: getattr(case, name) for name in kept})


@lru_cache(maxsize=32)
def reference(
    case: Case, subject: Subject = TINY, device_type: str = "cpu"
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one fp32 process that knows no parallelism."""
    config = subject.sizes(case)
    with torch.device("meta"):
        model = subject.family.build(config)
    adapt(model, subject.family.plan(config), adapters_of(case))
    materialise(model, device_type)
    fill(model, start_values(model, config))
    rows = {name: value.to(device_type) for name, value in batch(case, subject).items()}
    alone = ParallelDims.of(ParallelConfig(), 1)
    inputs = with_offsets({**rows, **noise(rows, alone, case, subject)}, rows)
    if case.objective == "pretrain":
        count = (rows["labels_BT"] != IGNORED_LABEL).sum()
        loss = -forward(model, inputs, case).sum() / count
    else:
        with torch.device("meta"):
            other = subject.family.build(config)
        materialise(other, device_type)
        fill(other, of_reference(start_values(other, config), case))
        judge = Judge(case, rows, alone, ReferenceModel(other))
        loss = judge.loss(lambda: forward(model, inputs, case), rows, 0)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def parallel_config(case: Case) -> ParallelConfig:
    """Return the section of a configuration that asks for the layout of a case."""
    fields: dict[str, Any] = {
        "data_parallel_replicate_degree": case.replicate,
        "data_parallel_shard_degree": case.shard,
        "tensor_parallel_degree": case.tp,
        "sequence_parallel": case.sequence,
        "disable_loss_parallel": not case.loss_parallel,
        "fsdp_reshard_after_forward": case.reshard,
        "fsdp_copy_engine": case.copy_engine,
    }
    if case.cp > 1:
        fields |= {
            "context_parallel_degree": case.cp,
            "context_parallel_mode": case.context,
            "context_parallel_load_balancer": "headtail" if case.balanced else None,
        }
    return ParallelConfig(**fields)


def checkpoint_config(name: str) -> ActivationCheckpointConfig:
    """Return the section of a checkpointing mode by its short name."""
    if name in ("op", "2"):
        return ActivationCheckpointConfig(mode="selective", selective_ac_option=name)
    mode: Any = "memory_budget" if name == "budget" else name
    return ActivationCheckpointConfig(mode=mode, memory_budget=0.4)


def compile_config(case: Case) -> CompileConfig:
    """Return the section that asks for the compiler of a case."""
    return CompileConfig(enable=bool(case.backend), backend=case.backend or "inductor")


def build_case(
    case: Case,
    *,
    plan: ModelPlan | None = None,
    frozen: tuple[str, ...] = (),
    device_type: str = "cpu",
    subject: Subject = TINY,
    dims: ParallelDims | None = None,
    filled: bool = True,
    float8: Float8 | None = None,
    packs_frozen: bool = False,
) -> tuple[Any, ParallelDims]:
    """Return the parallel model of a case, with the reference's values, and its meshes.

    Without `filled` the values are undefined. `dims` are meshes of the same degrees that are
    built already. Every rank must call this.
    """
    config = subject.sizes(case)
    parallel = parallel_config(case)
    if dims is None:
        dims = ParallelDims.of(parallel, case.world_size).build(device_type)
    with torch.device("meta"):
        model = subject.family.build(config)
    param_dtype = torch.bfloat16 if case.bfloat16 else torch.float32
    plan = adapt(model, plan or subject.family.plan(config), adapters_of(case))
    parallelize(
        model,
        plan,
        dims,
        parallel=parallel,
        precision=PrecisionConfig(
            param_dtype=param_dtype,
            frozen_dtype=None if case.adapter == "none" else param_dtype,
            cpu_offload=case.offload,
        ),
        activation_checkpoint=checkpoint_config(case.checkpointing),
        compile=compile_config(case),
        frozen=frozen,
        float8=float8,
        packs_frozen=packs_frozen,
    )
    materialise(model, "cpu" if case.offload else device_type, computes_on=device_type)
    if filled:
        fill(model, start_values(model, config))
    return model, dims


def local_rows(rows: dict[str, Tensor], dims: ParallelDims, case: Case) -> dict[str, Tensor]:
    """Return the rows that this rank reads, and of these the tokens that it holds."""
    mine = {k: v.chunk(dims.batch_degree)[dims.batch_rank] for k, v in rows.items()}
    return split_tokens(mine, dims)


def noise(
    rows: dict[str, Tensor], dims: ParallelDims, case: Case, subject: Subject
) -> dict[str, Tensor]:
    """Return what a case adds to the embeddings of this rank's tokens, as an input of the model."""
    if not case.neftune:
        return {}
    draw = EmbeddingNoise(
        alpha=NOISE_ALPHA,
        seed=SEED,
        width=subject.config.hidden_size,
        dtype=torch.bfloat16 if case.bfloat16 else torch.float32,
    )
    rank, degree = (0, 1) if dims.world_size == 1 else (dims.batch_rank, dims.batch_degree)
    whole = {"documents_BT": rows["documents_BT"]}
    whole["rows_B"] = torch.arange(subject.num_rows, device=rows["documents_BT"].device)
    mine = {k: v.chunk(degree)[rank] for k, v in whole.items()}
    offsets = document_offsets(mine["documents_BT"])
    return {"embedding_noise_BTD": draw(**mine, document_offsets=offsets, dims=dims)}


def _judge(
    model: nn.Module, rows: dict[str, Tensor], dims: ParallelDims, case: Case, subject: Subject
) -> Judge:
    """Return the judge of a plan: its reference is on the same plan, or itself without adapters."""
    if case.adapter != "none":
        return Judge(case, rows, dims, AdaptersOff(model))
    config = subject.sizes(case)
    on_device = replace(case, checkpointing="none")
    frozen = ("regex:.*",)
    other, _ = build_case(
        on_device, frozen=frozen, device_type=dims.device_type, subject=subject, dims=dims
    )
    fill(other, of_reference(start_values(other, config), case))
    return Judge(case, rows, dims, ReferenceModel(other))


def train(model: nn.Module, dims: ParallelDims, case: Case, subject: Subject = TINY) -> float:
    """Run forward and backward over this rank's rows; return the global loss."""
    rows = {k: v.to(dims.device_type) for k, v in batch(case, subject).items()}
    judge = None if case.objective == "pretrain" else _judge(model, rows, dims, case, subject)
    count = (rows["labels_BT"] != IGNORED_LABEL).sum()
    mine = {**local_rows(rows, dims, case), **noise(rows, dims, case, subject)}
    total = torch.zeros((), device=dims.device_type)
    for index in range(case.accumulate):
        part = {k: v.chunk(case.accumulate)[index].contiguous() for k, v in mine.items()}
        part = with_offsets(part, rows)
        if judge is None:
            loss = -forward(model, part, case).sum() / count
        else:
            loss = judge.loss(partial(forward, model, part, case), part, index)
        loss.backward()
        total += loss.detach()
    return sum_over(dims, "loss", total).item()


def compare(
    model: nn.Module,
    loss: float,
    case: Case,
    *,
    subject: Subject = TINY,
    device_type: str = "cpu",
) -> Comparison:
    """Compare the loss and every gradient with the reference's; every rank must call this."""
    expected = reference(reference_case(case), subject, device_type)
    return compare_with(model, loss, *expected, device_type=device_type)


def compare_with(
    model: nn.Module,
    loss: float,
    reference_loss: float,
    expected: Mapping[str, Tensor],
    *,
    device_type: str = "cpu",
) -> Comparison:
    """Compare the loss and every gradient with `expected` ones; every rank must call this."""
    is_adapted = any(adapter_of(name) for name in expected)
    named = dict(model.named_parameters())
    names = {name for name in named if not is_adapted or adapter_of(name)}
    problems = [
        f"{name} is frozen and has a gradient"
        for name in sorted(named.keys() - names)
        if named[name].grad is not None
    ]
    problems += [f"{name} is on one side only" for name in sorted(names ^ set(expected))]
    worst_error, worst_name = 0.0, ""
    for name, parameter in named.items():
        if name not in expected:
            continue
        size = expected[name].abs().max().item()
        if parameter.grad is None:
            problems.append(f"{name} has no gradient")
        gradient = _whole_gradient(parameter, device_type)
        if parameter.grad is not None and size > ZERO_GRADIENT_FLOOR and not gradient.any():
            problems.append(f"{name} is zero everywhere in its gradient")
        difference = (gradient.float() - expected[name]).abs().max().item()
        error = difference / max(size, ZERO_GRADIENT_FLOOR)
        if not error <= worst_error:  # also when it is not a number
            worst_error, worst_name = error, name
    return Comparison(
        loss=loss,
        reference_loss=reference_loss,
        worst_error=worst_error,
        worst_name=worst_name,
        problems=tuple(problems),
    )


def _whole_gradient(parameter: nn.Parameter, device_type: str) -> Tensor:
    # A missing gradient joins as zeros: the other ranks may have theirs and wait to gather it.
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    gradient = gradient.detach().to(device_type)
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def run_case(
    case: Case,
    *,
    device_type: str = "cpu",
    subject: Subject = TINY,
    dims: ParallelDims | None = None,
    plan: ModelPlan | None = None,
) -> Comparison:
    """Train one step and compare; every rank must call this."""
    model, dims = build_case(case, plan=plan, device_type=device_type, subject=subject, dims=dims)
    loss = train(model, dims, case, subject)
    return compare(model, loss, case, subject=subject, device_type=device_type)


def worst(comparisons: list[Comparison]) -> Comparison:
    """Return the comparison of all ranks together: the largest error, and every problem."""

    def size(error: float) -> float:
        return error if error == error else float("inf")

    found = max(comparisons, key=lambda one: size(one.worst_error))
    loss = max(comparisons, key=lambda one: one.loss_error).loss
    problems = dict.fromkeys(p for one in comparisons for p in one.problems)
    checks = {n: max((one.checks[n] for one in comparisons), key=size) for n in found.checks}
    return replace(found, loss=loss, problems=tuple(problems), checks=checks)
