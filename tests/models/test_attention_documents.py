"""Backends that attend document by document: cudnn, varlen and flash.

Their kernels are on GPUs; on the CPU a loop over the documents stands for them, so that what lies
around them is proved there, and the kernels themselves where there is a GPU.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from engine.data.batch import document_offsets, longest_document_tokens
from models.attention import (
    AttentionCore,
    AttentionMasks,
    eager,
    flash,
    needs_whole_rows,
    unsupported_reason,
    varlen,
)
from models.attention import cudnn as cudnn_backend
from models.decoder import DecoderLM
from parallelisms.activation_checkpoint import ActivationCheckpointConfig, checkpointed
from tests.models.tiny import gradients, packed, random_tokens, tiny_model, worst_error

BACKENDS = ("cudnn", "flash", "varlen")
FP32_REORDERED_SUM = 1e-5
BF16_ARITHMETIC = 2e-2
LENGTHS = [5, 1, 17, 9]

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def loop_over_documents(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Return causal attention within each document of joined rows (N, H, C)."""
    parts = []
    for begin, end in pairwise(offsets.tolist()):
        own: list[Any] = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                *own, is_causal=True, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(parts)


def cpu_varlen(q: Any, k: Any, v: Any, offsets: Any, keys: Any, *lengths: int, **options: Any):
    assert offsets is keys and lengths[0] == lengths[1]
    assert options.get("window_size", (-1, 0)) == (-1, 0) and options.get("causal", True)
    scale = options["scale"] if "scale" in options else options["softmax_scale"]
    return loop_over_documents(q, k, v, offsets, scale)


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for backend in (cudnn_backend, flash, varlen):
        monkeypatch.setattr(backend, "unsupported_reason", lambda **facts: None)
    monkeypatch.setattr(torch_varlen, "varlen_attn", cpu_varlen)
    monkeypatch.setattr(flash, "_prepared_version", lambda: "FA2")
    monkeypatch.setattr(flash, "_version_2", lambda: cpu_varlen)
    varlen._options.cache_clear()
    yield
    varlen._options.cache_clear()


@cudnn_backend.cudnn_attention.register_kernel("cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    offsets, lengths = documents
    assert torch.equal(offsets.diff(), lengths[:-1]) and lengths.max() <= longest
    return loop_over_documents(q, k, v, offsets, scale).contiguous(), q.new_zeros(q.shape[:2])


@cudnn_backend.cudnn_attention_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    *rest,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_by_document(grad, q, k, v, out, documents[0], rest[-1])


def gradients_by_document(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for begin, end in pairwise(offsets.tolist()):
        if begin < end:
            own: list[Any] = [x[None, begin:end] for x in (grad, q, k, v, out)]
            seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
            options: dict[str, Any] = {"mask": [seen], "is_causal": True, "scale": scale}
            _, own_lse = eager.attend_with_lse(*own[1:4], **options)
            parts.append(eager.attend_backward(*own, own_lse, **options))  # pyright: ignore[reportCallIssue]
    grad_q, grad_k, grad_v = (torch.cat(x, dim=1)[0] for x in zip(*parts, strict=True))
    return grad_q, grad_k, grad_v


class Version4:
    """The functions of FA4 that are called, as its interface has them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, None]:
        assert options["causal"] and options["return_lse"]
        assert all(x.is_contiguous() for x in (q, k, v))
        joined: list[Any] = Version4.joined(q, k, v, **options)
        out = loop_over_documents(*joined, options["softmax_scale"]).view_as(q)  # pyright: ignore[reportCallIssue]
        lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        return out, q.new_zeros(lse_shape), None  # newer releases return more than two

    @staticmethod
    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        assert options["causal"] and lse.shape[-2:] == (q.shape[-2], q.shape[-3])
        assert all(x.is_contiguous() for x in (q, k, v, out, grad, lse))
        joined: list[Any] = Version4.joined(grad, q, k, v, out, **options)
        found = gradients_by_document(*joined, options["softmax_scale"])  # pyright: ignore[reportCallIssue]
        return tuple(x.view_as(y) for x, y in zip(found, (q, k, v), strict=True))

    @staticmethod
    def joined(*tensors: Tensor, **options: Any) -> list[Tensor]:
        if tensors[0].ndim == 3:
            offsets = options["cu_seqlens_q"]
            assert options["cu_seqlens_k"] is offsets
            assert options["max_seqlen_q"] == options["max_seqlen_k"] >= offsets.diff().max()
            return [*tensors, offsets]
        assert "cu_seqlens_q" not in options
        rows, length = tensors[0].shape[:2]
        return [*(x.flatten(0, 1) for x in tensors), torch.arange(rows + 1) * length]


for operator in (flash.flash_attention_4, flash.flash_attention_4_backward):
    operator.register_kernel("cpu")(operator._init_fn)


@pytest.fixture
def version_4_on_cpu(
    kernels_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, dict[str, Any]]]:
    """Return which of its functions are called, and with what options."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def noted(function: Any) -> Any:
        def call(*tensors: Tensor, **options: Any) -> Any:
            calls.append((function.__name__, options))
            return function(*tensors, **options)

        return call

    monkeypatch.setattr(flash, "_prepared_version", lambda: "FA4")
    functions = (noted(Version4.forward), noted(Version4.backward))
    monkeypatch.setattr(flash, "_functions_of_version_4", lambda: functions)
    return calls


def rows_of(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return positions and documents of rows of documents of these lengths; the rest is padding."""
    size = max(map(sum, rows))
    made = [packed(lengths, padding=size - sum(lengths)) for lengths in rows]
    return torch.cat([p for p, _ in made]), torch.cat([d for _, d in made])


def loss_and_gradients(
    model: DecoderLM, tokens: Tensor, positions: Tensor, documents: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Score the tokens; without documents each row is one."""
    model.zero_grad()
    packing: dict[str, Any] = {}
    if documents is not None:
        offsets = document_offsets(documents.cpu()).to(documents.device)
        packing = {
            "documents_BT": documents,
            "document_offsets": offsets,
            "longest_document_tokens": longest_document_tokens(offsets),
        }
    logits = model(tokens, positions_BT=positions, **packing)
    logits = logits.flatten(0, 1) if documents is None else logits[documents != 0]
    loss = logits.float().logsumexp(-1).square().mean()
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_they_give_the_loss_and_gradients_of_masked_attention(backend: str) -> None:
    positions, documents = rows_of(LENGTHS, [32], [1] * 20 + [6])
    tokens = random_tokens(*positions.shape)
    expected = loss_and_gradients(tiny_model(attention="eager"), tokens, positions, documents)
    found = loss_and_gradients(tiny_model(attention=backend), tokens, positions, documents)
    assert found[0] == pytest.approx(expected[0], rel=FP32_REORDERED_SUM)
    assert worst_error(found[1], expected[1]) <= FP32_REORDERED_SUM


@pytest.mark.parametrize("rows", [[LENGTHS, [32], [1] * 20 + [6]], [[32], [32]]], ids=len)
def test_version_4_gives_those_of_documents_and_of_whole_rows(
    rows: list[list[int]], version_4_on_cpu: list[Any]
) -> None:
    positions, documents = rows_of(*rows)
    tokens = random_tokens(*positions.shape)
    given: list[Any] = [tokens, positions]
    given += [documents] if len(rows) == 3 else []
    expected = loss_and_gradients(tiny_model(attention="eager"), *given)
    model = tiny_model(attention="flash")
    found = loss_and_gradients(model, *given)
    num_blocks = len(model.model.layers)
    called = [name for name, _ in version_4_on_cpu]
    assert called == ["forward"] * num_blocks + ["backward"] * num_blocks
    assert found[0] == pytest.approx(expected[0], rel=FP32_REORDERED_SUM)
    assert worst_error(found[1], expected[1]) <= FP32_REORDERED_SUM


def qkv_across_heads(*tokens: int) -> list[Tensor]:
    """Return q of four heads, and k and v of two, whose memory has the heads before the tokens."""
    *rows, length = tokens
    return [torch.randn(*rows, h, length, 8).transpose(-2, -3).requires_grad_() for h in (4, 2, 2)]


@pytest.mark.usefixtures("version_4_on_cpu")
@pytest.mark.parametrize("offsets", [None, [0, 5, 6, 7]], ids=["whole rows", "documents"])
def test_operators_of_version_4_are_what_the_compiler_is_told(offsets: list[int] | None) -> None:
    q, k, v = qkv_across_heads(*((2, 7) if offsets is None else (7,)))
    given = (None if offsets is None else torch.tensor(offsets, dtype=torch.int32), 5, 0.3)
    shapes = ("test_schema", "test_faketensor")
    checks = (*shapes, "test_autograd_registration")
    torch.library.opcheck(flash.flash_attention_4, (q, k, v, *given), test_utils=checks)
    out, lse = (x.detach() for x in flash.flash_attention_4(q, k, v, *given))
    grad = q.detach()  # as strided as q, unlike the values
    operands = (grad, *(x.detach() for x in (q, k, v)), out, lse)
    torch.library.opcheck(flash.flash_attention_4_backward, (*operands, *given), test_utils=shapes)


@pytest.mark.parametrize("deterministic", [False, True])
def test_version_4_is_called_once_where_attention_is_kept_and_as_deterministic_as_asked(
    deterministic: bool, version_4_on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    mask = AttentionMasks("flash", head_dim=8)(torch.arange(7).expand(2, -1))
    block = AttentionCore("flash")
    config = ActivationCheckpointConfig(mode="selective", selective_ac_option="op")
    checkpointed(block.forward, config, block)(*qkv_across_heads(2, 7), mask=mask).sum().backward()
    (forward, _), (backward, options) = version_4_on_cpu
    assert (forward, backward) == ("forward", "backward")
    assert options["deterministic"] is deterministic


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_rows_of_one_document_take_the_causal_kernel(backend: str) -> None:
    mask = AttentionMasks(backend, head_dim=8)(torch.arange(6)[None])
    assert mask.is_causal and mask.prepared is None
    tokens, positions = random_tokens(2, 6), torch.arange(6).expand(2, -1)
    found = tiny_model(attention=backend)(tokens, positions_BT=positions)
    assert torch.equal(found, tiny_model(attention="sdpa")(tokens, positions_BT=positions))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_documents_without_offsets_are_refused(backend: str) -> None:
    positions, documents = packed(LENGTHS)
    with pytest.raises(ValueError, match="needs document_offsets beside documents_BT"):
        AttentionMasks(backend, head_dim=8)(positions, documents_BT=documents)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "varlen"])
@pytest.mark.usefixtures("version_4_on_cpu")
def test_another_packing_does_not_compile_blocks_again(backend: str, monkeypatch) -> None:
    if backend == "varlen":  # the loop reads the offsets; an operator does not
        monkeypatch.setattr(torch_varlen, "varlen_attn", lambda q, k, v, *rest, **options: q * 1.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(attention=backend)
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, [32], [1] * 32, [16, 16], [3] * 10 + [2]):
        positions, documents = rows_of(lengths, lengths)
        out = model(
            random_tokens(2, 32),
            positions_BT=positions,
            documents_BT=documents,
            document_offsets=document_offsets(documents),
            longest_document_tokens=1 << max(lengths).bit_length(),
        )
        out.square().mean().backward()
    blocks = len(model.model.layers)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= blocks
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_kernel_is_refused_with_a_way_out(backend: str) -> None:
    assert needs_whole_rows(backend) and not needs_whole_rows("flex")
    cuda: dict[str, Any] = {"device_type": "cuda", "training": True, "head_dim": 64}
    bf16 = torch.bfloat16
    assert "use 'sdpa'" in str(unsupported_reason(backend, **{**cuda, "device_type": "cpu"}))
    assert "float32" in str(unsupported_reason(backend, **cuda, dtype=torch.float32))
    assert "has 12" in str(unsupported_reason(backend, **{**cuda, "head_dim": 12}, dtype=bf16))
    if not torch.cuda.is_available():  # a plan for another machine
        assert unsupported_reason(backend, **cuda, dtype=bf16) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_package_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    for module in (cudnn_backend, flash):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(flash, "_is_installed", lambda package: False)
    facts: dict[str, Any] = {"device_type": "cuda", "training": True, "head_dim": 64}
    reason = unsupported_reason(backend, **facts, dtype=torch.bfloat16)
    expected = {"cudnn": "nvidia-cudnn-frontend", "flash": "install flash-attn"}
    assert (reason is None) if backend == "varlen" else (expected[backend] in str(reason))


def test_the_newest_installed_flash_attention_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"flash_attn", "flash_attn.cute", "flash_attn.flash_attn_interface"}
    packages = {"flash-attn-4"}
    monkeypatch.setattr(flash, "find_spec", lambda name: name in modules or None)
    monkeypatch.setattr(flash, "_is_installed", packages.__contains__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    assert flash.installed_version() == "FA4"
    packages.clear()
    assert flash.installed_version() == "FA2", "flash-attn 2.8 alone has the module too"
    packages.add("flash-attn-4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    assert flash.installed_version() == "FA2"
    modules.clear()
    assert flash.installed_version() is None


def gpu_model(backend: str, dtype: torch.dtype) -> DecoderLM:
    sizes = {"hidden_size": 128, "head_dim": 64, "num_heads": 4, "num_kv_heads": 2}
    return tiny_model(attention=backend, spread=1.0, **sizes).to("cuda", dtype)


GPU_ROWS = {
    "mixed": [[100, 1, 300, 111], [512], [200]],
    "single_tokens": [[1] * 64 + [448], [511, 1], [2] * 256],
    "full": [[256, 256], [512], [128] * 4],
    "whole": [[512], [512]],
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rows", GPU_ROWS.values(), ids=GPU_ROWS)
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=needs_gpu) for name in (*BACKENDS, "flex")]
)
def test_kernels_on_a_gpu_give_what_fp32_gives(backend: str, rows: Any, compiled: bool) -> None:
    facts: dict[str, Any] = {"device_type": "cuda", "training": True, "head_dim": 64}
    if reason := unsupported_reason(backend, **facts, dtype=torch.bfloat16):
        pytest.skip(reason)
    positions, documents = (x.cuda() for x in rows_of(*rows))
    given = [random_tokens(*positions.shape).cuda(), positions]
    given += [documents] if max(map(len, rows)) > 1 else []
    expected = loss_and_gradients(gpu_model("eager", torch.float32), *given)
    torch._dynamo.reset()
    model = gpu_model(backend, torch.bfloat16)
    if compiled:
        for block in model.model.layers:
            block.forward = torch.compile(block.forward, fullgraph=True)
    found = loss_and_gradients(model, *given)
    assert found[0] == pytest.approx(expected[0], rel=BF16_ARITHMETIC)
    for name, gradient in expected[1].items():
        error = (found[1][name].float() - gradient).norm() / gradient.norm()
        assert error <= BF16_ARITHMETIC, (name, error.item())
