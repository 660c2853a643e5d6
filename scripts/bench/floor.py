"""How fast a row could be: its matrix products and its attention alone, timed at their shapes.

Every product of forward, input gradient and weight gradient, the head's included, and the
attention kernel of one rank's microbatch run on random data: no norm, no collective, no optimizer.
The floor is the time of all of them one after the other, over and over until the GPU's clock is
what its power limit allows, as in training; the time of each alone, on a GPU that rests between,
is told beside it. Attention is causal over whole rows, also where a row holds documents, whose
cost is less. Under context parallelism it is that of whole rows with as many heads as come to a
rank. What activation checkpointing computes again is left out.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.cli import load_config
from engine.config import JobConfig
from engine.metrics import peak_flops
from engine.objectives import WITH_REFERENCE
from engine.rules import gather_facts
from models.attention import AttentionCore, AttentionMasks
from models.decoder_config import SLIDING, DecoderConfig
from models.flops import train_flops_per_token
from parallelisms.mesh import ParallelDims
from scripts.bench.clocks import sampled
from scripts.bench.kernels import milliseconds
from scripts.bench.suites import BenchRow

Kernels = Callable[[], object]
"""Runs one part of a step, such as a product."""

Timer = Callable[[Kernels], float]
"""Returns the milliseconds of a part alone."""

StepTimer = Callable[[Sequence[tuple[Kernels, int]]], float]
"""Returns the milliseconds of parts one after the other, each as often as is said."""

SECONDS_TO_WARM, SECONDS_TIMED = 3.0, 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A linear layer on one rank: so many tokens, from so many channels to so many."""

    name: str
    tokens: int
    inputs: int
    outputs: int
    count: int
    is_float8: bool = False

    @property
    def flops(self) -> int:
        """Operations of forward and both gradients, of all `count` of them."""
        return 3 * 2 * self.tokens * self.inputs * self.outputs * self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Attention of blocks of one type on one rank."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    window: int | None
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one rank computes in one microbatch."""

    config: JobConfig
    sizes: DecoderConfig
    backend: str
    tokens_per_gpu: float
    """Tokens of the microbatch over the ranks that share it."""

    products: tuple[Product, ...]
    attentions: tuple[Attention, ...]


def work_of(row: BenchRow) -> Work:
    """Return what one rank of a row computes; ValueError where that is not our whole decoder,
    trained."""
    config = load_config([f"--job.config_file={row.config_file}", *row.overrides])
    facts, mistakes = gather_facts(config, row.gpus)
    sizes = facts.decoder
    if not isinstance(sizes, DecoderConfig):
        mistakes = mistakes or ["its model is wrapped"]
    elif facts.freezes_weights or config.objective.name in WITH_REFERENCE:
        mistakes = ["a step of it is not forward and both gradients of each layer"]
    if mistakes or not isinstance(sizes, DecoderConfig):
        raise ValueError(
            f"row {row.name!r} has no floor: {'; '.join(mistakes)}; "
            "name rows that train all of a model of our families, without a reference"
        )
    dims = ParallelDims.of(config.parallelism, row.gpus)
    rows = config.training.dealing(dims.batch_degree).rows_per_microbatch
    seq_len = config.training.seq_len
    kinds = Counter(sizes.sliding_window if k == SLIDING else None for k in sizes.attention_types)
    split = dims.tp * dims.cp
    return Work(
        config=config,
        sizes=sizes,
        backend=facts.attention,
        tokens_per_gpu=rows * seq_len / split,
        products=tuple(
            products(
                sizes,
                rows * seq_len // dims.cp,
                dims.tp,
                is_float8=any("float8" in name for name in config.model.converters),
            )
        ),
        attentions=tuple(
            Attention(
                rows=rows,
                tokens=seq_len,
                heads=sizes.num_heads // split,
                kv_heads=max(sizes.num_kv_heads // split, 1),
                window=window,
                count=count,
            )
            for window, count in kinds.items()
        ),
    )


def products(
    sizes: DecoderConfig, tokens: int, tensor_parallel: int, *, is_float8: bool = False
) -> Iterator[Product]:
    """Yield the linear layers of a decoder as one tensor-parallel rank computes them."""
    width, layers = sizes.hidden_size, sizes.num_layers
    queries = sizes.num_heads * sizes.head_dim // tensor_parallel
    keys = sizes.num_kv_heads * sizes.head_dim // tensor_parallel
    hidden, vocabulary = (n // tensor_parallel for n in (sizes.intermediate_size, sizes.vocab_size))
    for name, inputs, outputs, count in (
        ("q", width, queries, layers),
        ("k, v", width, keys, 2 * layers),
        ("o", queries, width, layers),
        ("gate, up", width, hidden, 2 * layers),
        ("down", hidden, width, layers),
        ("head", width, vocabulary, 1),
    ):
        yield Product(
            name=name,
            tokens=tokens,
            inputs=inputs,
            outputs=outputs,
            count=count,
            is_float8=is_float8 and name != "head",
        )


def _random(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def product_works(product: Product, device: str) -> list[Kernels]:
    """Return forward, input gradient and weight gradient of one of the layers."""
    shapes = (
        (product.tokens, product.inputs),
        (product.outputs, product.inputs),
        (product.tokens, product.outputs),
    )
    x_TI, weight_OI, grad_TO = (_random(*shape, device=device) for shape in shapes)
    pairs = ((x_TI, weight_OI.t()), (grad_TO, weight_OI), (grad_TO.t(), x_TI))
    multiply = _float8_product if product.is_float8 else _bfloat16_product
    return [multiply(left, right) for left, right in pairs]


def _bfloat16_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    return lambda: left @ right


def _float8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """Return a tensorwise-scaled product; rows of the left and columns of the right adjoin."""
    scale = torch.ones((), device=left.device)
    left8 = left.contiguous().to(torch.float8_e4m3fn)
    right8 = right.t().contiguous().to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(
        left8, right8, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def attention_works(work: Work, attention: Attention, device: str) -> tuple[Kernels, Kernels]:
    """Return forward and backward of one block."""
    sizes = work.sizes
    positions_BT = torch.arange(attention.tokens, device=device).expand(attention.rows, -1)
    masks = AttentionMasks(
        work.backend,
        head_dim=sizes.head_dim,
        window=attention.window,
        has_softcap=sizes.attention_softcap is not None,
    )
    mask = masks(positions_BT.contiguous())
    core = AttentionCore(
        work.backend,
        query_pre_attn_scalar=sizes.query_pre_attn_scalar,
        softcap=sizes.attention_softcap,
    )

    def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        return core(q_BTHC, k_BTKC, v_BTKC, mask=mask)

    if device == "cuda":  # as in a compiled block: flex is a kernel only there
        attend = torch.compile(attend, fullgraph=True)
    shape = (attention.rows, attention.tokens)
    heads = (attention.heads, attention.kv_heads, attention.kv_heads)
    leaves = [_random(*shape, h, sizes.head_dim, device=device).requires_grad_() for h in heads]
    result = attend(*leaves)
    grad = torch.randn_like(result)
    return (
        lambda: attend(*leaves),
        lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True),
    )


def sustained_milliseconds(works: Sequence[tuple[Kernels, int]]) -> float:
    """Be a `StepTimer` that waits until the GPU has warmed to the parts."""

    def step() -> float:
        started = time.perf_counter()
        for work, count in works:
            for _ in range(count):
                work()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started)

    warm = time.perf_counter() + SECONDS_TO_WARM
    while time.perf_counter() < warm:
        step()
    times = [step()]
    while time.perf_counter() < warm + SECONDS_TIMED:
        times.append(step())
    return statistics.median(times)


def floor_of(
    row: BenchRow,
    *,
    device: str = "cuda",
    device_name: str = "",
    timer: Timer = milliseconds,
    sustain: StepTimer = sustained_milliseconds,
) -> dict[str, Any]:
    """Return the floor of a row: its parts in milliseconds, tokens/s/GPU and MFU."""
    work = work_of(row)
    parts: dict[str, float] = {}
    works: list[tuple[Kernels, int]] = []
    for name, some, count in _all_works(work, device):
        parts[name] = parts.get(name, 0.0) + count * sum(timer(one) for one in some)
        works += [(one, count) for one in some]
    with sampled() as clocks:
        together = sustain(works)
    speed = work.tokens_per_gpu / together * 1e3
    linear = sum(product.flops for product in work.products)
    attention = parts["attention forward"] + parts["attention backward"]
    all_alone = sum(parts.values())
    peak = peak_flops(device_name)
    flops = train_flops_per_token(work.sizes, work.config.training.seq_len)
    return {
        "row": row.name,
        "gpus": row.gpus,
        "arithmetic": "float8 layers" if work.products[0].is_float8 else "bfloat16",
        "attention": f"{work.backend}, causal over rows of {work.config.training.seq_len} tokens",
        "ms_alone": {name: round(ms, 3) for name, ms in (*parts.items(), ("all", all_alone))},
        "products_tflops_alone": round(linear / (all_alone - attention) / 1e9, 1),
        "ms_together": round(together, 3),
        "clocks": clocks,
        "floor_tokens_per_second_per_gpu": round(speed, 1),
        "floor_mfu": None if peak is None else flops * speed / peak,
    }


def _all_works(work: Work, device: str) -> Iterator[tuple[str, Sequence[Kernels], int]]:
    """Yield the parts of a step with what each runs, and how often."""
    for product in work.products:
        yield product.name, product_works(product, device), product.count
    for attention in work.attentions:
        forward, backward = attention_works(work, attention, device)
        yield "attention forward", (forward,), attention.count
        yield "attention backward", (backward,), attention.count


def against_record(floor: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the floor with a record's speed and traced kernels of the same row beside it."""
    trained = [r for r in rows if r["row"] == floor["row"] and "tokens_per_second_per_gpu" in r]
    if not trained:
        return floor
    speed = trained[0]["tokens_per_second_per_gpu"]
    return {
        **floor,
        "tokens_per_second_per_gpu": speed,
        "of_floor": round(speed / floor["floor_tokens_per_second_per_gpu"], 4),
        "traced_ms_by_kind": trained[0].get("traced_step", {}).get("ms_by_kind", {}),
    }
