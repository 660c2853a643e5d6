"""The versions of flash-attn: which is taken, and how each is called."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import AttentionCore, AttentionMasks, flash, unsupported_reason
from parallelisms.activation_checkpoint import ActivationCheckpointConfig, checkpointed
from tests.models.document_kernels import (
    FP32_REORDERED_SUM,
    LENGTHS,
    loss_and_gradients,
    rows_of,
)
from tests.models.tiny import random_tokens, tiny_model, worst_error

PREPARED_VERSION: Any = flash._prepared_version.__wrapped__


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


@pytest.mark.usefixtures("kernels_on_cpu")
def test_version_3_is_put_behind_varlen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    put_behind: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", put_behind.append)
    monkeypatch.setattr(flash, "installed_version", lambda: "FA3")
    monkeypatch.setattr(flash, "_prepared_version", cache(PREPARED_VERSION))
    monkeypatch.setattr(flash, "_version_2", lambda: pytest.fail("version 2 was called"))
    positions, documents = rows_of(LENGTHS, [32])
    tokens = random_tokens(*positions.shape)
    expected, _ = loss_and_gradients(tiny_model(attention="varlen"), tokens, positions, documents)
    found, _ = loss_and_gradients(tiny_model(attention="flash"), tokens, positions, documents)
    assert found == expected and put_behind == ["FA3"]


@pytest.mark.parametrize(
    ("generation", "head_dim", "is_refused"),
    [(9, 192, False), (10, 128, False), (10, 192, True), (10, 256, False)],
)
def test_heads_that_flash_attention_4_has_no_kernel_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, generation: int, head_dim: int, is_refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (generation, 0))
    monkeypatch.setattr(flash, "installed_version", lambda: "FA4")
    facts: dict[str, Any] = {"device_type": "cuda", "training": True, "dtype": torch.bfloat16}
    reason = unsupported_reason("flash", **facts, head_dim=head_dim)
    assert (f"the model has {head_dim}" in str(reason)) == is_refused
