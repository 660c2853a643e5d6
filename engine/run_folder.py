"""Where a run's files lie, its resolved configuration, and whether a folder may be used again.

Layout under `job.dump_folder`: `config.toml`, `metrics.jsonl`, `tb/`, `checkpoint/step-N/`, `hf/`,
`profile/`, `logs/`. What is in them is written by others.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli
import tomli_w

from engine.manifest import DamagedCheckpoint, read_manifest, step_folder, steps_in
from engine.schema import flatten, from_toml, leaves, nested
from engine.tables import spread
from parallelisms.mesh import ParallelDims

if TYPE_CHECKING:
    from engine.config import JobConfig

CONFIG_NAME = "config.toml"

DECIDES_THE_WEIGHTS = frozenset(
    {
        "model.name",
        "model.flavor",
        "model.hf_assets_path",
        "model.tokenizer_path",
        "model.freeze",
        "adapter.kind",
        "adapter.name",
        "adapter.rank",
        "adapter.alpha",
        "adapter.use_rslora",
        "adapter.targets",
        "adapter.more",
        "training.dtype",
    }
)
"""Keys that a checkpoint's tensors depend on."""

DECIDES_THE_ROWS = frozenset(
    {
        "debug.seed",
        "training.dataset",
        "training.dataset_path",
        "training.seq_len",
        "training.global_batch_size",
        "data.sources",
        "data.format",
        "data.text_field",
        "data.bos",
        "data.eos",
        "data.packing",
        "data.stride",
        "data.last_row",
        "data.long_document",
        "data.streaming",
        "data.shuffle_buffer_size",
        "data.batch_tokens",
        "data.pad_to_multiple",
        "data.largest_batch_first",
        "data.on_bad_record",
        "data.dummy_tokens",
    }
)
"""Keys that the meaning of a checkpoint's position in the data depends on."""

PATHS = frozenset({"model.hf_assets_path", "model.tokenizer_path", "training.dataset_path"})
"""Of these, the keys that name a place, where the same may lie under another name."""

SAYS_NOTHING_OF_THE_RUN = frozenset(
    {
        "job.config_file",
        "job.custom_config_module",
        "job.dump_folder",
        "job.print_config",
        "job.save_config_file",
    }
)
"""Keys whose change is not worth a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One key that a run folder's configuration and a new one disagree on."""

    key: str
    old: Any
    new: Any

    def forbids_resuming(self, *, only_model: bool) -> bool:
        """Whether a checkpoint of the old configuration, or its model, means nothing to the new."""
        decides_rows = self.key in DECIDES_THE_ROWS or self.key.startswith("data.sources.")
        decides_weights = self.key in DECIDES_THE_WEIGHTS or self.key.startswith("adapter.more.")
        return decides_weights or (decides_rows and not only_model)

    def __str__(self) -> str:
        """Return `key: old -> new`."""
        return f"{self.key}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path
    checkpoints: Path
    """Holds one folder `step-N` for each checkpoint."""

    @classmethod
    def of(cls, config: "JobConfig") -> "RunFolder":
        """Return the folder that a configuration writes to; nothing is created."""
        path = Path(config.job.dump_folder)
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"job.dump_folder = {config.job.dump_folder!r} is a file; give a folder, which is "
                "made where there is none"
            )
        return cls(path, path / config.checkpoint.folder)

    @property
    def config(self) -> Path:
        """The resolved configuration, which starts the same run again."""
        return self.path / CONFIG_NAME

    @property
    def hf(self) -> Path:
        """The final export."""
        return self.path / "hf"

    @property
    def profile(self) -> Path:
        """Traces and memory snapshots."""
        return self.path / "profile"

    @property
    def logs(self) -> Path:
        """Standard output and error of each rank."""
        return self.path / "logs"

    def holds_checkpoints(self) -> bool:
        """Say whether any step was saved here."""
        if not self.checkpoints.is_dir():
            return False
        return any(re.fullmatch(r"step-\d+", entry.name) for entry in self.checkpoints.iterdir())

    def finished_step(self, config: "JobConfig") -> int | None:
        """Return the newest step if it ends the run that `config` asks for and cannot go on.

        That is a step of the model alone, which a run would pass over to train its end again.
        """
        settings = config.checkpoint
        steps = steps_in(self.checkpoints) if self.checkpoints.is_dir() else []
        wants_more = settings.load_step != -1 or config.validation.only
        if not settings.enable or not steps or steps[-1] < config.training.steps or wants_more:
            return None
        try:
            manifest = read_manifest(step_folder(self.checkpoints, steps[-1]))
        except DamagedCheckpoint:
            return None
        return steps[-1] if manifest.contents == "model" else None

    def check_reuse(self, config: "JobConfig", world_size: int) -> list[Difference]:
        """Return how the configuration in this folder differs from `config`; empty if it is new.

        Raises ValueError where a checkpoint is here, `config` would resume from it and a
        difference forbids that. Reads only: every rank may call it, before `write_config`.
        """
        if not self.config.is_file():
            return []
        schema = leaves(type(config))
        old, new = _read(self.config, config), resolved(config, world_size)
        differences = compare(spread(old, new, schema), spread(new, old, schema))
        only_validates = config.validation.only
        fatal = [d for d in differences if d.forbids_resuming(only_model=only_validates)]
        if fatal and self.holds_checkpoints():
            has_paths = any(d.key in PATHS for d in fatal)
            moved = ", or write there where the same has moved to" if has_paths else ""
            raise ValueError(
                f"job.dump_folder = {config.job.dump_folder!r} holds checkpoints of another "
                f"configuration, which this one cannot resume from: {'; '.join(map(str, fatal))}; "
                f"set these back (they are in {self.config}){moved}, or give another "
                "job.dump_folder"
            )
        return differences

    def write_config(self, config: "JobConfig", world_size: int) -> None:
        """Write the resolved configuration; one rank calls it, when all are past `check_reuse`."""
        values = resolved(config, world_size)
        text = tomli_w.dumps(nested(values))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.config, text)
            if extra := config.job.save_config_file:
                copy = self.path / extra
                copy.parent.mkdir(parents=True, exist_ok=True)
                is_json = copy.suffix == ".json"
                _replace(copy, json.dumps(nested(values), indent=1) if is_json else text)
        except OSError as error:
            raise unwritable(config, error) from error


def unwritable(config: "JobConfig", error: OSError) -> ValueError:
    """Return the mistake of a run folder that this process may not write to."""
    return ValueError(
        f"job.dump_folder = {config.job.dump_folder!r} cannot be written to "
        f"({error.strerror}); give a folder that can"
    )


def resolved(config: "JobConfig", world_size: int) -> dict[str, Any]:
    """Return `{key: value}` with the global batch as a number, so that other ranks repeat it.

    Degrees stay as they are: -1 fits any number of ranks.
    """
    flat = flatten(config)
    del flat["job.config_file"]
    degree = ParallelDims.of(config.parallelism, world_size).batch_degree
    flat["training.global_batch_size"] = config.training.rows_per_step(degree)
    return flat


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return every key whose value differs, in the new configuration's order."""
    keys = [key for key in (*new, *old) if key not in SAYS_NOTHING_OF_THE_RUN]
    return [
        Difference(key=key, old=old.get(key), new=new.get(key))
        for key in dict.fromkeys(keys)
        if old.get(key) != new.get(key)
    ]


def _read(path: Path, config: "JobConfig") -> dict[str, Any]:
    """Return the values of a resolved configuration; keys that it lacks have their default."""
    try:
        tables = tomli.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); remove it, or give another job.dump_folder"
        ) from error
    schema = leaves(type(config))
    values = {key: leaf.default for key, leaf in schema.items() if key != "job.config_file"}
    for key, value in _flat(tables, ""):
        values[key] = from_toml(schema[key].hint, value) if key in schema else value
    return values


def _flat(table: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
