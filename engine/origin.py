"""Weights that a run starts from or compares with: where they lie, and what tells them apart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint_search import Source, initial_source
from engine.checkpoint_storage import RankGroup
from engine.data.cache import cache_root, digest_of, file_digest
from engine.hf_weights import INDEX_NAME
from engine.manifest import read_manifest
from engine.peft_io import WEIGHTS_NAME

if TYPE_CHECKING:
    from engine.config import JobConfig

LAYOUT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Weights of which nothing is loaded yet."""

    source: Source | None
    """Where they are; None: they are the initial values of the run."""

    seed: int
    """Draws the values that no file has."""

    is_partly_drawn: bool
    """Whether files may lack some of them, so that the seed counts too."""

    weights: str
    """Digest of all of them."""

    adapters: tuple[str, ...] = ()
    """Folders of adapters that belong to them."""

    @property
    def name(self) -> str:
        """The place in words."""
        adapters = "".join(f", with {folder}" for folder in self.adapters)
        if self.source is None:
            return f"initial values, seed {self.seed}{adapters}"
        return f"{self.source.path.absolute()}{adapters}"

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint keeps of it: enough to know the weights again, and to find them."""
        kind = "drawn" if self.source is None else self.source.kind
        found = {"kind": kind, "name": self.name, "weights": self.weights}
        return {**found, "seed": str(self.seed)} if self._is_drawn else found

    @property
    def _is_drawn(self) -> bool:
        return self.source is None or self.is_partly_drawn


def start_folder(config: "JobConfig") -> str | None:
    """Return the folder that a run starts from; none where it has initial values."""
    section, assets = config.checkpoint, config.model.hf_assets_path
    if not section.enable:
        return None
    return section.initial_load_path or (assets if section.initial_load_in_hf else None)


def start_source(config: "JobConfig") -> Source | None:
    """Return where the weights are that a run starts from, also when it is resumed.

    None means its initial values. Every rank must call this.
    """
    folder = start_folder(config)
    if not folder:
        return None
    in_hf, key = config.checkpoint.initial_load_in_hf, "checkpoint.initial_load_path"
    return source_of(Path(folder).expanduser(), in_hf=in_hf, key=key)


def source_of(path: Path, *, in_hf: bool, key: str) -> Source:
    """Return what the setting `key` names, of which the weights alone are wanted.

    Every rank must call this.
    """
    ranks = RankGroup()
    try:
        return initial_source(path, ranks, in_hf=in_hf, only_model=True, key=key)
    finally:
        ranks.close()


def find_origin(
    config: "JobConfig", source: Source | None, *, adapters: Sequence[str] = ()
) -> Origin:
    """Return what tells the weights of `source` apart; None stands for initial values.

    `adapters` are folders of adapters on top. Every rank must call this; the first one reads the
    files.
    """
    seed, allowed = config.debug.effective_seed, config.checkpoint.initial_load_allow
    drawn: dict[str, object] = {}
    if source is None or allowed:
        drawn = {"seed": seed, "anew": allowed if source else []}
    root = cache_root(config.data.cache_folder)
    ranks = RankGroup()
    try:
        weights = ranks.on_first(lambda: _digest(source, drawn, root, adapters))
    finally:
        ranks.close()
    return Origin(
        source=source,
        seed=seed,
        is_partly_drawn=bool(allowed),
        weights=weights,
        adapters=tuple(adapters),
    )


def _digest(
    source: Source | None, drawn: Mapping[str, object], root: Path, adapters: Sequence[str]
) -> str:
    weights = weights_digest(source, drawn, root)
    files = [Path(one).expanduser() / WEIGHTS_NAME for one in adapters]
    return digest_of(weights, [file_digest(file, root) for file in files]) if files else weights


def weights_digest(source: Source | None, drawn: Mapping[str, object], root: Path | None) -> str:
    """Return the digest of weights: of their files, and of what draws the others.

    A step's manifest has the digests of its files; those of a Hugging Face folder are read, large
    ones once for a cache folder `root` where there is one.
    """
    content: list[list[str]] = []
    if source is not None and source.kind == "hf":
        files = [*sorted(source.path.glob("*.safetensors")), source.path / INDEX_NAME]
        content = [[path.name, file_digest(path, root)] for path in files if path.is_file()]
    elif source is not None:
        files = read_manifest(source.path).files
        content = [[name, files[name].digest] for name in sorted(files)]
    return digest_of(LAYOUT, content, text_of(drawn))


def text_of(facts: Mapping[str, object]) -> str:
    """Return facts as a text of which a digest is taken."""
    return json.dumps(facts, sort_keys=True, default=str)
