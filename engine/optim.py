"""The optimizer: which parameters decay, and which implementation of Adam runs the update.

The learning rate over the run is decided in `schedule.py`.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from parallelisms.low_precision import AdamW8bit
from parallelisms.nf4 import is_fusible, local_part
from parallelisms.stored import full_precision

log = logging.getLogger("tessera")

OPTIMIZERS: dict[str, type[Adam]] = {"Adam": Adam, "AdamW": AdamW}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Section `optimizer`: the update rule and its constants."""

    name: Literal["Adam", "AdamW", "AdamW8bit"] = "AdamW"
    """Update rule; weight decay is decoupled in AdamW and part of the gradient in Adam. AdamW8bit
    keeps the state of matrices in 2.03 bytes a parameter in place of 8, and needs torchao."""

    lr: float = 8e-4
    """Peak learning rate, which `lr_scheduler` multiplies by a factor each step."""

    beta1: float = 0.9
    """Decay rate, per step, of the running mean of gradients."""

    beta2: float = 0.95
    """Decay rate, per step, of the running mean of squared gradients."""

    eps: float = 1e-8
    """Added to the root of the mean squared gradient, against division by zero."""

    weight_decay: float = 0.1
    """Decay of matrices, embeddings included; vectors (norm weights, biases) never decay."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """One kernel for a parameter or for all (fused), one for each operation (foreach), or one for
    each parameter and operation; a device without fused kernels takes foreach, said in the log.
    AdamW8bit has one of its own."""

    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is there; refused here."""

    def __post_init__(self) -> None:
        if self.early_step_in_backward:
            raise ValueError(
                "optimizer.early_step_in_backward = true updates parameters before the global "
                "gradient norm is known, so clipping and gradient accumulation would be wrong; "
                "set it to false, and save memory with parallelism.data_parallel_shard_degree or "
                "training.enable_cpu_offload instead"
            )
        for key in ("lr", "weight_decay", "eps"):
            if getattr(self, key) < 0:
                raise ValueError(
                    f"optimizer.{key} = {getattr(self, key)} is negative; give 0 or more"
                )
        for key in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(
                    f"optimizer.{key} = {getattr(self, key)} is no rate of decay; "
                    "give a number from 0 to below 1, such as 0.9"
                )


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> Optimizer:
    """Return the optimizer over the trainable parameters, each counted once.

    There are at most two groups, decaying matrices before vectors, whatever the layout of the
    parameters, so that a checkpoint's groups fit every layout. Call it after the parameters got
    their final device and sharding.
    """
    parameters = {id(p): p for _, p in named_parameters if p.requires_grad}.values()
    if not parameters:
        raise ValueError(
            "nothing to train: every parameter of the model is frozen; "
            "leave at least one parameter trainable"
        )
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": members, "weight_decay": weight_decay}
        for members, weight_decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if members
    ]
    optimizer = _update_rule(groups, config)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def decides_on_device(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether `update_where` can be used: fused kernels on the device that computes."""
    groups = optimizer.param_groups
    return all(group.get("fused") for group in groups) and all(
        p.device.type == device.type for group in groups for p in group["params"]
    )


def update_where(optimizer: Optimizer, allowed: Tensor, factor: Tensor) -> None:
    """Update by gradients times `factor` if `allowed` says so; both are scalars on the device.

    Nothing waits for them. Where it says no, parameters, moments and step counts keep their bits.
    Fused kernels read both from the attributes that torch.amp.GradScaler sets, the factor as what
    to divide by, and so save a pass over all gradients.
    """
    attributes: Any = optimizer
    attributes.found_inf, attributes.grad_scale = allowed.logical_not().float(), 1.0 / factor
    optimizer.step()
    # Left there, they would change a later `step` of other gradients, without a word.
    del attributes.found_inf, attributes.grad_scale


class TritonAdamW(AdamW):
    """AdamW with torch's state, whose fused kernel is that of `parallelisms/triton_kernels.py`.

    It takes 10.5 ms for 1.5 billion parameters on an H200, where torch's takes 12.2, and 14.2 when
    it scales gradients as well.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters, gradients, means, squares, steps = ([] for _ in range(5))
            self._init_group(group, parameters, gradients, means, squares, [], steps)
            if not parameters:
                continue
            # As torch's own: absent outside of `update_where`.
            found_inf, grad_scale = (getattr(self, n, None) for n in ("found_inf", "grad_scale"))
            found_inf = steps[0].new_zeros(()) if found_inf is None else found_inf
            grad_scale = steps[0].new_ones(()) if grad_scale is None else grad_scale
            torch._foreach_add_(steps, [1.0 - found_inf] * len(steps))
            update = _kernel()
            for *tensors, num_steps in zip(
                parameters, gradients, means, squares, steps, strict=True
            ):
                held = [full_precision(local_part(tensor)) for tensor in tensors]
                if held[0].numel():
                    update(
                        *held,
                        num_steps=num_steps,
                        found_inf=found_inf,
                        grad_scale=grad_scale,
                        lr=float(group["lr"]),
                        betas=group["betas"],
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                    )


def _kernel() -> Callable[..., None]:
    from parallelisms.triton_kernels import update_by_adamw

    return update_by_adamw


def _fit_kernel(parameters: Iterable[nn.Parameter]) -> bool:
    held = [full_precision(local_part(parameter.detach())) for parameter in parameters]
    fit = all(x.is_cuda and x.dtype == torch.float32 and x.is_contiguous() for x in held)
    return fit and is_fusible()


def _update_rule(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    betas = (config.beta1, config.beta2)
    if config.name == "AdamW8bit":
        return AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)
    parameters = [parameter for group in groups for parameter in group["params"]]
    implementation = _available_implementation(parameters, config.implementation)
    rule = OPTIMIZERS[config.name]
    if rule is AdamW and implementation == "fused" and _fit_kernel(parameters):
        rule = TritonAdamW
    return rule(
        groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        fused=implementation == "fused",
        foreach=implementation == "foreach",
    )


def _available_implementation(parameters: Iterable[nn.Parameter], wanted: str) -> str:
    device_types = {p.device.type for p in parameters}
    without_kernel = device_types.difference(_get_fused_kernels_supported_devices())
    if wanted != "fused" or not without_kernel:
        return wanted
    log.warning(
        "optimizer.implementation = 'fused' has no kernel for parameters on %s; using 'foreach'",
        ", ".join(sorted(without_kernel)),
    )
    return "foreach"
