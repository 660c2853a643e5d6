"""Stands for the package liger-kernel 0.8.5 on machines without a GPU.

The same functions in torch, and they write over their arguments where Liger's kernels do, unseen by
autograd: what lies around the kernels is proved with it, not their arithmetic.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

KERNEL_PARAMETERS = {
    *("X_ptr", "X_stride", "Y_ptr", "Y_stride", "weight_ptr", "loss_ptr", "z_loss_ptr"),
    *("loss_stride", "token_accuracy_ptr", "token_accuracy_stride", "predicted_tokens_ptr"),
    *("predicted_tokens_stride", "n_cols", "n_non_ignore", "sum_non_ignore_weight", "weight_sum"),
    *("ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap"),
    *("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS", "BLOCK_SIZE"),
    *("HAS_WEIGHT", "HAS_SOFTCAPPING", "HAS_GRADIENTS"),
}
"""Of `liger_cross_entropy_kernel`; any other or missing name is an error in Triton."""


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        eps: float,
        offset: float = 0.0,
        casting_mode: str = "llama",
        in_place: bool = True,
        row_mode: bool | None = None,
    ) -> Tensor:
        assert casting_mode == "gemma" and type(X) is Tensor and X.device == W.device
        X = X.contiguous()
        scale = X.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(X, W, scale)
        ctx.in_place, ctx.offset = in_place, offset
        return (X.float() * scale * (W.float() + offset)).to(X.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        X, W, scale = ctx.saved_tensors
        dY = grads[0].contiguous()
        m, normed = dY.float() * (W.float() + ctx.offset), X.float() * scale
        dX = scale * (m - normed * (m * normed).mean(-1, keepdim=True))
        dW = (dY.float() * normed).flatten(0, -2).sum(0).to(W.dtype)
        if ctx.in_place:
            dY.data.copy_(dX)
        return dX.to(X.dtype), dW, None, None, None, None, None


class LigerGELUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        return torch.nn.functional.gelu(a.float(), approximate="tanh").to(b.dtype) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            gate = a.float().requires_grad_()
            gelu = torch.nn.functional.gelu(gate, approximate="tanh")
        (da,) = torch.autograd.grad(gelu, gate, grads[0].float() * b.float())
        a.data.copy_(da)
        b.data.copy_(grads[0].float() * gelu.detach())
        return a, b


class LigerSiLUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        return torch.nn.functional.silu(a.float()).to(b.dtype) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = ctx.saved_tensors
        dc, gate = grads[0].float(), a.float()
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        da, db = dc * (silu * (1 - sigmoid) + sigmoid) * b.float(), dc * silu
        a.data.copy_(da)
        b.data.copy_(db)
        return a, b, None, None


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> Any:
    """Turn heads (B, H, T, C) in place where tokens are contiguous, otherwise a copy of them."""
    cos, sin = cos.contiguous(), sin.contiguous()
    found = []
    for x in (q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()):
        half = (rotary_dim or min(cos.shape[-1], x.shape[-1])) // 2
        first, second = x[..., :half].to(sin.dtype), x[..., half : 2 * half].to(sin.dtype)
        c, s = cos[:, :, None, :half], sin[:, :, None, :half]
        x.data[..., : 2 * half] = torch.cat((first * c - second * s, second * c + first * s), -1)
        found.append(x.transpose(1, 2))
    return found


def rope_forward(q: Any, k: Any, cos: Any, sin: Any, rotary_dim: int | None = None) -> Any:
    return *_rope(q, k, cos, sin, rotary_dim), cos, sin


def rope_backward(dq: Any, dk: Any, cos: Any, sin: Any, rotary_dim: int | None = None) -> Any:
    return tuple(_rope(dq, dk, cos, -sin, rotary_dim))


class CrossEntropyKernel:
    """Launched as `kernel[grid](...)`."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*, num_warps: int, **arguments: Any) -> None:
            assert set(arguments) == KERNEL_PARAMETERS
            assert grid == (len(arguments["X_ptr"]),)
            _score(**{k: v for k, v in arguments.items() if k in _USED})

        return launch


_USED = (
    *("X_ptr", "Y_ptr", "loss_ptr", "ignore_index", "n_cols", "HAS_GRADIENTS", "reduction"),
    *("softcap", "HAS_SOFTCAPPING"),
)


def _score(
    *,
    X_ptr: Tensor,
    Y_ptr: Tensor,
    loss_ptr: Tensor,
    ignore_index: int,
    n_cols: int,
    HAS_GRADIENTS: bool,
    reduction: str,
    softcap: float | None,
    HAS_SOFTCAPPING: bool,
) -> None:
    assert HAS_SOFTCAPPING is (softcap is not None)
    assert reduction == "none" and n_cols == X_ptr.shape[1]
    is_scored = Y_ptr != ignore_index
    target = torch.where(is_scored, Y_ptr, 0)[:, None]
    logits = X_ptr.data.float()
    tanh = torch.zeros_like(logits) if softcap is None else torch.tanh(logits / softcap)
    logits = logits if softcap is None else tanh * softcap
    losses = logits.logsumexp(-1) - logits.gather(1, target).squeeze(1)
    loss_ptr.data[is_scored] = losses[is_scored].to(loss_ptr.dtype)
    X_ptr.data[~is_scored] = 0.0
    if HAS_GRADIENTS:
        gradient = logits.softmax(-1).scatter_add_(1, target, torch.full(target.shape, -1.0))
        X_ptr.data.copy_(torch.where(is_scored[:, None], gradient * (1 - tanh**2), 0.0))


MEMBERS: dict[str, dict[str, Any]] = {
    "rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
    "geglu": {"LigerGELUMulFunction": LigerGELUMulFunction},
    "swiglu": {"LigerSiLUMulFunction": LigerSiLUMulFunction},
    "rope": {"rope_forward": rope_forward, "rope_backward": rope_backward},
    "cross_entropy": {
        "liger_cross_entropy_kernel": CrossEntropyKernel(),
        "MAX_FUSED_SIZE": 65536 // 2,
    },
}


@contextmanager
def stand_in() -> Iterator[None]:
    """Let `liger_kernel.ops` be what is in this file."""
    modules = {"liger_kernel": ModuleType("liger_kernel"), "liger_kernel.ops": ModuleType("ops")}
    for name, members in MEMBERS.items():
        module = modules[f"liger_kernel.ops.{name}"] = ModuleType(name)
        module.__dict__.update(members)
    with patch.dict(sys.modules, modules):
        yield
