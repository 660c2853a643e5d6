"""Fixtures that put a loop over the documents in the place of kernels of GPUs."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from models.attention import cudnn as cudnn_backend
from models.attention import flash, varlen
from tests.models.document_kernels import Version4, cpu_varlen


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
