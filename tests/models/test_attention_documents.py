"""Backends that attend document by document: cudnn, varlen and flash."""

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from engine.data.batch import document_offsets
from models.attention import AttentionMasks, flash, needs_whole_rows, unsupported_reason
from models.attention import cudnn as cudnn_backend
from models.decoder import DecoderLM
from tests.models.document_kernels import (
    FP32_REORDERED_SUM,
    LENGTHS,
    loss_and_gradients,
    rows_of,
)
from tests.models.tiny import packed, random_tokens, tiny_model, worst_error

BACKENDS = ("cudnn", "flash", "varlen")
BF16_ARITHMETIC = 2e-2

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_they_give_the_loss_and_gradients_of_masked_attention(backend: str) -> None:
    positions, documents = rows_of(LENGTHS, [32], [1] * 20 + [6])
    tokens = random_tokens(*positions.shape)
    expected = loss_and_gradients(tiny_model(attention="eager"), tokens, positions, documents)
    found = loss_and_gradients(tiny_model(attention=backend), tokens, positions, documents)
    assert found[0] == pytest.approx(expected[0], rel=FP32_REORDERED_SUM)
    assert worst_error(found[1], expected[1]) <= FP32_REORDERED_SUM


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
