"""Folders that are built once for all processes: complete or absent, whatever is killed when.

What is built, and what its key covers, is up to the callers.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("tessera")

MANIFEST = "complete.json"
MEMO_THRESHOLD_BYTES = 16 << 20
SETTLED_SECONDS = 2.0
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 10.0
REMIND_SECONDS = 15.0


def cache_root(folder: str) -> Path:
    """Return `folder`, or `tessera` in the user's cache folder if it is empty; create it."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(folder or f"{base}/tessera").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(root, error) from error
    return root


def digest_of(*parts: object) -> str:
    """Return a short stable digest of JSON-like values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path, root: Path | None = None) -> str:
    """Return the digest of a file's bytes.

    Given the cache folder `root`, a large file is read once: its digest is remembered for as long
    as size, inode and both time stamps stay as they were (a program cannot set the change time).
    """
    try:
        return _file_digest(path, root)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); mend its permissions or its path"
        ) from error


def build_once(folder: Path, what: str, build: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `build` in exactly one of all the processes that ask for it.

    `build` gets an empty temporary folder, which is synced and renamed when it returns. The other
    processes wait and say so; of a machine's ranks it is the first that builds, so that its output
    shows it. A folder whose files have lost their size is built again.
    """
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _leave_to_first_rank(folder, what)
        with locked(folder.with_name(folder.name + ".lock"), what):
            if not is_complete(folder):
                _build(folder, what, build)
    except OSError as error:
        raise _unusable(folder.parent, error) from error
    return folder


def _leave_to_first_rank(folder: Path, what: str) -> None:
    """Let the machine's first rank, if this is another, come first; the lock decides later on."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    log.info("the first rank of this machine is the one for %s", what)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_complete(folder) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path`; while another process holds it, wait and say for what."""
    with open(path, "a+b") as file:
        reminded = 0.0
        # Record locks, unlike flock, are not inherited by forked children, so a tokenising child
        # that outlives a killed parent cannot keep the lock.
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if time.monotonic() - reminded > REMIND_SECONDS:
                log.info("waiting while another process is %s", what)
                reminded = time.monotonic()
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)


def _build(folder: Path, what: str, build: Callable[[Path], None]) -> None:
    if folder.exists():
        log.warning("%s is damaged and is built again (%s)", folder, what)
        shutil.rmtree(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        build(temporary)
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps(sizes))
        for file in [*temporary.iterdir(), temporary]:
            _sync(file)
        os.rename(temporary, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_complete(folder: Path) -> bool:
    """Say whether `build_once` has filled a folder, and its files have their size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _file_digest(path: Path, root: Path | None) -> str:
    before = os.stat(path)
    if root is None or before.st_size < MEMO_THRESHOLD_BYTES:
        return _read_digest(path)
    identity = [before.st_size, before.st_ino, before.st_mtime_ns, before.st_ctime_ns]
    memo = root / "digests" / f"{digest_of(str(path.resolve()))}.json"
    memo.parent.mkdir(parents=True, exist_ok=True)
    with locked(memo.with_suffix(".lock"), f"reading {path}"):
        if memo.exists():
            known = json.loads(memo.read_text())
            if known["identity"] == identity:
                return known["digest"]
        digest = _read_digest(path)
        # Time stamps are coarse: a file written a moment ago can change again under the same one.
        if time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_SECONDS:
            _write_atomically(memo, {"identity": identity, "digest": digest})
    return digest


def _read_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _write_atomically(path: Path, values: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"data.cache_folder: {folder} cannot be written ({error.strerror or error}); free space "
        "there or set data.cache_folder to a writable folder with locks, such as a local disk"
    )
