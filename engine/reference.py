"""The reference model of preference objectives: on the policy's plan, itself, or asked only once.

What it is asked for are the log-probabilities of whole answers. They are the same whether a frozen
second model reads every microbatch, or the policy without its adapters, or whether all pairs are
read before training, when a file in the cache folder keeps them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engine.adapters import AdapterConfig, build_adapted, fill_adapters
from engine.batches import token_rows
from engine.checkpoint import Checkpointer, TrainingState
from engine.checkpoint_search import Source
from engine.checkpoint_state import saved_identity
from engine.checkpoint_storage import RankGroup
from engine.config import JobConfig
from engine.data.batch import Batch
from engine.data.cache import build_once, cache_root, digest_of, is_complete
from engine.data.loader import DataloaderConfig, validation_batches
from engine.data.rows import RowSource, TokenRows
from engine.hf_weights import has_weights
from engine.low_precision import float8_of, packs_frozen
from engine.model import Architecture
from engine.objectives import Objective
from engine.objectives import SequenceSum as SumOfSequence
from engine.objectives._answers import answers_of
from engine.origin import LAYOUT, Origin, find_origin, source_of, start_source, text_of
from engine.peft_io import fill_from, read_adapters
from engine.step import Reference, local_tokens, model_inputs
from models.layers.lora import adapters_disabled
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.apply import parallelize
from parallelisms.collectives import SequenceSum, sum_over
from parallelisms.fsdp import PrecisionConfig, reshard
from parallelisms.materialise import fill, materialise
from parallelisms.mesh import ParallelDims

log = logging.getLogger("tessera")

FILE_NAME = "logps.npy"


class ReferenceModel:
    """Gives a microbatch what a frozen model makes of its answers.

    No parameter stays gathered between two calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, batch: Batch, sequence_sum: SumOfSequence) -> Batch:
        """Return this rank's part of a microbatch with `reference_logps_BP2`.

        Every rank must call this with its part of the same microbatches.
        """
        answered = _answered(self._model, batch, sequence_sum)
        reshard(self._model)
        return answered


class AdaptersOff:
    """Gives a microbatch what the model that is trained makes of its answers without adapters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, batch: Batch, sequence_sum: SumOfSequence) -> Batch:
        """As that of `ReferenceModel`; what stays gathered is wanted by the next forward pass."""
        with adapters_disabled(self._model):
            return _answered(self._model, batch, sequence_sum)


@torch.no_grad()
def _answered(model: nn.Module, batch: Batch, sequence_sum: SumOfSequence) -> Batch:
    logps_BT = model(batch.tokens_BT, **model_inputs(batch))
    answers = answers_of(logps_BT, batch, sequence_sum)
    return replace(batch, reference_logps_BP2=answers.logps_BP2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What asking the reference once takes."""

    dims: ParallelDims
    device: torch.device
    root: Path
    """The cache folder."""

    reference: str
    """Digest of the reference model."""

    local_batch_size: int
    pad_to_multiple: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What the reference shares with the model that is trained."""

    config: JobConfig
    dims: ParallelDims
    device: torch.device
    architecture: Architecture
    checkpointer: Checkpointer
    """Loads weights; its own steps are not looked at."""


def find_reference(policy: Policy, objective: Objective, base: Origin | None) -> Origin | None:
    """Return where the reference of a run is from, None where its objective uses none.

    `base` is what adapters stand beside, where they are trained. Every rank must call this; the
    first one reads the files.
    """
    if not objective.uses_reference:
        return None
    config, kind = policy.config, reference_kind(policy.config)
    if kind == "adapters_off":
        assert base is not None, "there are adapters to switch off"
        found = base
    else:
        found = find_origin(config, reference_source(config), adapters=_start_adapters(config))
    log.info("reference model: %s, %s", found.name, kind)
    return found


def reference_kind(config: JobConfig) -> str:
    """Return the value of `objective.reference` in force.

    By itself a model with adapters is compared with itself without them where that is what it
    starts from: without adapters from a folder, and without another reference.
    """
    chosen = config.objective.reference
    if chosen != "auto":
        return chosen
    starts_elsewhere = config.objective.reference_path or _start_adapters(config)
    return "adapters_off" if config.adapter.specs and not starts_elsewhere else "online"


def _start_adapters(config: JobConfig) -> list[str]:
    """Return the folders of the adapters that the reference has as the run starts with them."""
    if config.objective.reference_path:
        return []
    return [one.path for one in config.adapter.all if one.path]


def refuse_other_reference(found: Origin | None, config: JobConfig, own: Source) -> None:
    """Raise ValueError where a step of this run was trained against another reference."""
    saved = saved_identity(own.path, "reference")
    if found is None or not saved or saved["weights"] == found.weights:
        return
    raise ValueError(
        f"objective.reference_path = {config.objective.reference_path!r}: {own.path} was trained "
        f"against {saved['name']} with weights {saved['weights'][:12]}, and this run would compare "
        f"with {found.name}, {found.weights[:12]}; give objective.reference_path the folder that "
        "it was trained against (initial values, or adapters: the settings that it started with, "
        "adapter.path too), or start anew in another job.dump_folder"
    )


def open_reference(
    policy: Policy, found: Origin | None, read: Sequence[RowSource], model: nn.Module
) -> Reference | None:
    """Return what a step asks, or give all rows that are `read` the answers and return None.

    None too where there is no reference. `model` is the one that is trained. Every rank must call
    this.
    """
    if found is None:
        return None
    config, architecture = policy.config, policy.architecture
    kind = reference_kind(config)
    if kind == "adapters_off":
        return AdaptersOff(model)
    if kind == "online":
        return ReferenceModel(build_reference(policy, found.source))
    facts: dict[str, object] = {
        "architecture": architecture.family.config_to_hf(architecture.config),
        "dtype": config.training.mixed_precision_param,
    }
    if config.model.converters:
        facts["low_precision"] = [packs_frozen(config), float8_of(config)]
    if _start_adapters(config):
        facts["scales"] = [spec.scale for spec in config.adapter.specs]
    settings = Preparation(
        dims=policy.dims,
        device=policy.device,
        root=cache_root(config.data.cache_folder),
        reference=digest_of(LAYOUT, found.weights, text_of(facts)),
        local_batch_size=config.training.local_batch_size,
        pad_to_multiple=config.parallelism.token_multiple,
    )
    prepare(token_rows(read), lambda: build_reference(policy, found.source), settings)
    return None


def build_reference(policy: Policy, source: Source | None) -> nn.Module:
    """Return the frozen model on the policy's plan, in the type that it computes with.

    Weights are cast to that type for every forward pass anyway, so nothing is lost by keeping
    them in it.
    """
    config = policy.config
    dtype = getattr(torch, config.training.mixed_precision_param)
    is_adapted = bool(_start_adapters(config))
    section = config.adapter if is_adapted else AdapterConfig()
    model, plan = build_adapted(policy.architecture, section)
    adapters = read_adapters(model, config, policy.architecture) if is_adapted else {}
    parallelize(
        model,
        plan,
        policy.dims,
        parallel=replace(config.parallelism, fsdp_reshard_after_forward="always"),
        precision=PrecisionConfig(
            param_dtype=dtype,
            reduce_dtype=dtype,
            master_dtype=dtype,
            cpu_offload=config.training.enable_cpu_offload,
        ),
        activation_checkpoint=ActivationCheckpointConfig(mode="none"),
        compile=config.compile,
        frozen=["regex:.*"],
        float8=float8_of(config),
        packs_frozen=packs_frozen(config),
    )
    materialise(model, config.training.parameters_on(policy.device), computes_on=policy.device)
    seed = config.debug.effective_seed
    if source is None or config.checkpoint.initial_load_allow:
        fill(model, policy.architecture.initial_values(model, seed=seed))
    if source is not None:
        state = TrainingState(model=model, optimizer=None, counters={}, data_fingerprint="")
        policy.checkpointer.load(state, source)
    if is_adapted:
        fill_adapters(model, seed=seed)
        fill_from(model, adapters)
    return model.eval()


def reference_source(config: JobConfig) -> Source | None:
    """Return where the reference's weights are; None means the initial values of the run.

    That is `objective.reference_path`, or what the run itself starts from, also when it is resumed.
    Every rank must call this.
    """
    if not (named := config.objective.reference_path):
        return start_source(config)
    path = Path(named).expanduser()
    return source_of(path, in_hf=has_weights(path), key="objective.reference_path")


def prepare(
    sources: Sequence[TokenRows], build: Callable[[], nn.Module], settings: Preparation
) -> None:
    """Give the rows of each source the reference's log-probabilities, asked for once.

    Pairs that are longer than the rows are not asked for. `build` makes the reference model, and is
    called only where a file is missing on some machine. Every rank must call this.
    """
    ranks = RankGroup()
    folders = [_folder(rows, settings) for rows in sources]
    known = ranks.gather([is_complete(folder) for folder in folders])
    ranks.close()
    missing = [not all(column) for column in zip(*known, strict=True)]
    reference = ReferenceModel(build()) if any(missing) else None
    for rows, folder, is_missing in zip(sources, folders, missing, strict=True):
        name = rows.source_names[0]
        if is_missing:
            assert reference is not None, "it was built where a file is missing"
            started = time.perf_counter()
            logps = _ask(rows, reference, settings)
            what = f"asking the reference model ({name})"
            build_once(folder, what, partial(_write, logps))
            log.info(
                "%s: the reference model has read %s pairs in %.1f s, kept in %s",
                *(name, f"{len(logps):,}", time.perf_counter() - started, folder),
            )
        else:
            log.info("%s: log-probabilities of the reference are in %s", name, folder)
        rows.reference_logps = np.load(folder / FILE_NAME, mmap_mode="r")


def _folder(rows: TokenRows, settings: Preparation) -> Path:
    key = digest_of(settings.reference, rows.file.digest, rows.seq_len)
    return settings.root / "references" / key


def _write(logps: npt.NDArray[np.float32], target: Path) -> None:
    np.save(target / FILE_NAME, logps)


def _ask(
    rows: TokenRows, reference: ReferenceModel, settings: Preparation
) -> npt.NDArray[np.float32]:
    """Return the log-probabilities of both answers of each pair of a source, (pairs, 2)."""
    dims, device = settings.dims, settings.device
    sequence_sum = SequenceSum(dims)
    found = torch.zeros(len(rows.file.offsets) - 1, 2, dtype=torch.float32)
    batches = validation_batches(
        rows,
        local_batch_size=settings.local_batch_size,
        batch_rank=dims.batch_rank,
        batch_degree=dims.batch_degree,
        dataloader=DataloaderConfig(),
        pad_to_multiple=settings.pad_to_multiple,
    )
    for whole in batches:
        asked = reference(local_tokens(whole.to(device), dims), sequence_sum)
        assert asked.reference_logps_BP2 is not None, "a reference answers"
        for number, logps_P2 in zip(whole.rows_B, asked.reference_logps_BP2.cpu(), strict=True):
            if number >= 0:
                pairs = rows.documents(int(number))
                found[pairs] = logps_P2[: len(pairs)]
    return sum_over(dims, "batch", found.to(device)).cpu().numpy()
