"""The reference model of preference objectives: frozen, on the policy's plan, or asked only once.

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

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engine.batches import token_rows
from engine.checkpoint import Checkpointer, TrainingState
from engine.checkpoint_search import Source, initial_source
from engine.checkpoint_state import saved_reference
from engine.checkpoint_storage import RankGroup
from engine.config import JobConfig
from engine.data.batch import Batch
from engine.data.cache import build_once, cache_root, digest_of, file_digest, is_complete
from engine.data.loader import DataloaderConfig, validation_batches
from engine.data.rows import RowSource, TokenRows
from engine.hf_weights import INDEX_NAME, has_weights
from engine.low_precision import float8_of
from engine.manifest import read_manifest
from engine.model import Architecture
from engine.objectives import Objective
from engine.objectives import SequenceSum as SumOfSequence
from engine.objectives._answers import answers_of
from engine.step import Reference, local_tokens, model_inputs
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.apply import parallelize
from parallelisms.collectives import SequenceSum, sum_over
from parallelisms.fsdp import PrecisionConfig, reshard
from parallelisms.materialise import fill, materialise
from parallelisms.mesh import ParallelDims

log = logging.getLogger("tessera")

LAYOUT = 1
FILE_NAME = "logps.npy"


class ReferenceModel:
    """Gives a microbatch what a frozen model makes of its answers.

    No parameter stays gathered between two calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, batch: Batch, sequence_sum: SumOfSequence) -> Batch:
        """Return this rank's part of a microbatch with `reference_logps_BP2`.

        Every rank must call this with its part of the same microbatches.
        """
        logps_BT = self._model(batch.tokens_BT, **model_inputs(batch))
        reshard(self._model)
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

    @property
    def start(self) -> str | None:
        """Folder that the run starts from; none where it has initial values."""
        section, assets = self.config.checkpoint, self.config.model.hf_assets_path
        if not section.enable:
            return None
        return section.initial_load_path or (assets if section.initial_load_in_hf else None)


@dataclass(frozen=True, slots=True)
class FoundReference:
    """A reference of which nothing is loaded yet."""

    source: Source | None
    """Where its weights are; None: they are the initial values of the run."""

    name: str
    """The same in words."""

    weights: str
    """Digest of its weights."""

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"name": self.name, "weights": self.weights}


def find_reference(policy: Policy, objective: Objective) -> FoundReference | None:
    """Return the reference of a run, None where its objective uses none.

    Every rank must call this; the first one reads the files.
    """
    if not objective.uses_reference:
        return None
    config, source = policy.config, reference_source(policy)
    seed, allowed = config.debug.effective_seed, config.checkpoint.initial_load_allow
    drawn: dict[str, object] = {}
    if source is None or allowed:
        drawn = {"seed": seed, "anew": allowed if source else []}
    root = cache_root(config.data.cache_folder)
    ranks = RankGroup()
    try:
        weights = ranks.on_first(lambda: weights_digest(source, drawn, root))
    finally:
        ranks.close()
    name = str(source.path.absolute()) if source else f"initial values, seed {seed}"
    log.info("reference model: %s, %s", name, config.objective.reference)
    return FoundReference(source, name, weights)


def refuse_other_reference(found: FoundReference | None, config: JobConfig, own: Source) -> None:
    """Raise ValueError where a step of this run was trained against another reference."""
    saved = saved_reference(own.path)
    if found is None or not saved or saved["weights"] == found.weights:
        return
    raise ValueError(
        f"objective.reference_path = {config.objective.reference_path!r}: {own.path} was trained "
        f"against {saved['name']} with weights {saved['weights'][:12]}, and this run would compare "
        f"with {found.name}, {found.weights[:12]}; give objective.reference_path the folder that "
        "it was trained against (initial values: the settings that it started with), or start anew "
        "in another job.dump_folder"
    )


def open_reference(
    policy: Policy, found: FoundReference | None, read: Sequence[RowSource]
) -> Reference | None:
    """Return what a step asks, or give all rows that are `read` the answers and return None.

    None too where there is no reference. Every rank must call this.
    """
    if found is None:
        return None
    config, architecture = policy.config, policy.architecture
    if config.objective.reference == "online":
        return ReferenceModel(build_reference(policy, found.source))
    facts = {
        "architecture": architecture.family.config_to_hf(architecture.config),
        "dtype": config.training.mixed_precision_param,
    }
    settings = Preparation(
        dims=policy.dims,
        device=policy.device,
        root=cache_root(config.data.cache_folder),
        reference=digest_of(LAYOUT, found.weights, _text(facts)),
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
    model = policy.architecture.build_meta()
    parallelize(
        model,
        policy.architecture.plan,
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
    )
    materialise(model, config.training.parameters_on(policy.device), computes_on=policy.device)
    seed = config.debug.effective_seed
    if source is None or config.checkpoint.initial_load_allow:
        fill(model, policy.architecture.initial_values(model, seed=seed))
    if source is not None:
        state = TrainingState(model=model, optimizer=None, counters={}, data_fingerprint="")
        policy.checkpointer.load(state, source)
    return model.eval()


def reference_source(policy: Policy) -> Source | None:
    """Return where the reference's weights are; None means the initial values of the run.

    That is `objective.reference_path`, or what the run itself starts from, also when it is resumed.
    Every rank must call this.
    """
    named, key = policy.config.objective.reference_path, "checkpoint.initial_load_path"
    folder, in_hf = policy.start, policy.config.checkpoint.initial_load_in_hf
    if named:
        folder, key = named, "objective.reference_path"
    if not folder:
        return None
    path, ranks = Path(folder).expanduser(), RankGroup()
    if named:
        in_hf = has_weights(path)
    try:
        return initial_source(path, ranks, in_hf=in_hf, only_model=True, key=key)
    finally:
        ranks.close()


def weights_digest(source: Source | None, drawn: Mapping[str, object], root: Path) -> str:
    """Return the digest of a reference's weights: of its files, and of what draws the others.

    A step's manifest has the digests of its files; those of a Hugging Face folder are read, large
    ones once for a cache folder `root`.
    """
    content: list[list[str]] = []
    if source is not None and source.kind == "hf":
        files = [*sorted(source.path.glob("*.safetensors")), source.path / INDEX_NAME]
        content = [[path.name, file_digest(path, root)] for path in files if path.is_file()]
    elif source is not None:
        files = read_manifest(source.path).files
        content = [[name, files[name].digest] for name in sorted(files)]
    return digest_of(LAYOUT, content, _text(drawn))


def _text(facts: Mapping[str, object]) -> str:
    return json.dumps(facts, sort_keys=True, default=str)


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
