"""`JobConfig`: the sections of a configuration, nested; `check` for what spans sections.

Each section's dataclass lives in the file that consumes it. This file adds only the two sections
that the whole run reads.
"""

from dataclasses import dataclass, field
from typing import Literal

from engine.adapters import AdapterConfig
from engine.checkpoint import CheckpointConfig
from engine.combinations import refusals
from engine.data.config import DataConfig
from engine.distributed import CommConfig, DebugConfig
from engine.evaluate import ValidationConfig
from engine.metrics import MetricsConfig
from engine.model import ModelConfig
from engine.objectives import ObjectiveConfig
from engine.optim import OptimizerConfig
from engine.profiling import ProfilingConfig
from engine.rules import gather_facts
from engine.schedule import LRSchedulerConfig
from engine.schema import raise_mistakes
from engine.step import TrainingConfig
from engine.titan import FaultToleranceConfig, MemoryEstimationConfig, QuantizeConfig
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.compile import CompileConfig
from parallelisms.mesh import ParallelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSection:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file to read; options on the command line win over it."""

    dump_folder: str = "./outputs"
    """Run folder: everything that the run writes lies under it."""

    description: str = "default job"
    """A sentence for the log."""

    print_config: bool = False
    """Print the resolved configuration at the start."""

    save_config_file: str | None = None
    """Also save the resolved configuration here, relative to the run folder (.toml or .json);
    <dump_folder>/config.toml is written in any case."""

    custom_config_module: str = ""
    """Module whose class JobConfig, derived from engine.config.JobConfig, adds sections."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is a GPU for each rank, else the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentalSection:
    """Ways to extend the engine from a package of one's own."""

    custom_import: str = ""
    """Module to import before anything is built; it registers families, objectives or formats."""

    custom_args_module: str = ""
    """Older name of job.custom_config_module; refused."""

    def __post_init__(self) -> None:
        if self.custom_args_module:
            raise ValueError(
                f"experimental.custom_args_module = {self.custom_args_module!r} is the older name; "
                f"write job.custom_config_module = {self.custom_args_module!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """Every key, by section. The command line wins over the TOML file, and that over defaults."""

    job: JobSection = field(default_factory=JobSection)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallelism: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(
        default_factory=ActivationCheckpointConfig
    )
    compile: CompileConfig = field(default_factory=CompileConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    memory_estimation: MemoryEstimationConfig = field(default_factory=MemoryEstimationConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    experimental: ExperimentalSection = field(default_factory=ExperimentalSection)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def check(config: JobConfig, world_size: int) -> None:
    """Raise one ValueError with every combination that is refused for this number of ranks.

    Call it before joining a process group: every rank comes to the same answer alone.
    """
    facts, problems = gather_facts(config, world_size)
    raise_mistakes(problems + refusals(facts))
