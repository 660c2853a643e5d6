"""The built-in corpus: the Python sources of the running interpreter's own standard library."""

import hashlib
import os
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation"]

VALIDATION_SHARE = 16
# Installed packages are not the standard library. Tests are left out because many distributions
# ship without them, and a third of their bytes are tables of data rather than code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@cache
def stdlib_files(split: Split) -> tuple[Path, ...]:
    """Return the source files of one split, sorted by path; a hash of the path decides the split.

    About one file in `VALIDATION_SHARE` is held out for validation.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in names if name.endswith(".py")]
    chosen = [name for name in sorted(found) if _is_held_out(name) == (split == "validation")]
    if not chosen:
        raise ValueError(
            f"training.dataset = 'python_stdlib': {root} holds no Python sources for {split}; "
            "give text of your own with training.dataset = 'jsonl' and training.dataset_path"
        )
    return tuple(root / name for name in chosen)


def module_name(file: Path) -> str:
    """Return the dotted name of the module that a file of the standard library holds."""
    parts = file.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _is_held_out(relative_path: str) -> bool:
    digest = hashlib.blake2b(relative_path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VALIDATION_SHARE == 0
