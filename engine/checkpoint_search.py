"""Which checkpoint to read: the newest one whose every byte is right, or why there is none.

Every function here is called by all ranks together: rank 0 looks at the folder, the files to be
read are dealt over the ranks, and all of them see the same answer.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.checkpoint_storage import RankGroup
from engine.manifest import (
    MANIFEST_NAME,
    DamagedCheckpoint,
    Manifest,
    UnfinishedCheckpoint,
    changed_files,
    leftovers_in,
    read_manifest,
    set_aside,
    step_folder,
    steps_in,
)

log = logging.getLogger("tessera")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a run starts from."""

    kind: Literal["resume", "initial", "hf"]
    """A step of this run, a checkpoint of another one, or a Hugging Face folder."""

    path: Path
    """The verified step folder, or the Hugging Face folder."""

    step: int
    """Steps that its counters have seen; 0 for a Hugging Face folder."""

    only_model: bool
    """The parameters are all that is taken from it."""


def own_step(
    folder: Path, ranks: RankGroup, *, load_step: int, only_model: bool, tidy: bool
) -> Source | None:
    """Return the step of this run to go on from: `load_step`, or the newest good one for -1."""
    if load_step >= 0:
        found = _wanted_step(folder, load_step, ranks, model_suffices=only_model)
    else:
        found = newest_step(folder, ranks, model_suffices=only_model, tidy=tidy)
    if found is None:
        return None
    return Source(kind="resume", path=found[0], step=found[1].step, only_model=only_model)


def initial_source(
    path: Path,
    ranks: RankGroup,
    *,
    in_hf: bool,
    only_model: bool,
    key: str = "checkpoint.initial_load_path",
) -> Source:
    """Return what the setting `key` names; a ValueError where it cannot be used."""
    if not path.is_dir():
        raise ValueError(
            f"{key} = {str(path)!r} is not a folder; give a checkpoint step, a folder of steps, or "
            "a Hugging Face folder"
        )
    if in_hf:
        return Source(kind="hf", path=path, step=0, only_model=True)
    found, manifest = initial_step(path, ranks, model_suffices=only_model, key=key)
    return Source(kind="initial", path=found, step=manifest.step, only_model=only_model)


def verify(path: Path, ranks: RankGroup) -> Manifest:
    """Read every file of a step folder and return its manifest, or raise DamagedCheckpoint."""

    def opened() -> Manifest | DamagedCheckpoint:
        try:
            return read_manifest(path)
        except DamagedCheckpoint as error:
            return error

    manifest = ranks.on_first(opened)
    if isinstance(manifest, DamagedCheckpoint):
        raise manifest
    mine = sorted(manifest.files)[ranks.rank :: ranks.world_size]
    found = ranks.gather(changed_files(path, manifest, mine))
    if changed := [text for part in found for text in part]:
        raise DamagedCheckpoint("; ".join(changed))
    return manifest


def newest_step(
    folder: Path, ranks: RankGroup, *, model_suffices: bool, tidy: bool
) -> tuple[Path, Manifest] | None:
    """Return the newest good step, None where nothing was ever completed.

    Bad steps are named in the log and, with `tidy`, renamed aside. Where steps were completed but
    none can be used, that is a ValueError: starting anew in silence would lose a run.
    """
    unusable: list[str] = []
    for step in reversed(ranks.on_first(lambda: _list(folder))):
        path = step_folder(folder, step)
        try:
            manifest = verify(path, ranks)
        except DamagedCheckpoint as error:
            ranks.on_first(lambda path=path, error=error: _report(path, error, tidy=tidy))
            if not isinstance(error, UnfinishedCheckpoint):
                unusable.append(f"{path.name} is damaged: {error}")
            continue
        if manifest.contents == "full" or model_suffices:
            for reason in unusable:
                log.warning("going on from %s: %s", path.name, reason)
            return path, manifest
        unusable.append(f"{path.name} holds the model alone (checkpoint.last_save_model_only)")
    unusable += ranks.on_first(lambda: [path.name for path in sorted(folder.glob("*.damaged*"))])
    if unusable:
        raise ValueError(
            f"{folder} holds no checkpoint that a run can go on from: {'; '.join(unusable)}. To "
            f"train on from a model alone, set checkpoint.initial_load_path to its folder and "
            f"give another job.dump_folder; to start anew, remove these"
        )
    return None


def _wanted_step(
    folder: Path, step: int, ranks: RankGroup, *, model_suffices: bool
) -> tuple[Path, Manifest] | None:
    """Return the step asked for; None where there are no steps at all."""
    steps = ranks.on_first(lambda: steps_in(folder))
    if not steps:
        return None
    if step not in steps:
        raise ValueError(
            f"checkpoint.load_step = {step} is not among the steps {steps} of {folder}; give one "
            f"of them, or -1 for the newest"
        )
    path = step_folder(folder, step)
    return path, verify_or_refuse(path, ranks, model_suffices=model_suffices)


def verify_or_refuse(path: Path, ranks: RankGroup, *, model_suffices: bool) -> Manifest:
    """Return the manifest of a folder the user named; anything wrong with it is a ValueError."""
    try:
        manifest = verify(path, ranks)
    except DamagedCheckpoint as error:
        raise ValueError(f"{path} is not a usable checkpoint: {error}") from error
    if manifest.contents == "model" and not model_suffices:
        raise ValueError(
            f"{path} holds the model alone (checkpoint.last_save_model_only), so no run can be "
            f"resumed from it; name it in checkpoint.initial_load_path of a new run instead, with "
            f"checkpoint.initial_load_model_only = true"
        )
    return manifest


def initial_step(
    path: Path,
    ranks: RankGroup,
    *,
    model_suffices: bool,
    key: str = "checkpoint.initial_load_path",
) -> tuple[Path, Manifest]:
    """Return the step at `path`, which is a step folder or a folder of steps; `key` names it."""
    is_step = ranks.on_first(lambda: not steps_in(path) and (path / MANIFEST_NAME).is_file())
    if is_step:
        return path, verify_or_refuse(path, ranks, model_suffices=model_suffices)
    found = newest_step(path, ranks, model_suffices=model_suffices, tidy=False)
    if found is None:
        raise ValueError(f"{key} = {str(path)!r} holds no complete step")
    return found


def _list(folder: Path) -> list[int]:
    for leftover in leftovers_in(folder):
        log.warning("%s is half-written (its save was interrupted): not used", leftover)
    return steps_in(folder)


def _report(path: Path, error: DamagedCheckpoint, *, tidy: bool) -> None:
    if not tidy:
        log.error("checkpoint %s is not used: %s", path, error)
        return
    reason = "unfinished" if isinstance(error, UnfinishedCheckpoint) else "damaged"
    moved = set_aside(path, reason)
    log.error("checkpoint %s is not used: %s; set aside as %s", path, error, moved.name)
