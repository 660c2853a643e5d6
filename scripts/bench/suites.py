"""What each suite of `python -m scripts.bench run SUITE` trains: one row, one command line."""

from dataclasses import dataclass


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


def _speed(local_batch_size: int, attention: str, dataset: str = "dummy") -> tuple[str, ...]:
    return (
        f"--training.dataset={dataset}",
        "--training.steps=25",
        f"--training.local_batch_size={local_batch_size}",
        "--training.seq_len=8192",
        f"--model.attention={attention}",
        "--compile.enable",
        "--activation_checkpoint.mode=none",
        "--metrics.log_freq=1",
        "--checkpoint.no_enable",
        "--validation.no_enable",
        "--lr_scheduler.warmup_steps=2",
    )


def _llama_8b(
    name: str,
    *degrees: str,
    local_batch_size: int = 2,
    attention: str = "sdpa",
    dataset: str = "dummy",
    floor: float | None = 8500.0,
) -> BenchRow:
    return BenchRow(
        name=name,
        gpus=4,
        config_file="train_configs/llama3_8b.toml",
        overrides=(
            *_speed(local_batch_size, attention, dataset),
            "--model.hf_assets_path=",
            *degrees,
        ),
        floor_tokens_per_second=floor,
    )


_LLAMA_1B = BenchRow(
    name="llama-1b-untied 1 GPU, sdpa",
    gpus=1,
    config_file="train_configs/llama3_1b.toml",
    overrides=(
        *_speed(4, "sdpa"),
        "--model.hf_assets_path=scripts/bench/llama_1b_untied",
    ),
    floor_tokens_per_second=48000.0,
)

SUITES: dict[str, tuple[BenchRow, ...]] = {
    "dense-1gpu": (_LLAMA_1B,),
    "dense-4gpu": (
        _llama_8b("llama-8b FSDP4, sdpa", "--parallelism.data_parallel_shard_degree=4"),
        _llama_8b(
            "llama-8b HSDP 2x2, sdpa",
            "--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=2",
            local_batch_size=1,
        ),
        _llama_8b(
            "llama-8b TP2 x FSDP2, sdpa",
            "--parallelism.tensor_parallel_degree=2",
            "--parallelism.data_parallel_shard_degree=2",
        ),
        _llama_8b(
            "llama-8b FSDP4, flex, packed documents",
            "--parallelism.data_parallel_shard_degree=4",
            attention="flex",
            dataset="python_stdlib",
            floor=None,
        ),
    ),
}
