"""What cannot be combined: one table of rules, each with its reason and remedy.

A section checks its own values in `__post_init__`; a rule here looks at several keys, at the number
of ranks, at the sizes of the model or at the device. All run before any model is built.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine import titan
from engine.adapter_rules import ADAPTER_RULES
from engine.checkpoint_rules import CHECKPOINT_RULES
from engine.data.config import DATASETS_FROM_FILES
from engine.layout_rules import BUDGET_RULES, CONTEXT_RULES, LAYOUT_RULES
from engine.low_precision import LOW_PRECISION_RULES
from engine.model_rules import MODEL_RULES
from engine.name_rules import NAME_RULES
from engine.preference_rules import PREFERENCE_RULES
from engine.rules import Facts, Rule, gather_facts
from engine.schema import raise_mistakes
from engine.step import TrainingConfig
from models.sizes import ModelSizes
from parallelisms.mesh import ParallelDims

if TYPE_CHECKING:
    from engine.config import JobConfig

DEVICE_RULES = (
    Rule(
        id="cuda_without_enough_gpus",
        keys=("job.device",),
        applies=lambda f: (
            f.is_here and f.config.job.device == "cuda" and f.num_gpus < f.num_local_ranks
        ),
        reason="this machine has {f.num_gpus} usable GPUs for {f.num_local_ranks} ranks",
        remedy="start fewer ranks, or set job.device = 'auto' or 'cpu'",
    ),
    Rule(
        id="attention_backend_that_cannot_run_on_the_device",
        keys=("model.attention", "model.flavor"),
        applies=lambda f: f.attention_refusal is not None,
        reason="{f.attention!r} cannot run on {f.device_type} here: {f.attention_refusal}",
        remedy="set model.attention = 'auto'",
    ),
    Rule(
        id="memory_snapshot_without_cuda",
        keys=("profiling.enable_memory_snapshot",),
        applies=lambda f: (
            f.config.profiling.enable_memory_snapshot and f.device_type != "cuda" and f.trains
        ),
        reason="a snapshot is the history of CUDA allocations, and this run is on the CPU",
        remedy="set it to false, or train on a GPU",
    ),
    Rule(
        id="copy_engines_without_cuda",
        keys=("parallelism.fsdp_copy_engine",),
        applies=lambda f: (
            f.config.parallelism.fsdp_copy_engine and f.fsdp_degree > 1 and f.device_type != "cuda"
        ),
        reason="copy engines are parts of GPUs",
        remedy="set it to false, or train on GPUs",
    ),
    # Delete when torch's NCCL backend of symmetric memory allocates for a group by name
    # (NCCLSymmetricMemoryAllocator::alloc), as the compiler's fused operations ask for.
    Rule(
        id="copy_engines_with_async_tensor_parallelism",
        keys=("parallelism.fsdp_copy_engine", "parallelism.enable_async_tensor_parallel"),
        applies=lambda f: (
            f.config.parallelism.fsdp_copy_engine
            and f.config.parallelism.enable_async_tensor_parallel
            and f.fsdp_degree > 1
            and f.tp > 1
        ),
        reason=(
            "symmetric memory has one backend in a process: copy engines need NCCL's, in which "
            "the fused operations of asynchronous tensor parallelism cannot allocate"
        ),
        remedy="set one of them to false",
    ),
    Rule(
        id="async_tensor_parallelism_without_cuda",
        keys=("parallelism.enable_async_tensor_parallel",),
        applies=lambda f: (
            f.config.parallelism.enable_async_tensor_parallel
            and f.tp > 1
            and f.device_type != "cuda"
        ),
        reason="it overlaps collectives with matrix multiplications on GPUs only",
        remedy="set it to false, or train on GPUs",
    ),
)

COMPILE_RULES = (
    Rule(
        id="async_tensor_parallelism_without_compile",
        keys=("parallelism.enable_async_tensor_parallel", "compile.enable", "compile.components"),
        applies=lambda f: (
            f.config.parallelism.enable_async_tensor_parallel and f.tp > 1 and not f.compiles_model
        ),
        reason="the compiler is what interleaves collectives with matrix multiplications",
        remedy="set compile.enable = true with 'model' among compile.components, or switch it off",
    ),
    Rule(
        id="async_tensor_parallelism_without_inductor",
        keys=("parallelism.enable_async_tensor_parallel", "compile.backend"),
        applies=lambda f: (
            f.config.parallelism.enable_async_tensor_parallel
            and f.tp > 1
            and f.compiles_model
            and f.config.compile.backend != "inductor"
        ),
        reason="inductor is the backend that fuses collectives with matrix multiplications",
        remedy="set compile.backend = 'inductor', or switch it off",
    ),
    Rule(
        id="async_tensor_parallelism_without_sequence_parallelism",
        keys=("parallelism.enable_async_tensor_parallel", "parallelism.sequence_parallel"),
        applies=lambda f: (
            f.config.parallelism.enable_async_tensor_parallel
            and f.tp > 1
            and not f.config.parallelism.sequence_parallel
        ),
        reason="it overlaps the gathers and scatters of tokens, which there are none of",
        remedy="set parallelism.sequence_parallel = true, or switch it off",
    ),
    Rule(
        id="memory_budget_without_compile",
        keys=("activation_checkpoint.mode", "compile.enable", "compile.components"),
        applies=lambda f: (
            f.config.activation_checkpoint.mode == "memory_budget"
            and f.trains
            and not f.compiles_model
        ),
        reason="the compiler is what decides which activations the budget keeps",
        remedy="set compile.enable = true with 'model' among compile.components, or mode = 'full'",
    ),
    Rule(
        id="selective_checkpointing_of_no_block",
        keys=("activation_checkpoint.selective_ac_option",),
        applies=lambda f: f.decoder is not None and (f.selective_every or 0) > f.decoder.num_layers,
        reason="the model has {f.decoder.num_layers} blocks, so none would be checkpointed",
        remedy="use a smaller number, or activation_checkpoint.mode = 'none'",
    ),
    Rule(
        id="compile_on_the_cpu_without_a_compiler",
        keys=("compile.enable", "compile.backend"),
        applies=lambda f: f.uses_inductor("cpu") and "a C++ compiler" in f.missing,
        reason="inductor needs a C++ compiler on the CPU, and neither c++, g++ nor clang++ is here",
        remedy="install one, or set compile.enable = false",
    ),
    Rule(
        id="compile_on_the_gpu_without_triton",
        keys=("compile.enable", "compile.backend"),
        applies=lambda f: f.uses_inductor("cuda") and "triton" in f.missing,
        reason="inductor needs the package triton on GPUs, and it is not installed",
        remedy="pip install triton, or set compile.enable = false",
    ),
)

KERNEL_RULES = (
    Rule(
        id="liger_kernels_on_the_cpu",
        keys=("model.kernels",),
        applies=lambda f: f.asks_for_liger and f.device_type != "cuda",
        reason="Liger's kernels run on GPUs only, and this run is on the CPU",
        remedy="set model.kernels = 'auto', or train on a GPU",
    ),
    Rule(
        id="liger_kernels_without_their_package",
        keys=("model.kernels",),
        applies=lambda f: (
            f.is_here
            and f.asks_for_liger
            and f.device_type == "cuda"
            and bool(f.missing & {"liger_kernel", "triton"})
        ),
        reason="the package liger-kernel is not installed, or triton, which it needs",
        remedy="pip install liger-kernel, or set model.kernels = 'auto'",
    ),
    Rule(
        id="liger_kernels_with_compile",
        keys=("model.kernels", "compile.enable"),
        applies=lambda f: f.asks_for_liger and f.config.compile.enable,
        reason="the compiler fuses these operations with their neighbours, which Liger's prevent",
        remedy="set model.kernels = 'torch', or compile.enable = false",
    ),
    Rule(
        id="liger_kernels_with_tensor_parallelism",
        keys=("model.kernels", "parallelism.tensor_parallel_degree"),
        applies=lambda f: f.asks_for_liger and f.tp > 1,
        reason="norms are given distributed tokens then, which Liger's gather and return whole",
        remedy="set model.kernels = 'torch', or tensor_parallel_degree = 1",
    ),
)

PRECISION_RULES = (
    Rule(
        id="compute_wider_than_the_stored_parameters",
        keys=("training.mixed_precision_param", "training.dtype"),
        applies=lambda f: (
            f.config.training.mixed_precision_param == "float32"
            and f.config.training.dtype == "bfloat16"
        ),
        reason="parameters stored in bfloat16 gain nothing from being computed with in float32",
        remedy="set training.dtype = 'float32', or mixed_precision_param = 'bfloat16'",
    ),
    Rule(
        id="gradients_summed_in_less_than_they_are_computed_in",
        keys=("training.mixed_precision_reduce", "training.mixed_precision_param"),
        applies=lambda f: (
            f.config.training.mixed_precision_reduce == "bfloat16"
            and f.config.training.mixed_precision_param == "float32"
        ),
        reason="gradients computed in float32 would be rounded before they are summed over ranks",
        remedy="set training.mixed_precision_reduce = 'float32'",
    ),
)

DATA_RULES = (
    Rule(
        id="training_files_without_a_path",
        keys=("training.dataset", "training.dataset_path"),
        applies=lambda f: (
            f.trains
            and f.config.training.dataset in DATASETS_FROM_FILES
            and not f.config.training.dataset_path
        ),
        reason="this source reads files, and none is named",
        remedy="give a file or folder as training.dataset_path",
    ),
    Rule(
        id="validation_files_without_a_path",
        keys=("validation.dataset", "validation.dataset_path"),
        applies=lambda f: (
            f.validates
            and f.config.validation.dataset in DATASETS_FROM_FILES
            and not f.config.validation.dataset_path
        ),
        reason="this source reads files, and none is named",
        remedy="give a file or folder as validation.dataset_path, or another source",
    ),
    Rule(
        id="dataset_beside_sources",
        keys=("training.dataset", "training.dataset_path"),
        applies=lambda f: (
            bool(f.config.data.sources)
            and (
                f.config.training.dataset != TrainingConfig().dataset
                or f.config.training.dataset_path is not None
            )
        ),
        reason="data.sources names all that is read",
        remedy="make it one of the sources, or leave it out",
    ),
    Rule(
        id="streaming_of_random_tokens",
        keys=("data.streaming", "training.dataset"),
        applies=lambda f: (
            f.trains and f.config.data.streaming and f.config.training.dataset == "dummy"
        ),
        reason="random tokens are made when they are needed and come from no source",
        remedy="set data.streaming = false",
    ),
    Rule(
        id="streaming_by_several_workers",
        keys=("data.streaming", "training.dataloader.num_workers"),
        applies=lambda f: (
            f.trains and f.config.data.streaming and f.config.training.dataloader.num_workers > 1
        ),
        reason="each worker would read the whole stream and tokenise all rows of its rank",
        remedy="set num_workers to 1, or data.streaming = false to read prepared rows with several",
    ),
    Rule(
        id="stride_longer_than_a_row",
        keys=("data.stride",),
        applies=lambda f: f.config.data.stride > f.shortest_row,
        reason="rows have {f.shortest_row} tokens, so text between two would be passed over",
        remedy="set data.stride = 0, or to at most the length of a row",
    ),
    Rule(
        id="tokenizer_folder_that_does_not_exist",
        keys=("model.tokenizer_path",),
        applies=lambda f: (
            f.is_here and bool(path := f.config.model.tokenizer_path) and not Path(path).is_dir()
        ),
        reason="there is no such folder",
        remedy="give a folder with tokenizer.json, or leave it out to use model.hf_assets_path",
    ),
    Rule(
        id="tokenizer_larger_than_the_vocabulary",
        keys=("model.hf_assets_path", "model.tokenizer_path", "model.flavor"),
        applies=lambda f: (
            f.decoder is not None and (f.tokenizer_vocab_size or 0) > f.decoder.vocab_size
        ),
        reason=(
            "the tokenizer has {f.tokenizer_vocab_size} tokens, but the model's vocabulary "
            "{f.decoder.vocab_size}"
        ),
        remedy="use the tokenizer that belongs to the model, or a model with a larger vocabulary",
    ),
)

EXTRAS_RULES = (
    Rule(
        id="wandb_without_its_package",
        keys=("metrics.enable_wandb",),
        applies=lambda f: f.is_here and f.config.metrics.enable_wandb and "wandb" in f.missing,
        reason="the package wandb is not installed",
        remedy="pip install wandb, or set it to false: metrics.jsonl is always written",
    ),
)


RULES: Sequence[Rule] = (
    *LAYOUT_RULES,
    *BUDGET_RULES,
    *CONTEXT_RULES,
    *MODEL_RULES,
    *ADAPTER_RULES,
    *DEVICE_RULES,
    *COMPILE_RULES,
    *KERNEL_RULES,
    *PRECISION_RULES,
    *NAME_RULES,
    *DATA_RULES,
    *PREFERENCE_RULES,
    *CHECKPOINT_RULES,
    *EXTRAS_RULES,
    *LOW_PRECISION_RULES,
    *titan.RULES,
)
"""The table."""


def refusals(facts: Facts) -> list[str]:
    """Return the message of every rule that applies."""
    return [rule.message(facts) for rule in RULES if rule.applies(facts)]


def check_data(config: "JobConfig") -> None:
    """Raise ValueError for what is refused of the data, whatever the ranks and the device."""
    facts, _ = gather_facts(config, world_size=1)
    rules = (*DATA_RULES, *BUDGET_RULES)
    raise_mistakes([rule.message(facts) for rule in rules if rule.applies(facts)])


def check_combinations(
    config: "JobConfig", dims: ParallelDims, decoder: ModelSizes, tokenizer_vocab_size: int
) -> None:
    """Look again once the run knows its ranks, its device and its tokenizer; raise ValueError."""
    facts, problems = gather_facts(config, dims.world_size, device_type=dims.device_type)
    facts = replace(
        facts,
        decoder=decoder,
        attention=decoder.attention,
        tokenizer_vocab_size=tokenizer_vocab_size,
    )
    raise_mistakes(problems + refusals(facts))
