"""Sliding windows and soft caps under every backend, and which backends are refused."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from engine.data.batch import document_offsets
from engine.model import (
    ModelConfig,
    ModelNeeds,
    choose_backend,
    find_architecture,
    resolve_architecture,
)
from models.attention import (
    AttentionCore,
    AttentionMasks,
    backend_names,
    supports_softcap,
    supports_windows,
    unsupported_reason,
    varlen,
)
from models.decoder import FULL, SLIDING, DecoderConfig
from models.layers.rope import RopeConfig
from tests.models.test_attention import flex_trains_on_cpu
from tests.models.tiny import TINY, gradients, packed, random_tokens, tiny_model, worst_error

__all__ = ["flex_trains_on_cpu"]  # a fixture

FP32_REORDERED_SUM = 1e-5
BF16_ARITHMETIC = 3e-2
WINDOW, LENGTHS = 6, [5, 1, 17, 9]
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": (FULL, SLIDING)}


def outcome(backend: str, is_packed: bool, **sizes: Any) -> dict[str, Tensor]:
    """Return logits and gradients of two rows, of several documents or of one."""
    model = tiny_model(attention=backend, **{**WINDOWED, **sizes})
    positions, documents = packed(LENGTHS, padding=3)
    positions, documents = positions.expand(2, -1).contiguous(), documents.expand(2, -1)
    options: dict[str, Any] = {"positions_BT": torch.arange(positions.shape[1]).expand(2, -1)}
    if is_packed:
        options = {"positions_BT": positions, "documents_BT": documents.contiguous()}
        options["document_offsets"] = document_offsets(options["documents_BT"])
    logits = model(random_tokens(2, positions.shape[1]), **options)
    logits.square().mean().backward()
    return {"logits": logits.detach(), **gradients(model)}


def windowed_varlen(q: Any, k: Any, v: Any, offsets: Any, *lengths: Any, **options: Any) -> Tensor:
    """Stand for torch's kernel: causal attention with a window in each document."""
    before, after = options["window_size"]
    assert after == 0
    parts = []
    for begin, end in pairwise(offsets.tolist()):
        places = torch.arange(end - begin)
        distance = places[:, None] - places
        mask = distance >= 0 if before < 0 else (distance >= 0) & (distance <= before)
        own: list[Any] = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        scores = torch.nn.functional.scaled_dot_product_attention(
            *own, attn_mask=mask, scale=options["scale"], enable_gqa=True
        )
        parts.append(scores.transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(varlen, "unsupported_reason", lambda **facts: None)
    monkeypatch.setattr(torch_varlen, "varlen_attn", windowed_varlen)
    known = lambda is_grouped, window: {"window_size": (-1 if window is None else window - 1, 0)}  # noqa: E731
    monkeypatch.setattr(varlen, "_options", known)


@pytest.mark.parametrize("backend", ["sdpa", "flex", "varlen"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "one_document"])
@pytest.mark.usefixtures("flex_trains_on_cpu", "varlen_on_cpu")
def test_every_backend_with_a_window_equals_the_written_out_one(backend, is_packed):
    expected = outcome("eager", is_packed)
    assert worst_error(outcome(backend, is_packed), expected) <= FP32_REORDERED_SUM


@pytest.mark.usefixtures("flex_trains_on_cpu")
def test_a_soft_cap_under_flex_equals_the_written_out_one():
    sizes: dict[str, Any] = {"attention_softcap": 1.5, "query_pre_attn_scalar": 3}
    expected = outcome("eager", True, **sizes)
    assert worst_error(outcome("flex", True, **sizes), expected) <= FP32_REORDERED_SUM
    for change in ({"attention_softcap": None}, {"query_pre_attn_scalar": None}):
        other = outcome("eager", True, **{**sizes, **change})
        assert worst_error(other, expected) > 1000 * FP32_REORDERED_SUM


def test_a_window_as_long_as_the_longest_document_changes_nothing():
    expected = outcome("sdpa", is_packed=True, sliding_window=None, layer_types=())
    whole, shorter = (outcome("sdpa", is_packed=True, sliding_window=n) for n in (17, 16))
    assert worst_error(whole, expected) <= FP32_REORDERED_SUM
    assert worst_error(shorter, expected) > 10 * FP32_REORDERED_SUM


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("backend", "softcap"), [("sdpa", None), ("flex", None), ("varlen", None), ("flex", 2.0)]
)
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "one_document"])
def test_the_kernels_of_a_gpu_heed_a_window_and_a_soft_cap(backend, softcap, head_dim, is_packed):
    results = []
    for name in ("eager", backend):
        mask_of = AttentionMasks(name, head_dim=head_dim, window=100)
        documents = torch.arange(512, device="cuda").ge(200).long().expand(2, -1).contiguous()
        options: dict[str, Any] = {}
        if is_packed:
            offsets = document_offsets(documents.cpu()).cuda()
            options = {"documents_BT": documents, "document_offsets": offsets}
        mask = mask_of(torch.arange(512, device="cuda").expand(2, -1).contiguous(), **options)
        torch.manual_seed(0)
        leaves = [torch.randn(2, 512, heads, head_dim, device="cuda") for heads in (4, 2, 2)]
        leaves = [x.bfloat16().requires_grad_() for x in leaves]
        out = AttentionCore(name, softcap=softcap)(*leaves, mask=mask)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        results.append(dict(zip("oqkv", (out.detach().float(), *gradients), strict=True)))
    assert worst_error(results[1], results[0]) <= BF16_ARITHMETIC


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
def test_a_query_sees_exactly_the_newest_tokens_of_its_window(backend):
    model = tiny_model(
        attention=backend, num_layers=1, sliding_window=WINDOW, layer_types=(SLIDING,)
    )
    tokens, positions = random_tokens(1, 20), torch.arange(20)[None]
    changed = torch.arange(20) == 8
    other = torch.where(changed, (tokens + 1) % 97, tokens)
    with torch.no_grad():
        before, after = (model(x, positions_BT=positions)[0] for x in (tokens, other))
    differs = (before != after).any(-1)
    assert differs.tolist() == [8 <= place < 8 + WINDOW for place in range(20)]


def test_backends_that_do_not_heed_a_window_are_refused_and_auto_takes_one_that_does(monkeypatch):
    heeding = [backend for backend in backend_names() if supports_windows(backend)]
    assert heeding == ["eager", "flex", "sdpa", "varlen"]
    for backend in ("cudnn", "flash"):
        reason = unsupported_reason(
            backend, device_type="cuda", training=True, head_dim=64, has_window=True
        )
        assert f"{backend} does not heed a sliding window" in str(reason)
        with pytest.raises(ValueError, match="does not heed a sliding window"):
            AttentionMasks(backend, head_dim=64, window=WINDOW)(torch.arange(8)[None])
    monkeypatch.setattr("engine.model.find_spec", lambda name: "is installed")
    monkeypatch.setattr("models.attention.cudnn.unsupported_reason", lambda **facts: None)
    needs = ModelNeeds(device_type="cuda")
    for flavor, expected in (("7B", "cudnn"), ("7B_v0.1", "flex")):
        config = ModelConfig(name="mistral", flavor=flavor)
        assert choose_backend(config, find_architecture(config), needs) == expected


def test_backends_that_do_not_cap_scores_are_refused_and_auto_takes_one_that_does():
    capping = [backend for backend in backend_names() if supports_softcap(backend)]
    assert capping == ["eager", "flex"]
    for backend in ("sdpa", "cudnn", "varlen", "flash"):
        mask_of = AttentionMasks(backend, head_dim=64, has_softcap=True)
        with pytest.raises(ValueError, match=f"'{backend}' cannot be used: .* does not cap"):
            mask_of(torch.arange(8)[None])
    for asked, device_type, expected in (
        ("auto", "cpu", "eager"),
        ("auto", "cuda", "flex"),
        ("eager", "cuda", "eager"),
    ):
        config = ModelConfig(name="gemma2", flavor="2B", attention=asked)  # pyright: ignore
        needs = ModelNeeds(device_type=device_type)
        assert resolve_architecture(config, needs).config.attention == expected
    with pytest.raises(ValueError, match=r"model\.attention = 'sdpa' .*does not cap.*'eager'"):
        config = ModelConfig(name="gemma2", flavor="2B", attention="sdpa")
        resolve_architecture(config, ModelNeeds(device_type="cuda"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_softcap": 0.0}, r"attention_softcap = 0\.0; give more than 0, or None"),
        (
            {"sliding_rope": RopeConfig(theta=1e4, kind="dynamic", factor=2.0)},
            "sliding_rope of type dynamic",
        ),
        ({"layer_types": (SLIDING,)}, "layer_types for 1 blocks, but num_layers = 2"),
        ({"layer_types": ("chunked_attention", FULL)}, "'chunked_attention'; the types are"),
        ({"layer_types": (FULL, SLIDING)}, "sliding_window = None"),
        ({"layer_types": (FULL, SLIDING), "sliding_window": 0}, "sliding_window = 0"),
    ],
)
def test_types_of_layers_that_make_no_sense_are_refused(change, message):
    values = {name: getattr(TINY, name) for name in DecoderConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**values, **change})
