"""When and where checkpoints are saved, which one a run starts from, and how many are kept.

What is in one is `checkpoint_state.py`, how tensors reach files `checkpoint_storage.py`, and what
makes a folder trustworthy `manifest.py`. Several nodes must see the same folder.
"""

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.checkpoint_search import Source, initial_source, own_step, verify
from engine.checkpoint_state import (
    COUNTERS_NAME,
    PARTS,
    Part,
    TrainingState,
    collect,
    collect_model,
    count_bytes,
    encode_counters,
    restore,
)
from engine.checkpoint_storage import HostCopies, RankGroup, write_tensors
from engine.hf_io import HfAssets
from engine.hf_weights import load_together
from engine.manifest import (
    CheckpointError,
    Contents,
    DamagedCheckpoint,
    FaultHook,
    FileRecord,
    Manifest,
    commit,
    delete_step,
    leftovers_in,
    no_fault,
    refuse_small_disk,
    set_aside,
    step_folder,
    steps_in,
    write_synced,
)
from engine.peft_export import export_trained, is_exported

_SPARE_BYTES = 64 * 2**20
_MODEL_PARTS: frozenset[Part] = frozenset({"model"})
_EXCLUDABLE = frozenset(PARTS) - _MODEL_PARTS

log = logging.getLogger("tessera")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saving and loading of training state."""

    enable: bool = False
    """Save checkpoints and start from one; off, nothing here has an effect."""

    enable_ft_dataloader_checkpoints: bool = True
    """Belongs to torchft, which is not used here: accepted and ignored."""

    folder: str = "checkpoint"
    """Where the steps are kept, inside job.dump_folder."""

    interval: int = 500
    """Optimizer steps between two saves."""

    initial_load_path: str | None = None
    """Step folder, or folder of them, to start from where the run folder holds no checkpoint."""

    initial_load_model_only: bool = True
    """Take only the parameters from initial_load_path, and start at step 0."""

    initial_load_in_hf: bool = False
    """initial_load_path, or model.hf_assets_path without one, is a Hugging Face folder whose
    safetensors files hold the weights."""

    initial_load_allow: list[str] = field(default_factory=list[str])
    """Patterns of names that a Hugging Face folder may lack (they start anew) or have too many."""

    initial_load_in_hf_quantized: bool = False
    """Dequantise while reading a Hugging Face folder; refused, not there."""

    last_save_model_only: bool = True
    """The save after the last step holds the parameters alone; a run cannot be resumed from it."""

    last_save_in_hf: bool = False
    """After the last step, also write a complete Hugging Face folder `hf` in the run folder, or one
    that PEFT loads where adapters are trained and not merged (adapter.merge_export)."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Number format of the last model-only save and of the Hugging Face folder."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write in the background from a copy in host memory; pinned memory makes the copy faster."""

    keep_latest_k: int = 10
    """Number of newest steps kept; 0 keeps all. The newest readable one is never deleted."""

    load_step: int = -1
    """Step to resume from, -1 for the newest good one; the next save sets later ones aside."""

    exclude_from_loading: list[str] = field(default_factory=list[str])
    """Parts left as they are when resuming: optimizer, dataloader, train_state, rng."""

    enable_first_step_checkpoint: bool = False
    """Save after step 1 too, to see early that saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial state as step 0 and leave."""

    load_only: bool = False
    """Load but never save, nor set a damaged step aside."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"checkpoint.interval = {self.interval}; give 1 or more steps")
        if self.keep_latest_k < 0:
            raise ValueError(
                f"checkpoint.keep_latest_k = {self.keep_latest_k}; give 0 (keep all) or more"
            )
        if self.load_step < -1:
            raise ValueError(f"checkpoint.load_step = {self.load_step}; give -1 (newest) or a step")
        if unknown := sorted(set(self.exclude_from_loading) - _EXCLUDABLE):
            raise ValueError(
                f"checkpoint.exclude_from_loading = {self.exclude_from_loading} names {unknown}; "
                f"choose among {sorted(_EXCLUDABLE)} (the learning rate is a function of the step: "
                f"leave train_state out to start it anew)"
            )
        if self.enable and self.initial_load_in_hf_quantized:
            raise ValueError(
                "checkpoint.initial_load_in_hf_quantized = true is not there; give a folder whose "
                "weights are not quantised and set it to false"
            )
        if self.enable and self.initial_load_in_hf and not self.initial_load_model_only:
            raise ValueError(
                "checkpoint.initial_load_model_only = false with initial_load_in_hf: a Hugging "
                "Face folder holds the model alone; set it to true"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The number format of exports."""
        return getattr(torch, self.export_dtype)


class Checkpointer:
    """Saves and loads one run's checkpoints. Every rank constructs it and makes the same calls.

    `files` are put beside the tensors of every checkpoint, by path inside the folder
    (`provenance.checkpoint_files` makes them), so that a step folder can be converted on its own.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        *,
        files: Mapping[str, bytes],
        hf: HfAssets | None = None,
        hf_folder: Path | None = None,
        hook: FaultHook = no_fault,
    ) -> None:
        self._config, self._folder = config, folder
        self._files, self._hf, self._hook = files, hf, hook
        self._hf_folder = hf_folder or folder.parent / "hf"
        self._ranks = RankGroup()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved: tuple[int, Contents] | None = None
        self._copies = HostCopies(pinned=config.async_mode == "async_with_pinned_mem")

    # ---- saving -------------------------------------------------------------------------------

    def should_save(self, step: int, last: bool = False) -> bool:
        """Whether the configuration asks for a save after `step` steps."""
        config = self._config
        is_first = step == 1 and config.enable_first_step_checkpoint
        is_due = last or is_first or step % config.interval == 0
        return is_due and config.enable and not config.load_only

    def reserve(self, state: TrainingState) -> None:
        """Pin the memory of saves in the background, which takes seconds, before one is due."""
        if self._config.enable and not self._config.load_only and self._copies.pinned:
            self._copies.reserve(collect(state, self._ranks.rank))

    def save(self, step: int, state: TrainingState, *, last: bool = False) -> None:
        """Save now, unless saving is off; `last` applies the `last_save_*` settings.

        Raises CheckpointError, on every rank, when this save or an earlier one in the background
        failed. Then nothing that was saved before has been touched. `last` returns when the
        folder is complete, also in the background modes.
        """
        if not self._config.enable or self._config.load_only:
            return
        self.wait()
        model_only = last and self._config.last_save_model_only
        contents: Contents = "model" if model_only else "full"
        if self._saved != (step, contents):
            if model_only:
                tensors = collect_model(state.model, self._config.dtype)
            else:
                tensors = collect(state, self._ranks.rank)
            needed = count_bytes(tensors) + _SPARE_BYTES
            files = {**self._files, COUNTERS_NAME: encode_counters(state)}
            temporary = self._ranks.on_first(lambda: self._open(step, needed))
            if self._config.async_mode == "disabled":
                self._write(step, contents, temporary, tensors, files)
            else:
                staged = self._copies.take(tensors)
                self._pending = self._threads.submit(
                    self._write, step, contents, temporary, staged, files
                )
        if last:
            self.wait()
            if self._config.last_save_in_hf:
                self._export(state)

    def wait(self) -> None:
        """Return when no save is under way; raise what a background save failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the save under way and release threads, memory and the process group."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()
            self._copies.close()
            self._ranks.close()

    def make_up_export(self, state: TrainingState) -> None:
        """Export now if the last save should have, and was cut off or made the other kind."""
        config, hf = self._config, self._hf
        if not (config.enable and config.last_save_in_hf) or config.load_only:
            return
        adapters = hf is not None and hf.only_adapters
        if not self._ranks.on_first(lambda: is_exported(self._hf_folder, only_adapters=adapters)):
            self._export(state)

    def _export(self, state: TrainingState) -> None:
        assert self._hf is not None, "last_save_in_hf comes with the model's Hugging Face assets"
        dtype, target = self._config.dtype, self._hf_folder
        try:
            export_trained(state.model, target, self._hf, dtype=dtype, ranks=self._ranks)
        except OSError as error:
            raise CheckpointError(
                f"exporting to {target} failed: {error}. The checkpoints are untouched; "
                f"scripts/convert_dcp_to_hf.py makes the export from the last one"
            ) from error
        if self._ranks.rank == 0:
            log.info("exported a Hugging Face folder to %s", target)

    def _open(self, step: int, needed_bytes: int) -> Path:
        """On rank 0: make room for `step` and return a fresh temporary folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in leftovers_in(self._folder):
            log.warning("removing %s, left by an interrupted save", leftover)
            shutil.rmtree(leftover)
        refuse_small_disk(self._folder, needed_bytes, f"save step {step} to {self._folder}")
        for later in steps_in(self._folder):
            if later >= step:
                moved = set_aside(step_folder(self._folder, later), "superseded")
                log.warning("step %d lies ahead of this run: set aside as %s", later, moved)
        temporary = step_folder(self._folder, step).with_suffix(".tmp")
        temporary.mkdir()
        return temporary

    def _write(
        self,
        step: int,
        contents: Contents,
        temporary: Path,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
    ) -> None:
        """Write, commit and retire old steps; runs in the background thread in async modes."""
        try:
            records = write_tensors(tensors, temporary, self._ranks, self._hook)
            final = self._ranks.on_first(
                lambda: self._commit(step, contents, temporary, records, files)
            )
        except Exception as error:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                log.error("saving step %d failed: %s", step, error)
            raise CheckpointError(
                f"saving step {step} to {self._folder} failed: {error}. Earlier checkpoints are "
                f"untouched"
            ) from error
        self._saved = (step, contents)
        if self._ranks.rank == 0:
            log.info("saved step %d (%s) to %s", step, contents, final)
        self._retire(final)

    def _commit(
        self,
        step: int,
        contents: Contents,
        temporary: Path,
        records: dict[str, FileRecord],
        files: Mapping[str, bytes],
    ) -> Path:
        for name, record in records.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != record.bytes:
                raise OSError(f"{path} of another rank is not here: do all nodes see this folder?")
        for name, content in files.items():
            self._hook("write", temporary / name)
            records[name] = write_synced(temporary / name, content)
        manifest = Manifest(
            step=step, contents=contents, world_size=self._ranks.world_size, files=records
        )
        final = step_folder(self._folder, step)
        commit(temporary, final, manifest, self._hook)
        return final

    def _retire(self, newest: Path) -> None:
        """Delete all but the newest steps, once the newest one was read back and is right."""
        keep = self._config.keep_latest_k
        doomed = self._ranks.on_first(lambda: steps_in(self._folder)[:-keep] if keep else [])
        if not doomed:
            return
        try:
            verify(newest, self._ranks)
        except DamagedCheckpoint as error:
            raise CheckpointError(
                f"{newest} was written but reads back wrong: {error}. No earlier checkpoint was "
                f"deleted; look at the disk"
            ) from error

        def delete() -> None:
            for step in doomed:
                try:
                    delete_step(step_folder(self._folder, step))
                except OSError as error:
                    log.warning("step %d could not be deleted: %s", step, error)

        self._ranks.on_first(delete)

    # ---- loading ------------------------------------------------------------------------------

    def find(self, *, only_model: bool = False) -> Source | None:
        """Return what `load` will load: a step of this run, else the initial path, else None.

        Damaged and unfinished steps are named in the log and renamed aside on the way.
        `only_model` is for evaluation: the newest parameters will do, and nothing is renamed,
        since the folder may be that of a run which is going on.
        """
        if not self._config.enable:
            return None
        self.wait()
        own = own_step(
            self._folder,
            self._ranks,
            load_step=self._config.load_step,
            only_model=only_model,
            tidy=not (only_model or self._config.load_only),
        )
        if own is not None or self._config.initial_load_path is None:
            return own
        return initial_source(
            Path(self._config.initial_load_path).expanduser(),
            self._ranks,
            in_hf=self._config.initial_load_in_hf,
            only_model=only_model or self._config.initial_load_model_only,
        )

    def load(self, state: TrainingState, source: Source | None = None) -> int | None:
        """Load `source`, or what `find` finds, in place; return the step to go on from.

        None means that there was nothing to load and `state` is as it was. Sources of the model
        alone give step 0 and leave optimizer, counters and generators be.
        """
        source = source or self.find()
        if source is None:
            return None
        if self._ranks.rank == 0:
            log.info("loading %s (%s)", source.path, source.kind)
        if source.kind == "hf":
            assert self._hf is not None, "loading from Hugging Face comes with its key map"
            key_map, allowed = self._hf.key_map, self._config.initial_load_allow
            load_together(state.model, source.path, key_map, self._ranks, allowed=allowed)
            return 0
        excluded = set(self._config.exclude_from_loading)
        parts = _MODEL_PARTS if source.only_model else frozenset(PARTS) - excluded
        if state.optimizer is None:
            parts -= {"optimizer"}
        beside = {"widen": source.only_model, "only_base": source.kind == "initial"}
        restore(state, source.path, self._ranks, parts=parts, **beside)
        return source.step if "train_state" in parts else 0
