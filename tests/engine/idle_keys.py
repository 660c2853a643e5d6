"""Keys of the configuration that no run of `key_rows.py` shows: refused, or without an effect."""

READ_AS_TEXT = {"job.config_file", "job.custom_config_module"}
"""Keys that `engine/cli.py` needs before there is a configuration."""

REFUSED = {
    "comm.mode": "fake_backend",
    "experimental.custom_args_module": "own",
    "optimizer.early_step_in_backward": True,
    "parallelism.pipeline_parallel_degree": 2,
    "parallelism.expert_parallel_degree": 2,
    "parallelism.expert_tensor_parallel_degree": 2,
    "checkpoint.initial_load_in_hf_quantized": True,
    "memory_estimation.enable": True,
    "fault_tolerance.enable": True,
}
"""Keys of which every other value is a mistake."""

WITHOUT_EFFECT = {
    "no effect at pipeline degree 1": [
        "parallelism.module_fqns_per_model_part",
        "parallelism.pipeline_parallel_first_stage_less_layers",
        "parallelism.pipeline_parallel_last_stage_less_layers",
        "parallelism.pipeline_parallel_layers_per_stage",
        "parallelism.pipeline_parallel_schedule",
        "parallelism.pipeline_parallel_schedule_csv",
        "parallelism.pipeline_parallel_microbatch_size",
        "parallelism.pipeline_parallel_expert_parallel_overlap",
    ],
    "of no effect here": ["parallelism.context_parallel_rotate_method"],
    "no effect at expert-parallel degree 1": ["parallelism.expert_parallel_comm_backend"],
    "there is no such converter, and it does nothing": [
        "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice",
        "quantize.linear.mx.recipe_name",
        "quantize.linear.mx.filter_fqns",
        "quantize.grouped_mm.float8.fqns",
        "quantize.grouped_mm.mx.recipe_name",
        "quantize.grouped_mm.mx.fqns",
    ],
    "does nothing while `enable` is false": [
        "memory_estimation.disable_fake_mode",
        "fault_tolerance.process_group",
        "fault_tolerance.process_group_timeout_ms",
        "fault_tolerance.replica_id",
        "fault_tolerance.group_size",
        "fault_tolerance.min_replica_size",
        "fault_tolerance.semi_sync_method",
    ],
    "accepted and ignored": ["checkpoint.enable_ft_dataloader_checkpoints"],
    "accepted for files of torchtitan 0.2": [
        "training.dataloader.persistent_workers",
        "validation.dataloader.persistent_workers",
    ],
    "dense models ignore it": ["debug.moe_force_load_balance"],
}
"""Keys that nothing reads, by the words of their own sentence that say so."""
