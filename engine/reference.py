"""The reference model of preference objectives: frozen, laid out as the policy, or asked only once.

What it is asked for are the log-probabilities of whole answers. They are the same whether it reads
every microbatch or all pairs before training, when a file in the cache folder keeps them.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engine.batches import token_rows
from engine.checkpoint import Checkpointer, TrainingState
from engine.checkpoint_search import Source, initial_source
from engine.checkpoint_storage import RankGroup
from engine.config import JobConfig
from engine.data.batch import Batch
from engine.data.cache import build_once, cache_root, digest_of, file_digest, is_complete
from engine.data.loader import DataloaderConfig, validation_batches
from engine.data.rows import RowSource, TokenRows
from engine.hf_io import CONFIG_NAME
from engine.model import Architecture
from engine.objectives import Objective
from engine.objectives import SequenceSum as SumOfSequence
from engine.objectives._answers import answers_of
from engine.step import Reference, local_tokens, model_inputs
from models.initialise import initial_values
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.apply import parallelize
from parallelisms.collectives import SequenceSum, sum_over
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import fill, materialise
from parallelisms.mesh import ParallelDims

log = logging.getLogger("tessera")

LAYOUT = 1
FILE_NAME = "logps.npy"


class ReferenceModel:
    """Gives a microbatch what a frozen model makes of its answers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, batch: Batch, sequence_sum: SumOfSequence) -> Batch:
        """Return this rank's part of a microbatch with `reference_logps_BP2`.

        Every rank must call this with its part of the same microbatches.
        """
        logps_BT = self._model(batch.tokens_BT, **model_inputs(batch))
        answers = answers_of(logps_BT, batch, sequence_sum)
        return replace(batch, reference_logps_BP2=answers.logps_BP2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What asking the reference once takes."""

    dims: ParallelDims
    device: torch.device
    root: Path
    """The cache folder."""

    weights: str
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

    @property
    def start(self) -> str | None:
        """Folder that the run starts from; none where it has initial values."""
        section, assets = self.config.checkpoint, self.config.model.hf_assets_path
        if not section.enable:
            return None
        return section.initial_load_path or (assets if section.initial_load_in_hf else None)


def open_reference(
    policy: Policy, objective: Objective, read: Sequence[RowSource]
) -> Reference | None:
    """Return what a step asks, or give all rows that are `read` the answers and return None.

    None too where the objective uses no reference. Every rank must call this.
    """
    if not objective.uses_reference:
        return None
    config, sizes = policy.config, policy.architecture.config
    source = reference_source(policy)
    said = str(source.path) if source else f"initial values, seed {config.debug.effective_seed}"
    log.info("reference model: %s, %s", said, config.objective.reference)
    if config.objective.reference == "online":
        return ReferenceModel(build_reference(policy, source))
    root = cache_root(config.data.cache_folder)
    facts = {
        "architecture": policy.architecture.family.config_to_hf(sizes),
        "dtype": config.training.mixed_precision_param,
        "seed": config.debug.effective_seed if source is None else None,
        "anew": config.checkpoint.initial_load_allow if source else [],
    }
    settings = Preparation(
        dims=policy.dims,
        device=policy.device,
        root=root,
        weights=weights_digest(source, facts, root),
        local_batch_size=config.training.local_batch_size,
        pad_to_multiple=config.parallelism.token_multiple,
    )
    prepare(token_rows(read), lambda: build_reference(policy, source), settings)
    return None


def build_reference(policy: Policy, source: Source | None) -> nn.Module:
    """Return the frozen model on the policy's plan, in the type that it computes with.

    Weights are cast to that type for every forward pass anyway, so nothing is lost by keeping
    them in it.
    """
    config = policy.config
    dtype = getattr(torch, config.training.mixed_precision_param)
    model = policy.architecture.build_meta()
    parallelize(
        model,
        policy.architecture.plan,
        policy.dims,
        parallel=config.parallelism,
        precision=PrecisionConfig(
            param_dtype=dtype,
            reduce_dtype=dtype,
            master_dtype=dtype,
            cpu_offload=config.training.enable_cpu_offload,
        ),
        activation_checkpoint=ActivationCheckpointConfig(mode="none"),
        compile=config.compile,
        frozen=["regex:.*"],
    )
    parameters_on = "cpu" if config.training.enable_cpu_offload else policy.device
    materialise(model, parameters_on, computes_on=policy.device)
    seed = config.debug.effective_seed
    if source is None or config.checkpoint.initial_load_allow:
        fill(model, initial_values(model, policy.architecture.config, seed=seed))
    if source is not None:
        state = TrainingState(model=model, optimizer=None, counters={}, data_fingerprint="")
        policy.checkpointer.load(state, source)
    return model.eval()


def reference_source(policy: Policy) -> Source | None:
    """Return where the reference's weights are; None means the initial values of the run.

    That is `objective.reference_path`, or what the run itself starts from, also when it is resumed.
    Every rank must call this.
    """
    path = policy.config.objective.reference_path
    folder, in_hf = policy.start, policy.config.checkpoint.initial_load_in_hf
    if path:
        folder, in_hf = path, (Path(path).expanduser() / CONFIG_NAME).is_file()
    if not folder:
        return None
    ranks = RankGroup()
    try:
        return initial_source(Path(folder).expanduser(), ranks, in_hf=in_hf, only_model=True)
    finally:
        ranks.close()


def weights_digest(source: Source | None, facts: Mapping[str, Any], root: Path) -> str:
    """Return the digest of a reference: the bytes of its files, or `facts` that draw its values."""
    content: list[object] = []
    if source is not None:
        files = sorted(path for path in source.path.rglob("*") if path.is_file())
        if source.kind == "hf":
            files = [path for path in files if path.suffix in (".safetensors", ".json")]
        content = [[path.name, file_digest(path, root)] for path in files]
    return digest_of(LAYOUT, content, json.dumps(facts, sort_keys=True, default=str))


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
    key = digest_of(settings.weights, rows.file.digest, rows.seq_len)
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
