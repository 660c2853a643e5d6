"""What each suite of `python -m scripts.bench run SUITE` trains: one row, one command line."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One training run whose speed and memory are recorded."""

    name: str
    gpus: int
    config_file: str
    overrides: tuple[str, ...] = ()
    warmup_steps: int = 10
    """Steps left out of the medians: compilation, allocator growth, autotuning."""

    floor_tokens_per_second: float | None = None
    """The run fails where its median tokens/s/GPU is below this."""


def _speed(
    local_batch_size: int, attention: str, dataset: str = "dummy", *, seq_len: int = 8192
) -> tuple[str, ...]:
    return (
        f"--training.dataset={dataset}",
        "--training.steps=25",
        f"--training.local_batch_size={local_batch_size}",
        f"--training.seq_len={seq_len}",
        f"--model.attention={attention}",
        "--compile.enable",
        "--activation_checkpoint.mode=none",
        "--metrics.log_freq=1",
        "--checkpoint.no_enable",
        "--validation.no_enable",
        "--lr_scheduler.warmup_steps=2",
    )


_OPERATIONS_SAVED = (
    "--activation_checkpoint.mode=selective",
    "--activation_checkpoint.selective_ac_option=op",
)


def _llama_8b(
    name: str,
    *options: str,
    gpus: int = 4,
    local_batch_size: int = 2,
    attention: str = "sdpa",
    dataset: str = "dummy",
    floor: float | None = 8500.0,
) -> BenchRow:
    return BenchRow(
        name=name,
        gpus=gpus,
        config_file="train_configs/llama3_8b.toml",
        overrides=(
            *_speed(local_batch_size, attention, dataset),
            "--model.hf_assets_path=",
            *options,
        ),
        floor_tokens_per_second=floor,
    )


def _llama_1b(
    name: str, rows: int, *more: str, attention: str = "sdpa", floor: float | None = None
) -> BenchRow:
    """Return the shape of Llama 1B with a head of its own, on one GPU.

    16 bytes for each of its 1.50 billion parameters, and about 12.3 GiB for each row: 71.6 GiB for
    4 rows (measured), some 96 for 6 and 121 for 8.
    """
    return BenchRow(
        name=f"llama-1b-untied {name}",
        gpus=1,
        config_file="train_configs/llama3_1b.toml",
        overrides=(
            *_speed(rows, attention),
            "--model.hf_assets_path=scripts/bench/llama_1b_untied",
            *more,
        ),
        floor_tokens_per_second=floor,
    )


def _documents(name: str, attention: str, *more: str, seq_len: int = 8192) -> BenchRow:
    """Return a row of real text on one GPU; tokens/s leaves padding out."""
    return BenchRow(
        name=f"llama-1b {name}",
        gpus=1,
        config_file="train_configs/llama3_1b.toml",
        overrides=(*_speed(4, attention, "python_stdlib", seq_len=seq_len), *more),
    )


HALF_PADDED = 6144
"""Length of a row that the standard library's files fill by half, one in each."""


def _chats(name: str, rows: int, seq_len: int, packing: str) -> BenchRow:
    """Return a row of chats on one GPU, 32,768 tokens a step; tokens/s leaves padding out."""
    return BenchRow(
        name=f"llama-1b {name}",
        gpus=1,
        config_file="train_configs/llama3_1b.toml",
        overrides=(
            *_speed(rows, "cudnn", "python_stdlib_chat", seq_len=seq_len),
            "--data.format=chat",
            "--data.chat_template=tulu",
            f"--data.packing={packing}",
        ),
    )


def _long(
    name: str,
    attention: str,
    *degrees: str,
    gpus: int = 2,
    model: str = "1b",
    seq_len: int = 131072,
    steps: int = 4,
) -> BenchRow:
    """Return a model on long rows, which `gpus` share where cp is set."""
    return BenchRow(
        name=f"llama-{model} {seq_len} tokens, {name}",
        gpus=gpus,
        config_file=f"train_configs/llama3_{model}.toml",
        overrides=(
            *_speed(1, attention, seq_len=seq_len),
            "--model.hf_assets_path=",
            f"--training.steps={steps}",
            *_OPERATIONS_SAVED,
            *degrees,
        ),
        warmup_steps=1,
    )


def _shared(degree: int, mode: str) -> tuple[str, str]:
    return (
        f"--parallelism.context_parallel_degree={degree}",
        f"--parallelism.context_parallel_mode={mode}",
    )


def _adapted_8b(name: str, *more: str) -> BenchRow:
    return BenchRow(
        name=f"llama-8b {name}",
        gpus=1,
        config_file="train_configs/llama3_8b.toml",
        overrides=(
            *_speed(4, "sdpa", seq_len=4096),
            "--model.hf_assets_path=",
            "--training.global_batch_size=-1",
            "--adapter.kind=lora",
            *more,
        ),
    )


_LEAST_ACTIVATIONS = (
    "--training.local_batch_size=1",
    "--training.seq_len=512",
    "--activation_checkpoint.mode=full",
)
_FSDP2 = "--parallelism.data_parallel_shard_degree=2"
_FSDP4 = "--parallelism.data_parallel_shard_degree=4"
_COPY_ENGINES = "--parallelism.fsdp_copy_engine"
_KEPT_GATHERED = "--parallelism.fsdp_reshard_after_forward=never"
_FLOAT8 = "--model.converters=float8"
_GATHERED = (
    "--quantize.linear.float8.enable_fsdp_float8_all_gather",
    "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
)
_TP2 = ("--parallelism.data_parallel_shard_degree=1", "--parallelism.tensor_parallel_degree=2")
_ON_2: dict[str, Any] = {"gpus": 2, "local_batch_size": 1, "floor": None}


def _saved(async_mode: str) -> tuple[str, ...]:
    """Return options of one save, which is being written while the steps after it are trained."""
    return (
        "--training.steps=30",
        "--checkpoint.enable",
        f"--checkpoint.async_mode={async_mode}",
        "--checkpoint.interval=20",
        "--checkpoint.keep_latest_k=1",
        "--checkpoint.no_last_save_in_hf",
    )


_PRECOMPUTED = "--objective.reference=precomputed"
_TP2_OF_4 = (
    "--parallelism.data_parallel_shard_degree=2",
    "--parallelism.tensor_parallel_degree=2",
)


def _preference(name: str, *more: str, gpus: int = 1) -> BenchRow:
    return BenchRow(
        name=f"llama-1b DPO, {name}",
        gpus=gpus,
        config_file="train_configs/llama3_1b.toml",
        overrides=(
            *_speed(2, "cudnn", "python_stdlib_preference", seq_len=4096),
            "--objective.name=dpo",
            "--data.format=preference",
            "--data.chat_template=tulu",
            "--data.packing=best_fit",
            "--data.long_document=drop",
            *more,
        ),
    )


SUITES: dict[str, tuple[BenchRow, ...]] = {
    "context-2gpu": (
        _long("FSDP2", "sdpa"),
        _long("CP2 ring", "sdpa", *_shared(2, "ring")),
        _long("CP2 ulysses", "sdpa", *_shared(2, "ulysses")),
        _long("CP2 allgather", "flex", *_shared(2, "allgather")),
    ),
    "context-8b-2gpu": (
        _long("FSDP2", "sdpa", model="8b", seq_len=65536, steps=4),
        _long("CP2 ring", "sdpa", *_shared(2, "ring"), model="8b", seq_len=65536, steps=4),
    ),
    "context-4gpu": (
        _long("FSDP4", "sdpa", gpus=4, model="8b"),
        _long("CP4 ring", "sdpa", *_shared(4, "ring"), gpus=4, model="8b"),
        _long("CP4 ulysses", "sdpa", *_shared(4, "ulysses"), gpus=4, model="8b"),
        _long("CP4 allgather", "flex", *_shared(4, "allgather"), gpus=4, model="8b"),
        _long("CP4 ring", "sdpa", *_shared(4, "ring"), gpus=4, model="8b", seq_len=65536),
    ),
    "dense-1gpu": (
        _llama_1b("1 GPU, sdpa", 4, floor=48000.0),
        _llama_1b("1 GPU, sdpa, 6 rows", 6, floor=48000.0),
        _llama_1b("1 GPU, sdpa, 8 rows", 8, floor=48000.0),
    ),
    "flash-1gpu": (
        _llama_1b("1 GPU, sdpa", 4, floor=48000.0),
        _llama_1b("1 GPU, flash", 4, attention="flash", floor=48000.0),
        _llama_1b("1 GPU, flash, 8 rows", 8, attention="flash", floor=48000.0),
        _llama_1b(
            "1 GPU, flash, 8 rows, kept gathered",
            8,
            _KEPT_GATHERED,
            attention="flash",
            floor=60500.0,
        ),
    ),
    "save-1gpu": (
        _llama_1b("saved while it waits", 4, *_saved("disabled")),
        _llama_1b("saved in the background", 4, *_saved("async")),
        _llama_1b("saved in the background, pinned", 4, *_saved("async_with_pinned_mem")),
    ),
    # Masters, two moments and gradients of 8.03 billion parameters in fp32 are 60 GiB on each of
    # two GPUs. A row of 8,192 tokens takes about 41 GiB more without checkpointing, two rows that
    # share tensor parallelism 50, and logits that are kept 2 each: expected are 103 and 112 GiB.
    "dense-2gpu": (
        _llama_8b("llama-8b FSDP2 on 2 GPUs, sdpa, 1 row", _FSDP2, **_ON_2),
        _llama_8b(
            "llama-8b FSDP2 on 2 GPUs, sdpa, 1 row, copy engines",
            *(_FSDP2, _COPY_ENGINES),
            **_ON_2,
        ),
        _llama_8b("llama-8b TP2 on 2 GPUs, sdpa, 2 rows", *_TP2, gpus=2, floor=None),
        _llama_8b(
            "llama-8b TP2 on 2 GPUs, sdpa, 2 rows, asynchronous",
            *_TP2,
            "--parallelism.enable_async_tensor_parallel",
            gpus=2,
            floor=None,
        ),
        _llama_8b(
            "llama-8b CP2 ring on 2 GPUs, sdpa, a row of 16,384",
            *_shared(2, "ring"),
            "--training.seq_len=16384",
            **_ON_2,
        ),
        _llama_8b(
            "llama-8b FSDP2 on 2 GPUs, cudnn, packed documents",
            _FSDP2,
            attention="cudnn",
            dataset="python_stdlib",
            **_ON_2,
        ),
        _llama_8b(
            "llama-8b FSDP2 on 2 GPUs, cudnn, packed documents, 4 microbatches",
            _FSDP2,
            "--training.global_batch_size=8",
            attention="cudnn",
            dataset="python_stdlib",
            **_ON_2,
        ),
        _llama_8b(
            "llama-8b FSDP2 on 2 GPUs, sdpa, 1 row, copy engines, kept gathered",
            *(_FSDP2, _COPY_ENGINES, _KEPT_GATHERED),
            **_ON_2,
        ),
    ),
    "float8-2gpu": (
        _llama_8b("llama-8b float8 on 2 GPUs, 1 row", _FSDP2, _FLOAT8, **_ON_2),
        _llama_8b(
            "llama-8b float8 gathered on 2 GPUs, 1 row",
            *(_FSDP2, _FLOAT8, *_GATHERED),
            **_ON_2,
        ),
        _llama_8b(
            "llama-8b float8 gathered on 2 GPUs, 1 row, copy engines",
            *(_FSDP2, _FLOAT8, *_GATHERED, _COPY_ENGINES),
            **_ON_2,
        ),
    ),
    "documents-1gpu": (
        _documents("packed documents, cudnn", "cudnn"),
        _documents("packed documents, flex", "flex"),
        _documents("packed documents, varlen", "varlen"),
        _documents("packed rows, cudnn", "cudnn", seq_len=HALF_PADDED),
        _documents("padded rows, cudnn", "cudnn", "--data.packing=none", seq_len=HALF_PADDED),
    ),
    "chats-1gpu": (
        _chats("packed chats, rows of 8192", 4, 8192, "best_fit"),
        _chats("padded chats, rows of 192", 170, 192, "none"),
    ),
    "float8-1gpu": (
        _llama_1b("bf16", 4),
        _llama_1b("float8 tensorwise", 4, _FLOAT8),
        _llama_1b(
            "float8 rowwise",
            4,
            *(_FLOAT8, "--quantize.linear.float8.recipe_name=rowwise"),
        ),
        _llama_1b("bf16, 8-bit state", 4, "--optimizer.name=AdamW8bit"),
    ),
    "lora-1gpu": (
        _adapted_8b("LoRA"),
        _adapted_8b("LoRA, selective op", *_OPERATIONS_SAVED),
        _adapted_8b("QLoRA, selective op", *_OPERATIONS_SAVED, "--model.converters=nf4"),
        _adapted_8b("LoRA, 1 row of 512, full", *_LEAST_ACTIVATIONS),
        _adapted_8b("QLoRA, 1 row of 512, full", *_LEAST_ACTIVATIONS, "--model.converters=nf4"),
    ),
    "preference-1gpu": (
        _preference("reference online"),
        _preference("reference precomputed", _PRECOMPUTED),
    ),
    "preference-4gpu": (
        _preference("FSDP2 x TP2, reference online", *_TP2_OF_4, gpus=4),
        _preference("FSDP2 x TP2, reference precomputed", *_TP2_OF_4, _PRECOMPUTED, gpus=4),
    ),
    "kernels-1gpu": (
        _llama_1b("compiled", 2),
        _llama_1b("eager", 2, "--compile.no_enable"),
        _llama_1b("eager, liger", 2, "--compile.no_enable", "--model.kernels=liger"),
        _llama_1b("eager, loss compiled", 2, "--compile.components=loss"),
    ),
    # Masters, moments and gradients are 30 GiB on each of four GPUs, a row of 8,192 tokens some 39;
    # parameters that are kept gathered should take 11 more.
    "dense-4gpu": (
        _llama_8b("llama-8b FSDP4, sdpa", _FSDP4),
        _llama_8b(
            "llama-8b HSDP 2x2, sdpa",
            "--parallelism.data_parallel_replicate_degree=2",
            _FSDP2,
            local_batch_size=1,
        ),
        _llama_8b("llama-8b TP2 x FSDP2, sdpa", *_TP2_OF_4),
        _llama_8b(
            "llama-8b FSDP4, cudnn, packed documents",
            _FSDP4,
            attention="cudnn",
            dataset="python_stdlib",
            floor=None,
        ),
        _llama_8b("llama-8b FSDP4, sdpa, copy engines", _FSDP4, _COPY_ENGINES),
        _llama_8b("llama-8b FSDP4, sdpa, kept gathered", _FSDP4, _KEPT_GATHERED),
        _llama_8b("llama-8b FSDP4, flash, copy engines", _FSDP4, _COPY_ENGINES, attention="flash"),
        _llama_8b("llama-8b TP2 x FSDP2, sdpa, 4 rows", *_TP2_OF_4, local_batch_size=4),
        _llama_8b(
            "llama-8b CP2 ring x FSDP2, sdpa, a row of 16,384",
            *(_FSDP2, *_shared(2, "ring"), "--training.seq_len=16384"),
            local_batch_size=1,
            floor=None,
        ),
    ),
    "float8-4gpu": (
        _llama_8b("llama-8b float8 gathered, FSDP4", _FSDP4, _FLOAT8, *_GATHERED),
        _llama_8b(
            "llama-8b float8 gathered, FSDP4, kept gathered",
            *(_FSDP4, _FLOAT8, *_GATHERED, _KEPT_GATHERED),
        ),
        _llama_8b(
            "llama-8b float8 gathered, FSDP4, copy engines",
            *(_FSDP4, _FLOAT8, *_GATHERED, _COPY_ENGINES),
        ),
    ),
}
