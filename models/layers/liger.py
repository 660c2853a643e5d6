"""Liger's Triton kernels behind the contracts of our layers; the only file that imports them.

Read in version 0.8.5. The kernels write over what they are given, which autograd does not see; each
function says what that means for its caller. Widths go up to 65,536 (`ops/utils.py:60`).

Liger's fused linear cross entropy stays out of the head. With reduction "sum" it makes gradients in
the forward, for tokens that all weigh the same, but DPO and ORPO weigh them unequally. With "none"
the gradients wait for the backward, as those of `LMHead` do for as many matrix products; but each
token's weight is rounded to the dtype of the logits (`ops/fused_linear_cross_entropy.py:314`), by
up to 0.2 % in bf16 and alike for all tokens of a mean, and both passes make the host wait for a
count (line 132). Before 0.8.5 it took the first token's weight for all
(https://github.com/linkedin/Liger-Kernel/pull/1298).
"""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Kernels = Literal["torch", "liger"]
"""What computes norms, SwiGLU and GEGLU, rotary embedding and the scores of labels."""

OLDEST_VERSION = (0, 8, 5)
IGNORED_LABEL = -100


def unsupported_reason(device_type: str) -> str | None:
    """Say why the kernels cannot run on such a device of this machine, or None if they can."""
    if device_type != "cuda":
        return "Liger's kernels run on GPUs only"
    if find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        return "the package liger-kernel is not installed; pip install liger-kernel"
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        return f"liger-kernel {found} is too old; pip install 'liger-kernel>={oldest}'"
    return None


def rms_norm(x_BTD: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Return the tokens over their root mean square times `weight + offset`, in their dtype.

    All arithmetic is fp32 and rounds once, as torch's does: that is the mode called "gemma". In the
    mode "llama" the product with the weight has the dtype of the input.
    """
    from liger_kernel.ops.rms_norm import (  # pyright: ignore[reportMissingImports]
        LigerRMSNormFunction,
    )

    # Not in place: that would write the gradient over the one that came in, which may be others'.
    return LigerRMSNormFunction.apply(x_BTD, weight, eps, offset, "gemma", False)


def silu_mul(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return `silu(gate) * up`.

    The backward writes both gradients over `gate` and `up`: nothing else may keep these two for
    its own backward (matrix products do not keep their results), and it can run once.
    """
    from liger_kernel.ops.swiglu import (  # pyright: ignore[reportMissingImports]
        LigerSiLUMulFunction,
    )

    return LigerSiLUMulFunction.apply(gate_BTF, up_BTF)


def gelu_mul(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return `gelu(gate) * up` with GELU approximated by tanh.

    The backward writes over `gate` and `up`, as that of `silu_mul` does.
    """
    from liger_kernel.ops.geglu import (  # pyright: ignore[reportMissingImports]
        LigerGELUMulFunction,
    )

    return LigerGELUMulFunction.apply(gate_BTF, up_BTF)


class _Rotate(torch.autograd.Function):
    """Gives Liger copies, because it rotates in place, both the heads and their gradients.

    The heads are results of matrix products, which selective checkpointing keeps: written over,
    they would be rotated a second time when the block is computed again, without an error.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BTHC: Tensor, k_BTKC: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import rope_forward  # pyright: ignore[reportMissingImports]

        ctx.save_for_backward(cos, sin)
        return _rotated(rope_forward, q_BTHC, k_BTKC, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_q_BTHC: Tensor, grad_k_BTKC: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        from liger_kernel.ops.rope import rope_backward  # pyright: ignore[reportMissingImports]

        return *_rotated(rope_backward, grad_q_BTHC, grad_k_BTKC, *ctx.saved_tensors), None, None


def _rotated(
    rope: Any, q_BTHC: Tensor, k_BTKC: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    # Liger takes heads before tokens and turns them back, so these copies are what it writes to.
    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q_BTHC, k_BTKC))
    # The width of cos and sin would be taken for the channels to rotate, but they are half.
    found = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, rotary_dim=q.shape[-1])
    return found[0].transpose(1, 2), found[1].transpose(1, 2)


def rotate(q_BTHC: Tensor, k_BTKC: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys of the same tokens, in one launch; as `rope.rotate` does each.

    The arithmetic has the dtype of the angles, fp32, and the results those of the inputs.
    """
    q_k: Any = _Rotate.apply(q_BTHC, k_BTKC, *rotary)
    return q_k


class _LabelLogps(torch.autograd.Function):
    """Keeps, where the logits were, their gradient for an upstream gradient of one."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, softcap: float | None) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        with_gradient: bool = ctx.needs_input_grad[0]
        return -_losses(logits_NV, labels_N, softcap=softcap, with_gradient=with_gradient)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor, None, None]:
        unit_grad_NV, labels_N = ctx.saved_tensors
        scale_N = torch.where(labels_N == IGNORED_LABEL, 0.0, -grad_N)
        # The weights are not rounded to the dtype of the logits first. As a change of the logits it
        # makes autograd refuse a second backward, which would scale twice.
        return unit_grad_NV.detach().mul_(scale_N[:, None]), None, None


def _losses(
    logits_NV: Tensor, labels_N: Tensor, *, softcap: float | None, with_gradient: bool
) -> Tensor:
    """Return the fp32 loss of each token, and write the gradient of their sum over the logits.

    The kernel is launched as in `ops/cross_entropy.py:427`, but the function there returns losses
    in the dtype of the logits (line 379), and makes the host wait three times to check the labels
    (389 to 393). Rows are addressed in int64, so that tokens times vocabulary may exceed int32.
    """
    from liger_kernel.ops.cross_entropy import (  # pyright: ignore[reportMissingImports]
        MAX_FUSED_SIZE,
        liger_cross_entropy_kernel,
    )

    num_tokens, vocab_size = logits_NV.shape
    assert logits_NV.stride(1) == 1, "the kernel reads the logits of a token one after the other"
    losses_N = torch.zeros(num_tokens, dtype=torch.float32, device=logits_NV.device)
    liger_cross_entropy_kernel[(num_tokens,)](
        X_ptr=logits_NV,
        X_stride=logits_NV.stride(0),
        Y_ptr=labels_N,
        Y_stride=labels_N.stride(0),
        weight_ptr=None,
        loss_ptr=losses_N,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocab_size,
        n_non_ignore=1,  # these three are read for a mean or for weights of classes only
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=IGNORED_LABEL,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="none",
        softcap=softcap,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, 1 << (vocab_size - 1).bit_length()),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=softcap is not None,
        HAS_GRADIENTS=with_gradient,
        num_warps=16 if torch.version.hip else 32,  # Liger's figures
    )
    return losses_N


def label_logps(logits_NV: Tensor, labels_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Return the fp32 log-probability of each label; 0, without gradient, where it is ignored.

    `softcap` is that of `models.layers.head.label_logps`. The logits are lost: their gradient is
    written over them, and zeros where the label is ignored. `LMHead` makes them for this call
    alone, and anew where it recomputes a chunk. That a label is in the vocabulary is not checked.
    """
    logps_N = _LabelLogps.apply(logits_NV, labels_N, softcap)
    assert isinstance(logps_N, Tensor), "autograd functions return what their forward returns"
    return logps_N
