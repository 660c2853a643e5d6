"""The flash-attn packages over joined documents: version 2.8, or 3 or 4 where these are installed.

Rows of one document take `sdpa`'s causal kernels.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionMask, sdpa, varlen

NEEDS_WHOLE_ROWS = True
VERSIONS = {
    "FA3": ("flash_attn_interface", 9),
    "FA4": ("flash_attn.cute", 9),
    "FA2": ("flash_attn.flash_attn_interface", 8),
}
"""Name -> module that has it, and the oldest generation of GPUs it runs on; the fastest first."""

prepare = varlen.prepare


def attend(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Return the attended values; key/value heads are shared, not repeated."""
    if mask.is_causal:
        return sdpa.attend(q_BTHC, k_BSKC, v_BSKC, mask=mask, scale=scale)
    kernel = _kernel()
    if kernel is None:
        return varlen.attend(q_BTHC, k_BSKC, v_BSKC, mask=mask, scale=scale)
    assert isinstance(mask.prepared, tuple), "the mask was prepared by varlen"
    offsets, longest = mask.prepared[0], mask.prepared[1].shape[0]
    joined = [x.flatten(0, 1) for x in (q_BTHC, k_BSKC, v_BSKC)]
    out_NHC: Any = kernel(
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
    package = module.split(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


@torch.compiler.assume_constant_result
def _kernel() -> Callable[..., Any] | None:
    return _load()


@cache
def _load() -> Callable[..., Any] | None:
    """Return version 2's own function; versions 3 and 4 are put behind torch's `varlen_attn`.

    torch has operators for those two that blocks can be compiled with; theirs break the graph.
    """
    version = installed_version()
    if version == "FA2":
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func
    assert version is not None, "refused where the backend is chosen"
    torch.nn.attention.activate_flash_attention_impl(version)
    return None


def unsupported_reason(
    *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
) -> str | None:
    """Refuse what the packages have no kernel for, and machines without one."""
    reason = varlen.missing_kernel(
        "flash-attn", device_type=device_type, head_dim=head_dim, dtype=dtype
    )
    if reason is not None:
        return reason
    if torch.cuda.is_available() and installed_version() is None:
        return (
            "no package of flash-attn is installed that runs on this GPU; install flash-attn, or "
            "flash-attn-4 on Hopper GPUs and later ones, or use 'varlen', which torch has"
        )
    return None
