"""Keys of torchtitan 0.2 files that have no consumer here, so that such a file still loads.

A key of a feature that is switched off is accepted and kept in the resolved file. A value that
would take effect is refused by `RULES`, which join the table of `combinations.py`; an older
spelling is answered with today's one.
"""

from dataclasses import dataclass, field
from typing import Literal

from engine.low_precision import Float8LinearConfig
from engine.rules import Rule


@dataclass(frozen=True, kw_only=True, slots=True)
class MXLinearConfig:
    """Microscaling formats for linear layers."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Casting kernel; there is no such converter, and it does nothing."""

    recipe_name: str = "mxfp8_cublas"
    """Scaling recipe; there is no such converter, and it does nothing."""

    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Modules to leave alone; there is no such converter, and it does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeLinearConfig:
    """Low precision for linear layers."""

    float8: Float8LinearConfig = field(default_factory=Float8LinearConfig)
    """Float8 training of linear layers."""

    mx: MXLinearConfig = field(default_factory=MXLinearConfig)
    """Microscaling formats for linear layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8GroupedConfig:
    """Float8 for the grouped multiplications of experts."""

    fqns: list[str] | str = field(default_factory=list[str])
    """Modules to convert; there is no such converter, and it does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MXGroupedConfig:
    """Microscaling formats for the grouped multiplications of experts."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """Scaling recipe; there is no such converter, and it does nothing."""

    fqns: list[str] | str = field(default_factory=list[str])
    """Modules to convert; there is no such converter, and it does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeGroupedConfig:
    """Low precision for the grouped multiplications of experts."""

    float8: Float8GroupedConfig = field(default_factory=Float8GroupedConfig)
    """Float8 for experts."""

    mx: MXGroupedConfig = field(default_factory=MXGroupedConfig)
    """Microscaling formats for experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    """Low-precision settings; they act through model.converters."""

    linear: QuantizeLinearConfig = field(default_factory=QuantizeLinearConfig)
    """Linear layers."""

    grouped_mm: QuantizeGroupedConfig = field(default_factory=QuantizeGroupedConfig)
    """Experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimationConfig:
    """Replaced by scripts/check_config.py, which needs no GPU."""

    enable: bool = False
    """Refused; run scripts/check_config.py with the same file."""

    disable_fake_mode: bool = False
    """Does nothing while `enable` is false."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultToleranceConfig:
    """Training through torchft, which is not available."""

    enable: bool = False
    """Refused; checkpoints and a restart by the launcher take its place."""

    process_group: str = "gloo"
    """Does nothing while `enable` is false."""

    process_group_timeout_ms: int = 10000
    """Does nothing while `enable` is false."""

    replica_id: int = 0
    """Does nothing while `enable` is false."""

    group_size: int = 0
    """Does nothing while `enable` is false."""

    min_replica_size: int = 1
    """Does nothing while `enable` is false."""

    semi_sync_method: str | None = None
    """Does nothing while `enable` is false."""


RENAMED = {
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes": (
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"
    ),
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.interval_type": "checkpoint.interval, which counts optimizer steps,",
    "comm.trace_buf_path": "comm.save_traces_folder",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "experimental.enable_compiled_autograd": "compile.enable",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "fault_tolerance.replica_groups": "parallelism.data_parallel_replicate_degree",
    "float8.emulate": "quantize.linear.float8.emulate",
    "float8.enable_float8_linear": "model.converters",
    "float8.enable_fsdp_float8_all_gather": "quantize.linear.float8.enable_fsdp_float8_all_gather",
    "float8.filter_fqns": "quantize.linear.float8.filter_fqns",
    "float8.precompute_float8_dynamic_scale_for_fsdp": (
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    ),
    "float8.recipe_name": "quantize.linear.float8.recipe_name",
    "float8.scaling_type_weight": "quantize.linear.float8.recipe_name",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "metrics.rank_0_only": "metrics.save_for_all_ranks",
    "model.norm_type": "model.flavor, which decides the norm,",
    "model.use_flex_attn": "model.attention = 'flex'",
    "mx.filter_fqns": "quantize.linear.mx.filter_fqns",
    "mx.recipe_name": "quantize.linear.mx.recipe_name",
    "optimizer.fused": "optimizer.implementation = 'fused'",
    "parallelism.enable_compiled_autograd": "compile.enable",
    "parallelism.pipeline_parallel_split_points": "parallelism.module_fqns_per_model_part",
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.deterministic": "debug.deterministic",
    "training.enable_loss_parallel": "parallelism.disable_loss_parallel",
    "training.fsdp_reshard_after_forward": "parallelism.fsdp_reshard_after_forward",
    "training.seed": "debug.seed",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "validation.batch_size": "validation.local_batch_size",
    "validation.enabled": "validation.enable",
}
"""Spellings of earlier versions, and what to write in their place."""

RULES = (
    Rule(
        id="memory_estimation_inside_a_run",
        keys=("memory_estimation.enable",),
        applies=lambda f: f.config.memory_estimation.enable,
        reason="sizes are estimated without starting a run",
        remedy="set it to false, and run scripts/check_config.py with this file",
    ),
    Rule(
        id="fault_tolerance_through_torchft",
        keys=("fault_tolerance.enable",),
        applies=lambda f: f.config.fault_tolerance.enable,
        reason="training through torchft is not there",
        remedy="set it to false; with checkpoint.enable = true a restarted run goes on by itself",
    ),
)
"""Features of those files that would take effect and are not there."""

WITHOUT_EFFECT = frozenset(
    {
        "training.dataloader.persistent_workers",  # the stream of rows never ends
        "validation.dataloader.persistent_workers",
        "parallelism.module_fqns_per_model_part",  # the pipeline degree is 1
        "parallelism.pipeline_parallel_first_stage_less_layers",
        "parallelism.pipeline_parallel_last_stage_less_layers",
        "parallelism.pipeline_parallel_layers_per_stage",
        "parallelism.pipeline_parallel_schedule",
        "parallelism.pipeline_parallel_schedule_csv",
        "parallelism.pipeline_parallel_microbatch_size",
        "parallelism.pipeline_parallel_expert_parallel_overlap",
        "parallelism.context_parallel_rotate_method",  # context_parallel_mode says it
        "parallelism.expert_parallel_comm_backend",  # the expert-parallel degree is 1
        "checkpoint.enable_ft_dataloader_checkpoints",  # torchft is not used
        "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice",  # there is no such converter
        "quantize.linear.mx.recipe_name",
        "quantize.linear.mx.filter_fqns",
        "quantize.grouped_mm.float8.fqns",
        "quantize.grouped_mm.mx.recipe_name",
        "quantize.grouped_mm.mx.fqns",
        "memory_estimation.disable_fake_mode",  # memory_estimation.enable is false
        "fault_tolerance.process_group",  # fault_tolerance.enable is false
        "fault_tolerance.process_group_timeout_ms",
        "fault_tolerance.replica_id",
        "fault_tolerance.group_size",
        "fault_tolerance.min_replica_size",
        "fault_tolerance.semi_sync_method",
        "debug.moe_force_load_balance",  # there are no experts
    }
)
"""Keys of features that are off: accepted with any value and kept in the resolved file."""
