"""What makes a checkpoint folder trustworthy: digests of every file, commit, verification.

Protocol: everything is written into a fresh `step-N.tmp`; `manifest.json` names each file with its
size and digest; the folder is synced, renamed to `step-N`, and a marker that holds the manifest's
own digest is written last. A folder without a marker is unfinished, one whose files disagree with
the manifest is damaged; both are renamed aside and never read. What the files mean is decided in
`checkpoint_state.py`, when they are written in `checkpoint.py`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

MANIFEST_NAME = "manifest.json"
MARKER_NAME = ".complete"
DIGEST_BYTES = 32
_CHUNK_BYTES = 8 * 2**20
_STEP_NAME = re.compile(r"step-(\d+)")

Contents = Literal["full", "model"]
FaultHook = Callable[[str, Path], None]
"""Called at the named points of a save with the path concerned; tests inject faults through it."""


class CheckpointError(RuntimeError):
    """A save or load that failed for a reason outside the configuration."""


class DamagedCheckpoint(Exception):
    """A checkpoint folder that must not be read; the message says why."""


class UnfinishedCheckpoint(DamagedCheckpoint):
    """A checkpoint folder whose save never came to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    bytes: int
    """Size."""

    digest: str
    """BLAKE2b of the content, 32 bytes, in hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a complete checkpoint folder holds."""

    step: int
    """Optimizer steps finished."""

    contents: Contents
    """`full` can be resumed from; `model` is the parameters alone."""

    world_size: int
    """Number of ranks that wrote it."""

    files: Mapping[str, FileRecord]
    """Every file but the manifest and the marker, by path inside the folder."""


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies once it is complete."""
    return folder / f"step-{step}"


def steps_in(folder: Path) -> list[int]:
    """List the steps that have a folder under their final name, oldest first."""
    if not folder.is_dir():
        return []
    found = (_STEP_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def leftovers_in(folder: Path) -> list[Path]:
    """List the folders of saves (or deletions) that were interrupted."""
    return sorted(folder.glob("step-*.tmp")) if folder.is_dir() else []


def digest_bytes(content: bytes) -> str:
    """Return the digest of some bytes as the manifest writes it."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


def digest_file(path: Path) -> FileRecord:
    """Read a file once and return its size and digest."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(bytes=size, digest=digest.hexdigest())


def write_synced(path: Path, content: bytes) -> FileRecord:
    """Write a small file, force it to the disk and return its record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(bytes=len(content), digest=digest_bytes(content))


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_fault(point: str, path: Path) -> None:
    """The hook of a save that nothing disturbs."""


def commit(temporary: Path, final: Path, manifest: Manifest, hook: FaultHook = no_fault) -> None:
    """Turn a fully written temporary folder into the checkpoint `final`, which must not exist."""
    content = json.dumps(asdict(manifest), indent=1, sort_keys=True).encode()
    record = write_synced(temporary / MANIFEST_NAME, content)
    for entry in [*temporary.rglob("*"), temporary]:
        if entry.is_dir():
            sync_folder(entry)
    hook("manifest", temporary)
    temporary.rename(final)
    sync_folder(final.parent)
    hook("renamed", final)
    write_synced(final / MARKER_NAME, record.digest.encode())
    sync_folder(final)
    hook("committed", final)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a complete folder; DamagedCheckpoint says what is wrong with it.

    Checks the marker, the manifest's digest, and presence and size of every file; reads no data.
    """
    try:
        marker = (folder / MARKER_NAME).read_text()
    except FileNotFoundError:
        raise UnfinishedCheckpoint("its save was interrupted (no completion marker)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{MARKER_NAME} cannot be read ({error})") from error
    try:
        content = (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{MANIFEST_NAME} cannot be read ({error})") from error
    if digest_bytes(content) != marker:
        raise DamagedCheckpoint(f"{MANIFEST_NAME} does not match the completion marker")
    fields = json.loads(content)
    files = {name: FileRecord(**record) for name, record in fields.pop("files").items()}
    manifest = Manifest(files=files, **fields)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"file {name} is missing")
        if (size := path.stat().st_size) != record.bytes:
            raise DamagedCheckpoint(f"file {name} has {size} bytes instead of {record.bytes}")
    return manifest


def changed_files(
    folder: Path, manifest: Manifest, names: Iterable[str], *, threads: int = 4
) -> list[str]:
    """Read the named files and describe each whose content is not what was written."""

    def problem(name: str) -> str | None:
        try:
            record = digest_file(folder / name)
        except OSError as error:
            return f"file {name} cannot be read ({error})"
        return None if record == manifest.files[name] else f"the content of file {name} has changed"

    with ThreadPoolExecutor(threads) as pool:
        return [text for text in pool.map(problem, names) if text]


def set_aside(path: Path, reason: str) -> Path:
    """Rename a checkpoint folder out of the way, to `<name>.<reason>`, and return its new path."""
    target = path.with_name(f"{path.name}.{reason}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{reason}-{number}")
    path.rename(target)
    return target


def delete_step(path: Path) -> None:
    """Delete a checkpoint so that an interruption cannot leave it half there under its name."""
    doomed = path.with_name(f"{path.name}.tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def refuse_small_disk(folder: Path, needed_bytes: int, doing: str) -> None:
    """Raise a CheckpointError if the disk of an existing folder has no room for a save."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"cannot {doing}: it needs {needed_bytes / 2**30:.3f} GiB and the disk of {folder} has "
            f"{free_bytes / 2**30:.3f} GiB free; free some space, lower "
            f"checkpoint.keep_latest_k, or give another job.dump_folder. What was saved before is "
            f"untouched"
        )
