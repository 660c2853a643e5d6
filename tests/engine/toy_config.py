"""A small config tree with every kind of field, for tests that need no section of the engine."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderToy:
    """Workers."""

    num_workers: int = 0
    """Worker processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobToy:
    """The run."""

    config_file: str | None = None
    """TOML file to read."""

    dump_folder: str = "./outputs"
    """Run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingToy:
    """The work."""

    steps: int = 10
    """Optimizer
    steps."""

    max_norm: float | int = 1.0
    """Largest gradient norm."""

    lr: float = 1e-3
    """Peak rate."""

    compile: bool = False
    """Compile."""

    decay: Literal["linear", "cosine"] = "linear"
    """Curve."""

    balancer: str | None = "headtail"
    """Balancer."""

    names: list[str] = field(default_factory=lambda: ["a"])
    """Names."""

    parts: list[list[str]] | None = None
    """Parts."""

    local_batch_size: int = 8
    """Rows."""

    dataloader: LoaderToy = field(default_factory=lambda: LoaderToy(num_workers=3))
    """Workers."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"training.steps = {self.steps}; give at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """A whole toy."""

    job: JobToy = field(default_factory=JobToy)
    training: TrainingToy = field(default_factory=TrainingToy)
