"""The flash-attn packages over joined documents: version 2.8, or 3 or 4 where these are installed.

Rows of one document take version 4's causal kernel, else those of `sdpa`.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionMask, connect_backward, sdpa, varlen

NEEDS_WHOLE_ROWS = True
VERSIONS = {
    "FA3": ("flash_attn_interface", 9),
    "FA4": ("flash_attn.cute", 9),
    "FA2": ("flash_attn.flash_attn_interface", 8),
}
"""Name -> module that has it, and the oldest generation of GPUs it runs on; the fastest first."""

LARGEST_HEAD_AFTER_HOPPER = 128  # of flash-attn-4 4.0.0b18, but for 256

prepare = varlen.prepare


def attend(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Return the attended values; key/value heads are shared, not repeated."""
    version = _version()
    if mask.is_causal:
        if version != "FA4":
            return sdpa.attend(q_BTHC, k_BSKC, v_BSKC, mask=mask, scale=scale)
        return flash_attention_4(q_BTHC, k_BSKC, v_BSKC, None, 0, scale)[0]
    if version == "FA3":
        return varlen.attend(q_BTHC, k_BSKC, v_BSKC, mask=mask, scale=scale)
    assert isinstance(mask.prepared, tuple), "the mask was prepared by varlen"
    offsets, longest = mask.prepared[0], mask.prepared[1].shape[0]
    joined = [x.flatten(0, 1) for x in (q_BTHC, k_BSKC, v_BSKC)]
    if version == "FA4":
        out_NHC, _ = flash_attention_4(*joined, offsets, longest, scale)
        return out_NHC.view_as(q_BTHC)
    out_NHC: Any = _version_2()(
        *joined, offsets, offsets, longest, longest, softmax_scale=scale, causal=True
    )
    return out_NHC.view_as(q_BTHC)


def installed_version() -> str | None:
    """Return the fastest version of the packages that this machine and its GPU have."""
    generation = torch.cuda.get_device_capability()[0]
    usable = (
        v for v, (module, oldest) in VERSIONS.items() if generation >= oldest and _has(module)
    )
    return next(usable, None)


def _has(module: str) -> bool:
    if module == "flash_attn.cute":
        # flash-attn 2.8 brings an early one, without what is called here.
        return _is_installed("flash-attn-4")
    package = module.split(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


@cache
def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


@torch.compiler.assume_constant_result
def _version() -> str:
    return _prepared_version()


@cache
def _prepared_version() -> str:
    version = installed_version()
    assert version is not None, "refused where the backend is chosen"
    if version == "FA3":
        # Its own function breaks graphs; torch's `varlen_attn`, which then takes it, does not.
        torch.nn.attention.activate_flash_attention_impl(version)
    return version


@torch.compiler.assume_constant_result
def _version_2() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func


# torch puts version 4 behind `varlen_attn` as well, but without gradients in torch 2.11 ("windowed
# attention not supported"), and not from flash-attn-4 4.0.0b20 on, whose forward returns more.


@torch.library.custom_op("tessera::flash_attention_4", mutates_args=(), device_types="cuda")
def flash_attention_4(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the causally attended values and the fp32 log-sum-exp of scores.

    Joined documents are (N, H, C), their log-sum-exp (H, N): document d holds the tokens from
    `offsets[d]` to `offsets[d + 1]`, and none is longer than `longest`. Without offsets each row of
    (B, T, H, C) is one document, its log-sum-exp (B, H, T).
    """
    forward, _ = _functions_of_version_4()
    out, lse, *_ = forward(
        *(x.contiguous() for x in (q, k, v)),
        **_lengths(offsets, longest),
        softmax_scale=scale,
        causal=True,
        return_lse=True,
    )
    return out, lse.contiguous()


@flash_attention_4.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.transpose(-2, -3).shape[:-1], dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op(
    "tessera::flash_attention_4_backward", mutates_args=(), device_types="cuda"
)
def flash_attention_4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    _, backward = _functions_of_version_4()
    grad_q, grad_k, grad_v, *_ = backward(
        *(x.contiguous() for x in (q, k, v, out, grad, lse)),
        **_lengths(offsets, longest),
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grad_q, grad_k, grad_v


connect_backward(flash_attention_4, flash_attention_4_backward)


@cache
def _functions_of_version_4() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return its forward and backward, which torch calls by the same names."""
    interface = import_module("flash_attn.cute.interface")
    return interface._flash_attn_fwd, interface._flash_attn_bwd


def _lengths(offsets: Tensor | None, longest: int) -> dict[str, Any]:
    if offsets is None:
        return {}
    of_each = {"cu_seqlens": offsets, "max_seqlen": longest}
    return {f"{name}_{side}": value for name, value in of_each.items() for side in "qk"}


def unsupported_reason(
    *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
) -> str | None:
    """Refuse what the packages have no kernel for, and machines without one."""
    reason = varlen.missing_kernel(
        "flash-attn", device_type=device_type, head_dim=head_dim, dtype=dtype
    )
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return None  # another machine will train
    version = installed_version()
    if version is None:
        return (
            "no package of flash-attn is installed that runs on this GPU; install flash-attn, or "
            "flash-attn-4 on Hopper GPUs and later ones, or use 'varlen', which torch has"
        )
    is_after_hopper = torch.cuda.get_device_capability()[0] > 9
    if version == "FA4" and is_after_hopper and LARGEST_HEAD_AFTER_HOPPER < head_dim != 256:
        return (
            f"flash-attn-4 has kernels for heads of at most {LARGEST_HEAD_AFTER_HOPPER} channels, "
            f"or of 256, on GPUs after Hopper, and the model has {head_dim}; use 'cudnn' or 'flex'"
        )
    return None
