"""The table of what cannot be combined: every row is driven, and allowed neighbours pass."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from engine.cli import load_config
from engine.combinations import RULES, refusals
from engine.config import JobConfig, check
from engine.model import find_architecture
from engine.rules import Facts, gather_facts
from engine.schema import leaves
from models.layers.rope import RopeConfig
from parallelisms.mesh import ParallelConfig, ParallelDims
from tests.engine.combination_cases import OTHER_CASES, Case

TP2 = "parallelism.tensor_parallel_degree=2"
ASYNC_TP = f"{TP2} parallelism.enable_async_tensor_parallel"
CP2 = "parallelism.context_parallel_degree=2"
CP4 = "parallelism.context_parallel_degree=4"
ULYSSES = "parallelism.context_parallel_mode=ulysses"
RING = "parallelism.context_parallel_mode=ring"
NO_LSE = "tests.engine.attention_without_lse"
LIGER = "model.kernels=liger"
STREAM, LOADER = "data.streaming", "training.dataloader.num_workers"
CUDA: dict[str, Any] = {"device_type": "cuda"}
WINDOW = {"sliding_window": 9, "layer_types": ("sliding_attention",) * 4}
DYNAMIC, YARN = ({"rope": RopeConfig(theta=1e4, kind=kind)} for kind in ("dynamic", "yarn"))


def facts_of(both: dict[str, Any]) -> dict[str, Any]:
    return {"facts": both, "allowed_facts": both}


CASES = {
    "degrees_that_do_not_divide_the_ranks": Case(
        refused="parallelism.tensor_parallel_degree=4", allowed=TP2, world_size=6
    ),
    "degrees_that_do_not_multiply_to_the_ranks": Case(
        refused=f"{TP2} parallelism.data_parallel_shard_degree=2",
        allowed=f"{TP2} parallelism.data_parallel_shard_degree=4",
        world_size=8,
    ),
    "heads_that_tensor_parallelism_does_not_divide": Case(
        refused="parallelism.tensor_parallel_degree=8",
        allowed="parallelism.tensor_parallel_degree=4",
        world_size=8,
    ),
    "feed_forward_width_that_tensor_parallelism_does_not_divide": Case(
        refused=TP2, allowed=TP2, world_size=2, facts={"intermediate_size": 383}
    ),
    "more_data_parallel_ranks_than_rows_of_a_step": Case(
        refused="training.global_batch_size=3",
        allowed=f"training.global_batch_size=3 {TP2}",
        world_size=4,
    ),
    **OTHER_CASES,
    "heads_that_ulysses_does_not_divide": Case(
        refused=f"{TP2} parallelism.context_parallel_degree=8 {ULYSSES}",
        allowed=f"{TP2} {CP4} {ULYSSES}",
        world_size=16,
    ),
    "key_heads_that_ulysses_cannot_deal": Case(
        refused=f"{CP4} {ULYSSES}",
        allowed=f"{CP4} {ULYSSES}",
        world_size=4,
        facts={"num_heads": 12, "num_kv_heads": 6},
        allowed_facts={"num_heads": 12, "num_kv_heads": 2},
    ),
    "ring_with_a_backend_that_returns_no_log_sum_exp": Case(
        refused=f"{CP2} {RING}",
        allowed=f"{CP2} parallelism.context_parallel_mode=allgather",
        world_size=2,
        **facts_of({"attention": NO_LSE}),
    ),
    "ring_with_a_sliding_window": Case(
        refused=f"{CP2} {RING}", allowed=f"{CP2} {ULYSSES}", world_size=2, **facts_of(WINDOW)
    ),
    "whole_rows_attended_where_keys_travel": Case(
        refused=f"{CP2} model.attention=varlen",
        allowed=f"{CP2} model.attention=varlen {ULYSSES}",
        world_size=2,
        **facts_of(CUDA | {"attention": "varlen"}),
    ),
    "angles_of_documents_that_ranks_share": Case(
        refused=CP2, allowed=CP2, world_size=2, facts=DYNAMIC, allowed_facts=YARN
    ),
    "rotate_method_that_another_mode_overrules": Case(
        refused=f"{CP2} parallelism.context_parallel_rotate_method=alltoall",
        allowed=f"{CP2} parallelism.context_parallel_rotate_method=alltoall {RING}",
        world_size=2,
    ),
    "unknown_load_balancer": Case(
        refused=f"{CP2} parallelism.context_parallel_load_balancer=zigzag",
        allowed=f"{CP2} parallelism.context_parallel_load_balancer=None",
        world_size=2,
    ),
    "cuda_without_enough_gpus": Case(
        refused="job.device=cuda",
        allowed="job.device=cuda",
        facts=CUDA | {"num_gpus": 1, "num_local_ranks": 2},
        allowed_facts=CUDA | {"num_gpus": 2, "num_local_ranks": 2},
    ),
    "attention_backend_that_cannot_run_on_the_device": Case(
        refused="model.attention=flex", allowed="model.attention=flex", allowed_facts=CUDA
    ),
    "memory_snapshot_without_cuda": Case(
        refused="profiling.enable_memory_snapshot",
        allowed="profiling.enable_memory_snapshot",
        allowed_facts=CUDA,
    ),
    "async_tensor_parallelism_without_cuda": Case(
        refused=f"{ASYNC_TP} compile.enable",
        allowed=f"{ASYNC_TP} compile.enable",
        world_size=2,
        allowed_facts=CUDA,
    ),
    "async_tensor_parallelism_without_compile": Case(
        refused=f"{ASYNC_TP} compile.enable compile.components=loss",
        allowed="parallelism.enable_async_tensor_parallel",
        world_size=2,
        facts=CUDA,
    ),
    "async_tensor_parallelism_without_inductor": Case(
        refused=f"{ASYNC_TP} compile.enable compile.backend=aot_eager",
        allowed=f"{ASYNC_TP} compile.enable",
        world_size=2,
        **facts_of(CUDA),
    ),
    "async_tensor_parallelism_without_sequence_parallelism": Case(
        refused=f"{ASYNC_TP} compile.enable parallelism.no_sequence_parallel",
        allowed=f"{ASYNC_TP} compile.enable",
        world_size=2,
        **facts_of(CUDA),
    ),
    "memory_budget_without_compile": Case(
        refused="activation_checkpoint.mode=memory_budget",
        allowed="activation_checkpoint.mode=memory_budget compile.enable",
    ),
    "selective_checkpointing_of_no_block": Case(
        refused="activation_checkpoint.selective_ac_option=9",
        allowed="activation_checkpoint.selective_ac_option=9 activation_checkpoint.mode=full",
    ),
    "compile_on_the_cpu_without_a_compiler": Case(
        refused="compile.enable",
        allowed="compile.enable compile.backend=aot_eager",
        **facts_of({"missing": frozenset({"a C++ compiler"})}),
    ),
    "compile_on_the_gpu_without_triton": Case(
        refused="compile.enable",
        allowed="compile.enable",
        facts=CUDA | {"missing": frozenset({"triton"})},
        allowed_facts={"missing": frozenset({"triton"})},
    ),
    "liger_kernels_on_the_cpu": Case(
        refused=LIGER,
        allowed=LIGER,
        facts={"missing": frozenset({"liger_kernel", "triton"})},
        allowed_facts=CUDA,
    ),
    "liger_kernels_without_their_package": Case(
        refused=LIGER,
        allowed="model.kernels=torch",
        facts=CUDA | {"missing": frozenset({"liger_kernel"})},
        allowed_facts=CUDA | {"missing": frozenset({"liger_kernel"})},
    ),
    "liger_kernels_with_compile": Case(
        refused=f"{LIGER} compile.enable compile.components=loss",
        allowed=LIGER,
        **facts_of(CUDA),
    ),
    "liger_kernels_with_tensor_parallelism": Case(
        refused=f"{LIGER} {TP2}",
        allowed=f"{LIGER} {CP2}",
        world_size=2,
        **facts_of(CUDA),
    ),
    "compute_wider_than_the_stored_parameters": Case(
        refused="training.dtype=bfloat16 training.mixed_precision_param=float32",
        allowed="training.dtype=bfloat16",
    ),
    "gradients_summed_in_less_than_they_are_computed_in": Case(
        refused="training.mixed_precision_param=float32 training.mixed_precision_reduce=bfloat16",
        allowed="training.mixed_precision_reduce=bfloat16",
    ),
    "training_files_without_a_path": Case(
        refused="training.dataset=jsonl", allowed="training.dataset=jsonl training.dataset_path=x"
    ),
    "validation_files_without_a_path": Case(
        refused="validation.dataset=parquet validation.enable",
        allowed="validation.dataset=parquet",
    ),
    "streaming_of_random_tokens": Case(
        refused=f"{STREAM} training.dataset=dummy", allowed=f"{STREAM} validation.dataset=dummy"
    ),
    "streaming_by_several_workers": Case(
        refused=f"{STREAM} {LOADER}=2", allowed=f"{STREAM} {LOADER}=1"
    ),
    "dataset_beside_sources": Case(
        refused='data.sources=[{name="a",dataset="dummy",weight=1}] training.dataset=dummy',
        allowed='data.sources=[{name="a",dataset="dummy",weight=1}] training.seq_len=256',
    ),
    "stride_longer_than_a_row": Case(
        refused="data.stride=300 validation.seq_len=256 validation.enable",
        allowed="data.stride=300 validation.seq_len=256",
    ),
    "tokenizer_folder_that_does_not_exist": Case(
        refused="model.tokenizer_path=/no/such/folder",
        allowed="model.tokenizer_path=/no/such/folder",
        allowed_facts={"is_here": False},
    ),
    "tokenizer_larger_than_the_vocabulary": Case(
        refused="",
        allowed="",
        facts={"tokenizer_vocab_size": 4097},
        allowed_facts={"tokenizer_vocab_size": 4096},
    ),
    "validation_of_weights_that_are_nowhere": Case(
        refused="validation.only", allowed="validation.only checkpoint.enable"
    ),
    "seed_checkpoint_without_checkpoints": Case(
        refused="checkpoint.create_seed_checkpoint",
        allowed="checkpoint.create_seed_checkpoint checkpoint.enable",
    ),
    "seed_checkpoint_that_may_not_be_saved": Case(
        refused="checkpoint.enable checkpoint.create_seed_checkpoint checkpoint.load_only",
        allowed="checkpoint.enable checkpoint.load_only",
    ),
    "seed_checkpoint_from_a_run_that_only_validates": Case(
        refused="checkpoint.enable checkpoint.create_seed_checkpoint validation.only",
        allowed="checkpoint.enable validation.only",
    ),
    "export_that_may_not_be_saved": Case(
        refused="checkpoint.enable checkpoint.last_save_in_hf checkpoint.load_only",
        allowed="checkpoint.last_save_in_hf checkpoint.load_only",
    ),
    "resuming_past_the_last_step": Case(
        refused="checkpoint.enable checkpoint.load_step=11 training.steps=10",
        allowed="checkpoint.enable checkpoint.load_step=10 training.steps=10",
    ),
    "initial_checkpoint_that_does_not_exist": Case(
        refused="checkpoint.enable checkpoint.initial_load_path=/no/such/folder",
        allowed="checkpoint.initial_load_path=/no/such/folder",
    ),
    "weights_of_a_folder_that_holds_none": Case(
        refused="checkpoint.enable checkpoint.initial_load_in_hf",
        allowed="checkpoint.initial_load_in_hf",
    ),
    "wandb_without_its_package": Case(
        refused="metrics.enable_wandb",
        allowed="metrics.enable_wandb",
        facts={"missing": frozenset({"wandb"})},
    ),
    "memory_estimation_inside_a_run": Case(
        refused="memory_estimation.enable", allowed="memory_estimation.disable_fake_mode"
    ),
    "fault_tolerance_through_torchft": Case(
        refused="fault_tolerance.enable", allowed="fault_tolerance.replica_id=2"
    ),
}
"""By rule."""


def _facts(options: str, world_size: int, changes: dict[str, Any]) -> Facts:
    """Return facts that owe nothing to the machine that the test runs on."""
    config = load_config([f"--{word}" if "." in word else word for word in options.split()])
    known, problems = gather_facts(config, world_size, device_type="cpu")
    assert not problems
    assert known.decoder is not None
    others = {k: v for k, v in changes.items() if k in Facts.__dataclass_fields__}
    sizes = {k: v for k, v in changes.items() if k not in others}
    machine: dict[str, Any] = {"missing": frozenset(), "num_gpus": 0, "num_local_ranks": 1}
    decoder: Any = others.pop("decoder", known.decoder)
    return replace(known, decoder=replace(decoder, **sizes), **machine | others)


def test_the_table_has_at_least_thirty_rows_and_each_is_driven():
    assert len(RULES) >= 30
    assert [rule.id for rule in RULES] == list(dict.fromkeys(rule.id for rule in RULES))
    assert {rule.id for rule in RULES} == set(CASES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_forbidden_combination_is_refused_by_its_rule_alone(rule: Any):
    case = CASES[rule.id]
    facts = _facts(case.refused, case.world_size, case.facts)
    assert [r.id for r in RULES if r.applies(facts)] == [rule.id]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_the_allowed_neighbour_is_not_refused(rule: Any):
    case = CASES[rule.id]
    assert refusals(_facts(case.allowed, case.world_size, case.allowed_facts)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_refusal_shows_each_setting_with_its_value_and_a_remedy(rule: Any):
    case = CASES[rule.id]
    message = rule.message(_facts(case.refused, case.world_size, case.facts))
    assert all(f"{key} = " in message for key in rule.keys)
    assert set(rule.keys) <= set(leaves(JobConfig))
    assert message.count("; ") >= 1
    assert "{" not in message


def test_all_refusals_come_in_one_message():
    config = load_config(["--model.converters=mx", "--fault_tolerance.enable"])
    with pytest.raises(ValueError, match=r"2 mistakes(.|\n)*converters(.|\n)*fault_tolerance"):
        check(config, 1)


def test_an_unknown_flavor_does_not_hide_other_mistakes():
    config = load_config(["--model.flavor=9B", "--training.global_batch_size=3"])
    with pytest.raises(ValueError, match=r"2 mistakes(.|\n)*'9B'(.|\n)*global_batch_size = 3"):
        check(config, 4)


def test_the_table_and_the_mesh_agree_on_which_degrees_fit():
    for replicate, shard, cp, tp, world in product(
        (1, 3), (-1, 1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4, 8, 12)
    ):
        parallelism = ParallelConfig(
            data_parallel_replicate_degree=replicate,
            data_parallel_shard_degree=shard,
            context_parallel_degree=cp,
            tensor_parallel_degree=tp,
        )
        try:
            ParallelDims.of(parallelism, world)
            fits = True
        except ValueError:
            fits = False
        words = [f"parallelism.data_parallel_replicate_degree={replicate}"]
        words += [f"parallelism.data_parallel_shard_degree={shard}"]
        words += [f"parallelism.context_parallel_degree={cp}"]
        words += [f"parallelism.tensor_parallel_degree={tp}"]
        facts = _facts(" ".join(words), world, {})
        applied = {r.id for r in RULES if r.applies(facts)}
        assert fits != any(rule.startswith("degrees_") for rule in applied), (words, world)


ALLOWED = [
    ("", 1),
    ("", 4),
    ("parallelism.data_parallel_replicate_degree=2", 4),
    ("parallelism.data_parallel_replicate_degree=4 parallelism.data_parallel_shard_degree=1", 4),
    (f"{TP2} parallelism.data_parallel_replicate_degree=2", 8),
    (f"{TP2} parallelism.disable_loss_parallel", 2),
    (f"{TP2} parallelism.fsdp_copy_engine", 2),
    (f"{TP2} training.seq_len=255 validation.enable validation.seq_len=255", 2),
    (f"{TP2} parallelism.no_sequence_parallel training.seq_len=255", 2),
    (f"{CP2} training.seq_len=255", 2),
    (f"{CP2} {TP2} {ULYSSES} parallelism.data_parallel_replicate_degree=2", 16),
    (f"{CP4} {RING} compile.enable", 4),
    ("parallelism.context_parallel_rotate_method=alltoall", 1),
    (f"{CP2} training.global_batch_size=8 training.local_batch_size=8", 2),
    (f"{TP2} compile.enable activation_checkpoint.selective_ac_option=op", 2),
    (f"{TP2} compile.enable activation_checkpoint.mode=full", 2),
    (f"{TP2} compile.enable activation_checkpoint.mode=memory_budget", 2),
    ("training.enable_cpu_offload", 2),
    ("training.global_batch_size=64 training.local_batch_size=4", 4),
    ("training.global_batch_size=4", 3),
    ("training.dataset=c4_test validation.enable validation.dataset=c4_validation", 1),
    ("checkpoint.enable checkpoint.last_save_in_hf checkpoint.no_last_save_model_only", 2),
    ("checkpoint.enable checkpoint.async_mode=async_with_pinned_mem", 2),
    ("model.attention=eager debug.deterministic", 1),
    ("metrics.enable_tensorboard profiling.enable_profiling", 1),
]


@pytest.mark.parametrize(("options", "world_size"), ALLOWED)
def test_a_combination_that_works_is_not_refused(options: str, world_size: int):
    assert refusals(_facts(options, world_size, {})) == []


def test_a_machine_that_does_not_train_is_not_asked_for_files_or_packages():
    config = load_config(
        [
            "--metrics.enable_wandb",
            "--model.kernels=liger",
            "--checkpoint.enable",
            "--checkpoint.initial_load_path=/no",
        ]
    )
    facts, _ = gather_facts(config, 8, device_type="cuda", is_here=False)
    assert refusals(facts) == []


def test_the_sizes_of_the_rules_are_those_of_the_model():
    config = load_config(["--model.flavor=70B"])
    facts, _ = gather_facts(config, 64, device_type="cuda", is_here=False)
    assert facts.decoder == find_architecture(config.model).config
    assert facts.attention == "flex"
