"""Activation checkpointing: which results of a block are kept for the backward.

It acts on a forward function and replaces no module, so parameter names stay what they are.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._higher_order_ops import flex_attention
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import parallelisms.context.ring  # noqa: F401  it names an operator of its own

Forward = Callable[..., Any]
MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten._scaled_mm.default: 1,  # of float8 layers
    torch.ops.aten.addmm.default: 2,
}
"""Operators, and which argument is the second matrix."""
DOCUMENT_ATTENTION = (
    ("tessera", "cudnn_attention"),
    ("tessera", "flash_attention_4"),
    ("torch_attn", "_varlen_attn"),
    ("flash_attn", "_flash_attn_varlen_forward"),
)
"""Operators of attention document by document; each is there once its backend is imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationCheckpointConfig:
    """How much of the forward is computed again in the backward to save memory."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """"full": keep only each block's input; "selective": see below; "memory_budget": let the
    compiler choose, needs compile."""

    selective_ac_option: str = "2"
    """"op": keep the results of attention, of collectives and of every second matrix product;
    a number n: treat every n-th block as "full"."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(
        default_factory=lambda: ["moe.router.gate"]
    )
    """With "op": matrix products with the weight shapes of these modules are never kept."""

    early_stop: bool = False
    """Stop recomputing a block as soon as everything needed is there."""

    memory_budget: float = 0.5
    """Share of the activations to keep, from 0 (as "full") to 1 (as "none")."""

    visualize_memory_budget_pareto: bool = False
    """Write the compiler's curve of memory against run time into the current folder."""

    recompute_logits: Literal["auto", "always", "never"] = "auto"
    """Compute the logits of each chunk of labels again in the backward; "auto": unless the mode is
    "none". Kept, they take 2 bytes in bf16 for each token of a microbatch and word."""

    preserve_rng_state: bool = True
    """Repeat the same random numbers in the recomputation."""

    determinism_check: str = "default"
    """"default" compares shapes and dtypes of recomputed tensors, "none" nothing."""

    debug: bool = False
    """Report every operation when the recomputation differs; slow."""

    def __post_init__(self) -> None:
        option = self.selective_ac_option
        if option != "op" and not (option.isdecimal() and int(option) >= 1):
            raise ValueError(
                f"activation_checkpoint.selective_ac_option = {option!r}; "
                'use "op", or a number n for every n-th block'
            )
        if not 0.0 <= self.memory_budget <= 1.0:
            raise ValueError(
                f"activation_checkpoint.memory_budget = {self.memory_budget}; "
                "give a fraction from 0 to 1, such as 0.5"
            )
        if self.determinism_check not in ("default", "none"):
            raise ValueError(
                f"activation_checkpoint.determinism_check = {self.determinism_check!r}; "
                'use "default" or "none"'
            )
        if self.debug and self.is_per_operation:
            raise ValueError(
                'activation_checkpoint.debug = true with selective_ac_option = "op": torch can '
                "report recomputed operations or choose among them, not both; set debug to false, "
                'or activation_checkpoint.mode = "full" while you look'
            )

    @property
    def is_per_operation(self) -> bool:
        """Whether the choice is made operation by operation."""
        return self.mode == "selective" and self.selective_ac_option == "op"

    @property
    def recomputes_logits(self) -> bool:
        """Whether the head keeps no logits for the backward."""
        # 16,384 tokens, 151,936 words, H200: 127 ms, kept 93 ms and 2.3 GiB more
        # (scripts/bench/records/2026-11-30-h200-kernels-1gpu.json).
        if self.recompute_logits == "auto":
            return self.mode != "none"
        return self.recompute_logits == "always"

    def covers(self, block_number: int) -> bool:
        """Say whether the block with this number, counted from 0, is checkpointed."""
        if self.mode == "selective" and not self.is_per_operation:
            return (block_number + 1) % int(self.selective_ac_option) == 0
        return self.mode in ("full", "selective")


def checkpointed(forward: Forward, config: ActivationCheckpointConfig, block: nn.Module) -> Forward:
    """Return `forward` such that its inner results are computed again in the backward.

    With "op" the results of costly operations are kept; `block` is read for its shapes only.
    """
    options: dict[str, Any] = {
        "use_reentrant": False,
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
    }
    if config.is_per_operation:
        options["context_fn"] = _keep_costly_results(_recomputed_shapes(block, config))
    return functools.partial(checkpoint, forward, **options)


def set_memory_budget(config: ActivationCheckpointConfig) -> None:
    """Tell the compiler the share of activations to keep; everything unless the mode asks."""
    from torch._functorch import config as functorch

    budgeted = config.mode == "memory_budget"
    functorch.activation_memory_budget = config.memory_budget if budgeted else 1.0
    functorch.visualize_memory_budget_pareto = budgeted and config.visualize_memory_budget_pareto
    if budgeted and hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):
        # torch 2.12 and later: what it cannot measure is the mesh, which holds no activations.
        functorch.unsafe_treat_script_objects_as_zero_size = True


def _recomputed_shapes(
    block: nn.Module, config: ActivationCheckpointConfig
) -> frozenset[tuple[int, ...]]:
    parts = config.per_op_sac_force_recompute_mm_shapes_by_fqns
    return frozenset(
        tuple(reversed(module.weight.shape))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in parts)
    )


def _costly_operations() -> frozenset[Any]:
    """Return the operations whose results are kept: matrix products, attention, collectives."""
    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    attention = {getattr(aten, name).default for name in names if hasattr(aten, name)}
    documents = {
        getattr(getattr(torch.ops, library), name).default
        for library, name in DOCUMENT_ATTENTION
        if hasattr(getattr(torch.ops, library), name)
    }
    functional = torch.ops._c10d_functional
    collectives = {functional.reduce_scatter_tensor.default, functional.all_to_all_single.default}
    ring = torch.ops.tessera.ring_attention.default
    kept = {*MATRIX_PRODUCTS, *attention, *documents, *collectives, flex_attention, ring}
    return frozenset(kept)


def _keep_costly_results(recomputed_shapes: frozenset[tuple[int, ...]]) -> Callable[[], Any]:
    costly = _costly_operations()

    def contexts() -> Any:
        counts: Counter[bool] = Counter()

        def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            keep = operation in costly
            if operation in MATRIX_PRODUCTS:
                weight = args[MATRIX_PRODUCTS[operation]]
                if tuple(weight.shape) in recomputed_shapes:
                    return CheckpointPolicy.PREFER_RECOMPUTE
                # Every second product: half their memory for a third of their time.
                counts[context.is_recompute] += 1
                keep = counts[context.is_recompute] % 2 == 1
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts
