"""From a configuration to a run that is ready for its next step; one helper for each part."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters import build_adapted, frozen_dtype, seed_dropout
from engine.batches import (
    agree_on_data,
    check_pairs,
    first_counters,
    log_balance,
    log_dealing,
    open_training_batches,
    open_training_rows,
    open_validation_sources,
)
from engine.checkpoint import Checkpointer, TrainingState
from engine.combinations import check_combinations
from engine.config import JobConfig
from engine.data.batch import Batch
from engine.data.loader import validation_batches
from engine.data.mixture import MixedRows, numbered
from engine.data.rows import RowSource
from engine.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from engine.distributed import World
from engine.health import NonFinitePolicy
from engine.low_precision import float8_of, follow_updates, log_conversion, packs_frozen
from engine.metrics import Meter, StepCosts, device_peak_flops
from engine.model import Architecture, resolve_architecture
from engine.neftune import EmbeddingNoise
from engine.objectives import Objective
from engine.optim import build_optimizer
from engine.peft_io import read_adapters
from engine.reference import (
    Policy,
    find_reference,
    open_reference,
)
from engine.rules import model_needs
from engine.run_folder import RunFolder
from engine.stalls import StallWatch
from engine.start import build_checkpointer, fill_weights, find_start
from engine.step import Reference, Trainer
from models.adapters import adapter_weights
from models.flops import (
    attention_train_flops,
    linear_train_flops_per_token,
    parameter_counts,
    train_flops_per_token,
)
from models.registry import load_member
from parallelisms.apply import parallelize
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import materialise
from parallelisms.mesh import ParallelDims

log = logging.getLogger("tessera")


@dataclass(kw_only=True, slots=True)
class Run:
    """Everything that `loop.py` drives."""

    config: JobConfig
    world: World
    folder: RunFolder
    trainer: Trainer
    state: TrainingState
    checkpointer: Checkpointer
    meter: Meter
    stalls: StallWatch
    validation: Callable[[], Iterable[Batch]] | None
    """Opens one pass over the held-out rows; None where the run does not validate."""

    validation_names: tuple[str, ...]
    """Names of the held-out sources."""

    mixture: MixedRows | None
    """The training rows, where they are mixed from sources."""


def build(config: JobConfig, world: World, folder: RunFolder) -> Run:
    """Build a run; every rank calls this together. A user's mistake is a ValueError."""
    dims = ParallelDims.of(config.parallelism, world.size).build(world.device.type)
    architecture = resolve_architecture(config.model, model_needs(config, world.device.type))
    tokenizer = open_tokenizer(config)
    check_combinations(config, dims, architecture.config, tokenizer.vocab_size)
    objective = load_member("engine.objectives", config.objective.name, "build")(config.objective)
    rows = None
    if not config.validation.only:
        rows = open_training_rows(config, tokenizer, batch_degree=dims.batch_degree)
    held_out = open_validation_sources(config, tokenizer)
    read = [*([rows] if rows else []), *held_out]
    check_pairs(config, read)
    agree_on_data(tokenizer, read)
    _log_work(config, dims, architecture)
    if rows is not None:
        log_balance(rows, config.training.dealing(dims.batch_degree))

    fingerprint = rows.fingerprint if rows else ""
    checkpointer = build_checkpointer(config, dims, architecture, tokenizer, folder, fingerprint)
    policy = Policy(config, dims, world.device, architecture, checkpointer)
    start = find_start(config, checkpointer)
    model, adapters = _build_model(policy, is_new=start.step is None)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    follow_updates(config, model, optimizer)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        counters=first_counters(),
        data_fingerprint=fingerprint,
    )
    found = find_reference(policy, objective, start.base)
    fill_weights(policy, state, start, found, adapters)
    reference = open_reference(policy, found, read, model)
    meter = _build_meter(config, world, architecture, state)
    stalls = _build_stall_watch(config, architecture, world)
    return Run(
        config=config,
        world=world,
        folder=folder,
        trainer=_build_trainer(
            config, architecture, world, dims, rows, state, meter, stalls, objective, reference
        ),
        state=state,
        checkpointer=checkpointer,
        meter=meter,
        stalls=stalls,
        validation=_validation_batches(config, held_out, dims),
        validation_names=tuple(source.name for source in config.validation.sources) or ("",),
        mixture=rows if isinstance(rows, MixedRows) else None,
    )


def _build_model(policy: Policy, *, is_new: bool) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """Return the parallel model, with memory for its parameters but without values.

    Also what the adapters of a new run start from, which are judged before there is such memory.
    """
    config, dims, device = policy.config, policy.dims, policy.device
    model, plan = build_adapted(policy.architecture, config.adapter)
    adapters = read_adapters(model, config, policy.architecture) if is_new else {}
    parallelize(
        model,
        plan,
        dims,
        parallel=config.parallelism,
        precision=precision_of(config),
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        frozen=config.model.freeze,
        float8=float8_of(config),
        packs_frozen=packs_frozen(config),
    )
    _log_frozen(model)
    log_conversion(config, model)
    materialise(model, config.training.parameters_on(device), computes_on=device)
    seed_dropout(config.adapter, dims, config.debug.effective_seed)
    return model, adapters


def _log_work(config: JobConfig, dims: ParallelDims, architecture: Architecture) -> None:
    total, _ = parameter_counts(architecture.config)
    log.info("model: %s, %s, %s parameters", config.model.name, architecture.origin, f"{total:,}")
    sizes = architecture.config
    for note in sizes.notes:
        log.info("model: %s", note)
    log.info(
        "attention: %s, kernels: %s; ranks: %s", sizes.attention, sizes.kernels, dims.describe()
    )
    log.info("number formats: %s", precision_of(config).describe())
    for adapter in config.adapter.all:
        log.info("adapter %s", adapter.describe())
    if not config.validation.only:
        log_dealing(config, dims.batch_degree)


def _log_frozen(model: nn.Module) -> None:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    if frozen := sum(size for size, is_trained in sizes if not is_trained):
        log.info("frozen: %s of %s parameters", f"{frozen:,}", f"{sum(n for n, _ in sizes):,}")


def open_tokenizer(config: JobConfig) -> Tokenizer:
    """Return the run's tokenizer; dummy tokens do without one of the model's own."""
    folder = config.model.tokenizer_folder
    trained = config.data.read(config.training.dataset)
    only_dummies = all(dataset == "dummy" for dataset, _ in trained)
    if folder and not has_tokenizer(folder) and only_dummies:
        log.info(
            "%s holds no tokenizer: dummy tokens need none, the built-in one stands in", folder
        )
        folder = ""
    return load_tokenizer(folder, config.data.cache_folder)


def precision_of(config: JobConfig) -> PrecisionConfig:
    """Collect the number formats of a run from its training section."""
    training = config.training
    param_dtype = getattr(torch, training.mixed_precision_param)
    return PrecisionConfig(
        param_dtype=param_dtype,
        frozen_dtype=frozen_dtype(config.adapter, param_dtype),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        master_dtype=getattr(torch, training.dtype),
        cpu_offload=training.enable_cpu_offload,
    )


def _validation_batches(
    config: JobConfig, parts: Sequence[RowSource], dims: ParallelDims
) -> Callable[[], Iterable[Batch]] | None:
    validation = config.validation
    if not parts:
        return None
    if validation.sources:
        parts = numbered(parts)
    return lambda: chain.from_iterable(
        validation_batches(
            rows,
            local_batch_size=validation.local_batch_size,
            batch_rank=dims.batch_rank,
            batch_degree=dims.batch_degree,
            steps=validation.steps,
            dataloader=validation.dataloader,
            pad_to_multiple=config.parallelism.token_multiple,
        )
        for rows in parts
    )


def _build_meter(
    config: JobConfig, world: World, architecture: Architecture, state: TrainingState
) -> Meter:
    sizes, counters = architecture.config, state.counters
    named = list(state.model.named_parameters(remove_duplicate=False))
    trained = {name for name, parameter in named if parameter.requires_grad}
    work: dict[str, Any] = {
        "is_trainable": trained.__contains__,
        "adapters": adapter_weights((name, parameter.numel()) for name, parameter in named),
    }
    return Meter(
        device=world.device,
        num_devices=world.size,
        costs=StepCosts(
            flops_per_token=train_flops_per_token(sizes, config.training.seq_len, **work),
            linear_flops_per_token=linear_train_flops_per_token(sizes, **work),
            attention_flops=lambda squared: attention_train_flops(
                sizes, int(squared), longest_tokens=config.training.seq_len
            ),
        ),
        peak_device_flops=device_peak_flops(world.device),
        total_steps=config.training.steps,
        start_step=int(counters["step"]),
        tokens_so_far=int(counters["tokens"]),
        trained_tokens_so_far=int(counters["trained_tokens"]),
    )


def _build_stall_watch(config: JobConfig, architecture: Architecture, world: World) -> StallWatch:
    # Parameters and gradients in host memory are copied to and fro, and some copies are waited for.
    waits = config.training.enable_cpu_offload or architecture.config.waits_for_device
    return StallWatch(
        world.device,
        speaks=world.rank == 0,
        waits_by_design=waits,
    )


def _build_trainer(
    config: JobConfig,
    architecture: Architecture,
    world: World,
    dims: ParallelDims,
    rows: RowSource | None,
    state: TrainingState,
    meter: Meter,
    stalls: StallWatch,
    objective: Objective,
    reference: Reference | None,
) -> Trainer:
    training = config.training
    rows_per_step = microbatches = 0
    batches: Iterator[Batch] = iter(())
    if rows is not None:
        dealing = training.dealing(dims.batch_degree)
        rows_per_step, microbatches = dealing.rows_per_step, dealing.microbatches
        batches = open_training_batches(
            config,
            rows,
            batch_rank=dims.batch_rank,
            batch_degree=dims.batch_degree,
            counters=state.counters,
        )
    assert state.optimizer is not None, "training has an optimizer"
    return Trainer(
        model=state.model,
        optimizer=state.optimizer,
        objective=objective,
        reference=reference,
        batches=_timed(batches, meter),
        nonfinite=NonFinitePolicy(training.on_nonfinite, gather=world.gather_texts),
        dims=dims,
        device=world.device,
        rows_per_step=rows_per_step,
        microbatches=microbatches,
        max_norm=training.max_norm,
        source_names=rows.source_names if rows is not None else ("",),
        noise=_embedding_noise(config, architecture),
        watched=stalls.working,
    )


def _embedding_noise(config: JobConfig, architecture: Architecture) -> EmbeddingNoise | None:
    if config.training.neftune_noise_alpha == 0.0:
        return None
    return EmbeddingNoise(
        alpha=config.training.neftune_noise_alpha,
        seed=config.debug.effective_seed,
        width=architecture.config.hidden_size,
        dtype=precision_of(config).param_dtype,
    )


def _timed(batches: Iterator[Batch], meter: Meter) -> Iterator[Batch]:
    while True:
        with meter.loading():
            batch = next(batches)
        yield batch
