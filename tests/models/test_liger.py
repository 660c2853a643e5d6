"""Liger's kernels keep the contracts of our layers, in value and gradient.

On the CPU a stand-in that writes over its arguments as they do proves what lies around them; on a
GPU they are compared with torch.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model import ModelConfig, ModelNeeds, resolve_architecture
from engine.verify.case import Case
from engine.verify.parity import BF16_ARITHMETIC, FP32_REORDERED_SUM, Comparison
from engine.verify.ranks import PlanJob, Row, run_here
from engine.verify.report import tolerance
from engine.verify.subject import SMALL
from models.layers import head, liger, norm, rope
from tests.models.liger_stand_in import stand_in
from tests.models.tiny import gradients, random_tokens, tiny_model, worst_error
from tests.parity.cases import run_case
from tests.ranks import RankPool

FP32 = 1e-5  # another order of the same fp32 operations
BF16 = 2e-2  # results are rounded to eight bits, some of them twice
TOLERANCES = {torch.float32: FP32, torch.bfloat16: BF16}

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def value_and_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Run forward and backward on copies; neither arguments nor what comes in may be changed."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [
        random(*out.shape, dtype=out.dtype, device=out.device.type, seed=number)
        for number, out in enumerate(results)
    ]
    given = [x.clone() for x in upstream]
    found = torch.autograd.grad(results, leaves, given)
    assert all(torch.equal(a, b) for a, b in zip(upstream, given, strict=True))
    return [x.detach() for x in (*results, *found)]


def check(ours: Function, theirs: Function, inputs: list[Tensor]) -> None:
    """Compare value and every gradient, each relative to its largest entry."""
    expected, found = (value_and_gradients(one, inputs) for one in (ours, theirs))
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        error = float((a.float() - b.float()).abs().max() / b.float().abs().max())
        assert error <= TOLERANCES[inputs[0].dtype], (number, error)


def check_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    inputs = [
        random(*shape, dtype=dtype, device=device),
        random(shape[-1], dtype=dtype, device=device),
    ]
    check(
        lambda x, weight: F.rms_norm(x, (shape[-1],), weight, 1e-5),
        lambda x, weight: liger.rms_norm(x, weight, 1e-5),
        inputs,
    )
    torch_norm, liger_norm = (
        norm.RMSNorm(shape[-1], eps=1e-5, zero_centered=True, kernels=kernels)
        for kernels in ("torch", "liger")
    )
    check(
        lambda x, weight: torch.func.functional_call(torch_norm, {"weight": weight}, x),
        lambda x, weight: torch.func.functional_call(liger_norm, {"weight": weight}, x),
        inputs,
    )


def check_silu_mul(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    inputs = [random(*shape, dtype=dtype, device=device, seed=number) for number in range(2)]
    check(lambda gate, up: F.silu(gate) * up, liger.silu_mul, inputs)
    check(lambda gate, up: F.gelu(gate, approximate="tanh") * up, liger.gelu_mul, inputs)


def check_rotate(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    rows, tokens = 2, 67
    positions = torch.stack((torch.arange(tokens), 100_000 - torch.arange(tokens)))
    config = rope.RopeConfig(theta=500_000.0)
    rotary = rope.RotaryEmbedding(config, head_dim)(positions.to(device))
    inputs = [
        random(rows, tokens, heads, head_dim, dtype=dtype, device=device)
        for heads in (num_heads, num_kv_heads)
    ]
    check(
        lambda q, k: rope.rotate_both(q, k, rotary, kernels="torch"),
        lambda q, k: rope.rotate_both(q, k, rotary, kernels="liger"),
        inputs,
    )


def check_label_logps(
    tokens: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    softcap: float | None = None,
) -> None:
    """Compare each token's value and gradient alone, since each has a weight of its own."""
    logits = random(tokens, vocab_size, dtype=dtype, device=device) * 3
    labels = torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    labels[: tokens // 8] = labels[-1] = -100
    labels = labels.to(device)
    weights = random(tokens, dtype=torch.float32, device=device).exp()
    weights[tokens // 2 :: 3] = 0.0
    found: list[list[Tensor]] = []
    for function in (head.label_logps, liger.label_logps):
        leaf = logits.clone().requires_grad_()
        logps = function(leaf.view_as(leaf), labels, softcap=softcap)
        assert logps.dtype == torch.float32
        found.append([logps.detach(), *torch.autograd.grad(logps, leaf, weights)])
    (expected, expected_grad), (logps, grad) = found
    # bf16 logits are the same numbers on both sides, so that all but gradients is fp32 arithmetic.
    assert ((logps - expected).abs() <= FP32 * expected.abs()).all()
    assert not logps[labels == -100].any()
    assert grad.dtype == dtype
    error = (grad.float() - expected_grad.float()).abs().amax(1)
    assert (error <= TOLERANCES[dtype] * expected_grad.float().abs().amax(1)).all()


DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@DTYPES
def test_each_function_hands_over_what_liger_takes(dtype: torch.dtype) -> None:
    with stand_in():
        check_rms_norm((2, 5, 48), dtype, "cpu")
        check_silu_mul((2, 5, 48), dtype, "cpu")
        check_rotate(4, 2, 8, dtype, "cpu")
        check_label_logps(40, 61, dtype, "cpu")
        check_label_logps(40, 61, dtype, "cpu", softcap=3.0)


def test_a_second_backward_through_the_scores_is_refused() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    with stand_in():
        total = liger.label_logps(logits * 1.0, torch.tensor([0, -100, 6, 3])).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("chunk_tokens", [7, 4096])
def test_a_model_computes_the_same_with_the_stand_in(chunk_tokens: int, recompute: bool) -> None:
    tokens, labels = random_tokens(2, 13), random_tokens(2, 13, seed=1)
    labels[0, :5] = -100
    positions = torch.arange(13).expand(2, -1)
    weights = torch.rand(2, 13, generator=torch.Generator().manual_seed(2))
    sizes: dict[str, Any] = {"head_chunk_tokens": chunk_tokens}
    if not recompute:
        sizes |= {"logit_softcap": 2.0, "activation": "gelu_pytorch_tanh"}
        sizes |= {"zero_centered_norm": True, "norms": "both"}
    found = []
    for kernels in ("torch", "liger"):
        model = tiny_model(kernels=kernels, spread=1.0, **sizes)
        model.lm_head.recompute_logits = recompute
        with stand_in():
            logps = model(tokens, positions_BT=positions, labels_BT=labels)
            (logps * weights).sum().backward()
            with torch.no_grad():
                logits = model(tokens, positions_BT=positions)
                scored = model(tokens, positions_BT=positions, labels_BT=labels)
        assert torch.equal(scored, logps)
        found.append((logps.detach(), logits, gradients(model)))
    (logps, logits, expected), (logps_liger, logits_liger, grads) = found
    assert torch.allclose(logps_liger, logps, rtol=FP32)
    assert torch.allclose(logits_liger, logits, atol=FP32)
    assert worst_error(grads, expected) <= FP32


LIGER: dict[str, Any] = {"kernels": "liger"}
PLANS = [
    Case(**LIGER, chunks=True, accumulate=2),
    Case(**LIGER, checkpointing="full", bias=True),
    Case(**LIGER, checkpointing="op", tied=True),
    Case(**LIGER, bfloat16=True, checkpointing="op", chunks=True),
    Case(**LIGER, shard=2, checkpointing="2", vocab=61, offload=True),
    Case(**LIGER, replicate=2, reshard="never", checkpointing="op", packed=False),
    Case(**LIGER, cp=2, context="ring", checkpointing="op"),
    Case(**LIGER, cp=2, context="ulysses", chunks=True),
]


_clone = Tensor.clone


def _without_copies_for_liger(x: Tensor, *, memory_format: Any = torch.preserve_format) -> Tensor:
    is_for_liger = memory_format is torch.contiguous_format
    return x if is_for_liger else _clone(x, memory_format=memory_format)


def run_with_stand_in(rank: int, world_size: int, case: Case, with_copies: bool) -> Comparison:
    with stand_in():
        if with_copies:
            return run_case(rank, world_size, case)
        with patch.object(Tensor, "clone", _without_copies_for_liger):
            return run_case(rank, world_size, case)


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plans_give_the_gradients_of_one_process(ranks: RankPool, case: Case) -> None:
    for found in ranks(case.world_size, run_with_stand_in, case, True):
        found.check(BF16_ARITHMETIC if case.bfloat16 else FP32_REORDERED_SUM)


def test_rotating_in_place_would_spoil_selective_checkpointing_without_an_error(
    ranks: RankPool,
) -> None:
    """Why `liger.rotate` copies: the queries that the checkpoint kept would be rotated twice."""
    case = Case(**LIGER, checkpointing="op")
    (found,) = ranks(1, run_with_stand_in, case, False)
    assert found.loss_error <= FP32_REORDERED_SUM < 0.05 < found.worst_error


def test_what_cannot_run_the_kernels_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GPUs only" in str(liger.unsupported_reason("cpu"))
    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    monkeypatch.setattr(liger, "version", lambda name: "0.8.4")
    assert "0.8.4 is too old; pip install 'liger" in str(liger.unsupported_reason("cuda"))
    for found in ("0.8.5", "0.8.10.dev20260101", "0.9", "1.0.0"):
        monkeypatch.setattr(liger, "version", lambda name, found=found: found)
        assert liger.unsupported_reason("cuda") is None
    monkeypatch.setattr(liger, "version", MagicMock(side_effect=PackageNotFoundError))
    assert "liger-kernel is not installed" in str(liger.unsupported_reason("cuda"))
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert "triton is not installed" in str(liger.unsupported_reason("cuda"))


def test_the_kernels_are_those_asked_for_and_never_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"model\.kernels = 'liger' cannot run here: .* GPUs only"):
        resolve_architecture(ModelConfig(kernels="liger"), ModelNeeds(device_type="cpu"))
    monkeypatch.setattr(liger, "unsupported_reason", lambda device_type: None)
    expected = {"auto": "torch", "torch": "torch", "liger": "liger"}
    for asked, kernels in expected.items():
        config = ModelConfig(kernels=asked)  # pyright: ignore[reportArgumentType]
        found = resolve_architecture(config, ModelNeeds(device_type="cuda")).config
        assert found.kernels == kernels


# ---------------------------------------------------------------------------- on a GPU


@pytest.fixture
def gpu() -> str:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := liger.unsupported_reason(device_type):
        pytest.skip(reason)
    return device_type


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", [(2, 999, 4096), (3, 100, 3072), (9, 4096, 128), (1, 7, 16384)])
def test_rms_norm_on_a_gpu(gpu: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_rms_norm(shape, dtype, gpu)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", [(2, 333, 14336), (1, 9, 53248), (3, 100, 384)])
def test_silu_mul_on_a_gpu(gpu: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_silu_mul(shape, dtype, gpu)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    "heads", [(32, 8, 128), (24, 8, 128), (9, 3, 64), (128, 8, 128), (2, 1, 80)]
)
def test_rotate_on_a_gpu(gpu: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_rotate(*heads, dtype, gpu)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(("tokens", "vocab_size"), [(4096, 128_256), (77, 4096), (64, 151_937)])
def test_label_logps_on_a_gpu(gpu: str, tokens: int, vocab_size: int, dtype: torch.dtype) -> None:
    check_label_logps(tokens, vocab_size, dtype, gpu)
    check_label_logps(tokens, vocab_size, dtype, gpu, softcap=3.0)


@pytest.mark.gpu
def test_scores_of_more_logits_than_int32_counts(gpu: str) -> None:
    tokens, vocab_size, last = 17_000, 128_256, 64
    assert tokens * vocab_size > 2**31
    logits = torch.randn(tokens, vocab_size, device=gpu, dtype=torch.bfloat16)
    labels = torch.randint(vocab_size, (tokens,), device=gpu)
    tail = logits[-last:].clone().requires_grad_()
    expected = head.label_logps(tail, labels[-last:])
    (expected_grad,) = torch.autograd.grad(expected.sum(), tail)
    logps = liger.label_logps(logits.requires_grad_().view_as(logits), labels)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert torch.allclose(logps[-last:], expected, rtol=FP32)
    error = (grad[-last:].float() - expected_grad.float()).abs().max()
    assert error <= BF16 * expected_grad.float().abs().max()


@pytest.mark.gpu
def test_no_function_makes_the_host_wait(gpu: str) -> None:
    def work() -> None:
        x = torch.randn(2, 64, 8, 64, device=gpu, requires_grad=True)
        weight = torch.ones(64, device=gpu, requires_grad=True)
        normed = liger.rms_norm(x, weight, 1e-5)
        q, k = liger.rotate(normed, normed * 2, (angles, angles))
        labels = torch.zeros(1024, device=gpu, dtype=torch.int64)
        logps = liger.label_logps(liger.silu_mul(q + k, q - k).flatten(0, 2), labels)
        logps.sum().backward()

    angles = torch.rand(2, 64, 32, device=gpu)
    work()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_model_on_a_gpu_gives_the_gradients_of_one_process_in_torch(gpu: str) -> None:
    cases = tuple(case for case in PLANS if case.world_size == 1)
    rows: list[Row] = []
    run_here(PlanJob(cases=cases, subject=SMALL.for_ranks(1), device_type=gpu), 1, rows.append)
    assert [row.case for row in rows] == list(cases)
    for row in rows:
        assert row.comparison is not None, row.error
        row.comparison.check(tolerance(row.case, gpu))
