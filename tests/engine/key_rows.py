"""The table of configuration keys: another value for each, the run that shows it, its consumer.

`{folder}` in a value is the folder in which the runs' data lies and their files go. A run's rows
are its command line.
"""

from dataclasses import dataclass
from typing import Any

from engine.adapters import OneAdapterConfig
from engine.data.config import MixedSourceConfig, SourceConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One key that has an effect."""

    value: Any
    """Other than the default."""

    reader: str
    """`file:function` that reads the value to act on it."""


def rows(reader: str, **values: Any) -> dict[str, Row]:
    """Return the rows of keys with one consumer; `__` stands for the dot between key parts."""
    names = {name.replace("__", "."): value for name, value in values.items()}
    return {name: Row(value=value, reader=reader) for name, value in names.items()}


SCHEDULE, OPTIMIZER = "engine/schedule.py:", "engine/optim.py:"
LOOP, BUILD = "engine/loop.py:", "engine/build.py:"
BATCHES = "engine/batches.py:"
CHECKPOINT, MODEL = "engine/checkpoint.py:", "engine/model.py:"
OPEN_ROWS, OPEN_PACKING = "engine/data/sources.py:open_rows", "engine/data/sources.py:_open_packing"
RECIPE = "engine/data/sources.py:_recipe"
LOADER, PROFILING = "engine/data/loader.py:_batches", "engine/profiling.py:"
CHECKPOINTED = "parallelisms/activation_checkpoint.py:checkpointed"
MESH, APPLY = "parallelisms/mesh.py:ParallelDims.of", "parallelisms/apply.py:parallelize"
SPLIT = "parallelisms/apply.py:_split_tensors"

TRAIN = {
    **rows("engine/cli.py:load_config", job__print_config=True),
    **rows("engine/run_folder.py:RunFolder.of", job__dump_folder="{folder}/run"),
    **rows("engine/run_folder.py:RunFolder.of", checkpoint__folder="saved"),
    **rows("engine/run_folder.py:RunFolder.write_config", job__save_config_file="copy.json"),
    **rows(f"{LOOP}_open_folder", job__description="all keys at once"),
    **rows(f"{LOOP}fit", job__device="cpu"),
    **rows(f"{LOOP}_open_output", metrics__disable_color_printing=True),
    **rows(f"{LOOP}_train", training__steps=6, training__gc_freq=2),
    **rows(f"{LOOP}_take_step", metrics__log_freq=4),
    **rows(
        "engine/trackers.py:build_trackers",
        metrics__enable_tensorboard=True,
        metrics__save_tb_folder="curves",
    ),
    **rows(f"{PROFILING}Profiler.__init__", profiling__enable_profiling=True),
    **rows(f"{PROFILING}Profiler._write_trace", profiling__save_traces_folder="seen"),
    **rows(
        f"{PROFILING}_trace_recorder",
        profiling__profile_freq=3,
        profiling__profiler_active=2,
        profiling__profiler_warmup=1,
    ),
    **rows(f"{MODEL}_named_family", model__name="tests.engine.own_parts"),
    **rows(
        f"{MODEL}find_architecture",
        model__flavor="tiny",
        model__hf_assets_path="{folder}/assets",
    ),
    **rows(f"{BUILD}open_tokenizer", model__tokenizer_path="{folder}/tokenizer"),
    **rows(f"{MODEL}choose_backend", model__attention="eager"),
    **rows(f"{BUILD}_build_model", model__freeze=["model.layers.0.mlp.*.weight"]),
    **rows(f"{BUILD}_build_model", training__enable_cpu_offload=True),
    **rows(f"{BUILD}precision_of", training__dtype="bfloat16"),
    **rows(f"{BUILD}precision_of", training__mixed_precision_reduce="bfloat16"),
    **rows(f"{BUILD}build", objective__name="tests.engine.own_parts"),
    **rows("engine/objectives/dpo.py:DPO.__init__", objective__loss="ipo"),
    **rows("engine/objectives/simpo.py:SimPO.__init__", objective__gamma=0.5),
    **rows(
        "engine/objectives/kto.py:KTO.__init__",
        objective__desirable_weight=1.5,
        objective__undesirable_weight=0.5,
    ),
    **rows(
        f"{OPTIMIZER}_update_rule",
        optimizer__name="Adam",
        optimizer__lr=0.003,
        optimizer__beta1=0.8,
        optimizer__beta2=0.9,
        optimizer__eps=1e-6,
        optimizer__implementation="for-loop",
    ),
    **rows(f"{OPTIMIZER}build_optimizer", optimizer__weight_decay=0.02),
    **rows(
        f"{SCHEDULE}phases",
        lr_scheduler__warmup_steps=2,
        lr_scheduler__total_steps=5,
        lr_scheduler__decay_ratio=0.5,
    ),
    **rows(
        f"{SCHEDULE}lr_factor", lr_scheduler__decay_type="cosine", lr_scheduler__min_lr_factor=0.25
    ),
    **rows(
        f"{BATCHES}open_training_sources",
        training__dataset="jsonl",
        training__dataset_path="{folder}/train.jsonl",
        training__seq_len=24,
    ),
    **rows(
        f"{BUILD}_build_trainer",
        training__local_batch_size=2,
        training__global_batch_size=4,
        training__max_norm=0.05,
        training__on_nonfinite="skip",
    ),
    **rows(f"{BUILD}_embedding_noise", training__neftune_noise_alpha=5.0),
    **rows(
        LOADER,
        training__dataloader__num_workers=1,
        training__dataloader__pin_memory=True,
        training__dataloader__prefetch_factor=3,
        validation__dataloader__num_workers=2,
        validation__dataloader__pin_memory=True,
        validation__dataloader__prefetch_factor=4,
    ),
    **rows(
        OPEN_ROWS,
        data__cache_folder="{folder}/cache",
        data__num_processes=3,
        data__format="tests.engine.own_parts",
        data__text_field="body",
    ),
    **rows(
        RECIPE,
        data__bos=False,
        data__eos=False,
        data__chat_template="chatml",
        data__train_on="last",
        data__system_prompts=["Be brief.", "Be kind."],
        data__system_prompt_rate=0.5,
        data__on_bad_record="skip",
    ),
    **rows(OPEN_PACKING, data__stride=12, data__last_row="drop"),
    **rows("parallelisms/mesh.py:ParallelDims.of", parallelism__data_parallel_shard_degree=1),
    **rows(APPLY, parallelism__fsdp_reshard_after_forward="never"),
    **rows(
        f"{CHECKPOINT}Checkpointer.should_save",
        checkpoint__enable=True,
        checkpoint__interval=2,
        checkpoint__enable_first_step_checkpoint=True,
    ),
    **rows(
        f"{CHECKPOINT}Checkpointer.save",
        checkpoint__async_mode="async",
        checkpoint__last_save_model_only=False,
        checkpoint__last_save_in_hf=True,
    ),
    **rows(f"{CHECKPOINT}Checkpointer._retire", checkpoint__keep_latest_k=2),
    **rows(f"{CHECKPOINT}Checkpointer._export", checkpoint__export_dtype="bfloat16"),
    **rows(
        "parallelisms/activation_checkpoint.py:_recomputed_shapes",
        activation_checkpoint__per_op_sac_force_recompute_mm_shapes_by_fqns=["mlp.up_proj"],
    ),
    **rows(
        CHECKPOINTED,
        activation_checkpoint__selective_ac_option="op",
        activation_checkpoint__early_stop=True,
        activation_checkpoint__preserve_rng_state=False,
        activation_checkpoint__determinism_check="none",
    ),
    **rows("engine/distributed.py:process_group", comm__init_timeout_seconds=250),
    **rows("engine/distributed.py:shorten_timeouts", comm__train_timeout_seconds=60),
    **rows("engine/cli.py:load_config", experimental__custom_import="tests.engine.own_parts"),
    **rows(f"{LOOP}_should_validate", validation__enable=True, validation__freq=3),
    **rows(
        f"{BATCHES}open_validation_sources",
        validation__dataset="jsonl",
        validation__dataset_path="{folder}/validation.jsonl",
        validation__seq_len=20,
    ),
    **rows(
        f"{BUILD}_validation_batches",
        validation__local_batch_size=3,
        validation__steps=2,
    ),
    **rows(
        "engine/distributed.py:seed_everything",
        debug__seed=7,
        debug__deterministic=True,
        debug__deterministic_warn_only=True,
    ),
}
"""One run with nearly everything on."""

RESUME = {
    **rows(f"{CHECKPOINT}Checkpointer.find", checkpoint__load_step=4, checkpoint__load_only=True),
    **rows(f"{CHECKPOINT}Checkpointer.load", checkpoint__exclude_from_loading=["rng"]),
}
"""The same from the middle."""

VALIDATE = {**rows(f"{LOOP}fit", validation__only=True)}
"""The same, to look at what it trained."""

ON_FROM = {
    **rows(
        f"{CHECKPOINT}Checkpointer.find",
        checkpoint__initial_load_path="{folder}/run/saved/step-4",
        checkpoint__initial_load_model_only=False,
    ),
    **rows(f"{LOOP}_train", training__gc_debug=True),
    **rows(
        "parallelisms/apply.py:_wrap_blocks",
        activation_checkpoint__mode="full",
        activation_checkpoint__recompute_logits="never",
    ),
    **rows(CHECKPOINTED, activation_checkpoint__debug=True),
    **rows("engine/trackers.py:build_trackers", metrics__enable_wandb=True),
}
"""Another run that goes on from the first one's checkpoint."""

FROM_HF = {
    **rows(f"{CHECKPOINT}Checkpointer.find", checkpoint__initial_load_in_hf=True),
    **rows(f"{CHECKPOINT}Checkpointer.load", checkpoint__initial_load_allow=["model.norm.weight"]),
    **rows(f"{LOOP}fit", checkpoint__create_seed_checkpoint=True),
    **rows(f"{BUILD}precision_of", training__mixed_precision_param="float32"),
    **rows(OPEN_PACKING, data__packing="none", data__long_document="split"),
    **rows(OPEN_PACKING, data__batch_tokens=48, data__pad_to_multiple=12),
    **rows(f"{BATCHES}open_training_sources", data__largest_batch_first=True),
}
"""A start from the first one's export."""

STREAMED = {
    **rows(f"{BATCHES}open_training_rows", data__streaming=True),
    **rows("engine/data/sources.py:stream_rows", data__shuffle_buffer_size=7),
}
"""The first run's text again, without preparing it."""

PREFERRED = {
    **rows(
        "engine/objectives/dpo.py:DPO.__init__",
        objective__beta=0.3,
        objective__label_smoothing=0.1,
        objective__nll_weight=0.2,
    ),
    **rows("engine/reference.py:reference_kind", objective__reference="precomputed"),
    **rows("engine/reference.py:reference_source", objective__reference_path="{folder}/run/hf"),
}
"""A step of preference tuning against the first one's export."""

COMPILED = {
    **rows(
        f"{BATCHES}open_training_sources",
        data__sources=[
            MixedSourceConfig(name="all", dataset="dummy", epochs=0.5),
            MixedSourceConfig(name="more", dataset="dummy", epochs=2.0),
        ],
    ),
    **rows(
        f"{BATCHES}open_validation_sources",
        validation__sources=[SourceConfig(name="held_out", dataset="dummy")],
    ),
    **rows(OPEN_ROWS, data__dummy_tokens=4096),
    **rows(
        "engine/adapters.py:build_adapted",
        adapter__kind="dora",
        adapter__name="own",
        adapter__rank=3,
        adapter__alpha=6.0,
        adapter__use_rslora=True,
        adapter__dropout=0.5,
        adapter__targets=["k_proj"],
        adapter__more=[OneAdapterConfig(name="other", rank=5, targets=["v_proj"])],
    ),
    **rows("engine/peft_io.py:read_adapters", adapter__path="{folder}/peft"),
    **rows("engine/start.py:_adapter_assets", adapter__merge_export=True),
    **rows(
        "parallelisms/apply.py:_wrap_blocks", compile__enable=True, compile__components=["model"]
    ),
    **rows("parallelisms/compile.py:compiled", compile__backend="eager"),
}
"""A step of random tokens under the compiler, for which a function stands in."""

LAID_OUT = {
    **rows(
        MESH,
        parallelism__data_parallel_replicate_degree=2,
        parallelism__context_parallel_degree=2,
        parallelism__context_parallel_load_balancer=None,
        parallelism__tensor_parallel_degree=2,
    ),
    **rows(SPLIT, parallelism__sequence_parallel=False, parallelism__disable_loss_parallel=True),
    **rows(APPLY, parallelism__context_parallel_mode="ring"),
}
"""The model laid out for the first of eight ranks."""

OVERLAPPED = {
    **rows("parallelisms/mesh.py:ParallelDims.of", parallelism__fsdp_copy_engine=True),
    **rows(SPLIT, parallelism__enable_async_tensor_parallel=True),
    **rows(
        "parallelisms/activation_checkpoint.py:set_memory_budget",
        activation_checkpoint__memory_budget=0.25,
        activation_checkpoint__visualize_memory_budget_pareto=True,
    ),
}
"""The same, compiled, for four ranks that have GPUs."""

ON_CUDA = {
    **rows(
        "engine/distributed.py:_record_collectives",
        comm__trace_buf_size=500,
        comm__save_traces_folder="flights",
        comm__save_traces_file_prefix="of_rank_",
    ),
    **rows(f"{PROFILING}Profiler.__init__", profiling__enable_memory_snapshot=True),
    **rows(f"{PROFILING}Profiler._write_snapshot", profiling__save_memory_snapshot_folder="held"),
    **rows("engine/trackers.py:build_trackers", metrics__save_for_all_ranks=True),
    **rows(f"{MODEL}choose_kernels", model__kernels="liger"),
}
"""Parts of a run that only GPUs or a second rank take."""

LOW_PRECISION = {
    **rows(
        "engine/low_precision.py:float8_of",
        model__converters=["float8"],
        quantize__linear__float8__recipe_name="tensorwise",
        quantize__linear__float8__enable_fsdp_float8_all_gather=True,
        quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp=True,
        quantize__linear__float8__filter_fqns=["mlp.gate"],
        quantize__linear__float8__emulate=True,
    ),
    **rows("engine/low_precision.py:log_conversion", model__print_after_conversion=True),
}
"""A run with float8 layers."""

RUNS = {
    "train": TRAIN,
    "resume": RESUME,
    "validate": VALIDATE,
    "on_from": ON_FROM,
    "from_hf": FROM_HF,
    "streamed": STREAMED,
    "preferred": PREFERRED,
    "compiled": COMPILED,
    "laid_out": LAID_OUT,
    "overlapped": OVERLAPPED,
    "low_precision": LOW_PRECISION,
    "on_cuda": ON_CUDA,
}
