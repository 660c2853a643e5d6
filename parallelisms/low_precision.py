"""Float8 linear layers and 8-bit AdamW, through torchao: the only file that imports it.

Checked with torchao 0.16 and 0.18. Four-bit weights, which do not need it, are `nf4.py`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from parallelisms.nf4 import is_fusible, local_part
from parallelisms.resolve import SPLIT_DIM, ResolvedPlan, block_linears
from parallelisms.stored import full_precision, zeros_by_rows

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]

HARDWARE_MULTIPLE = 16
"""What both sides of a matrix must be a multiple of for the GPU's float8 products."""

STATE_BLOCK = 256
"""Numbers of a row of optimizer state that share a scale. Source: arXiv:2110.02861 with the block
of torchao and bitsandbytes."""

MIN_STATE_SIZE = 4096
"""Smaller parameters keep their state in their own dtype, as bitsandbytes does in 32 bits."""

CODES, SCALES = "_codes", "_scales"


# ---- float8 linear layers --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8:
    """How the linear layers of the blocks are multiplied in float8."""

    recipe: Recipe = "tensorwise"
    """One scale a tensor, or one a row; `rowwise_with_gw_hp` keeps the weight gradient's product
    in the usual precision."""

    gathers_float8: bool = False
    """FSDP gathers weights in float8; for the recipe tensorwise."""

    precomputes_scales: bool = False
    """The scales of what is gathered are computed at once, after an update."""

    emulates: bool = False
    """Round to float8 and multiply in the usual precision, on any device."""

    pads_tokens: bool = False
    """The tokens of a microbatch may be no multiple of 16, which products over them must be."""

    left_out: tuple[str, ...] = ()
    """Parts of names of modules to leave alone."""


def convert_linears(
    model: nn.Module, plan: ResolvedPlan, float8: Float8, *, tp: int
) -> dict[str, str]:
    """Replace the linear layers of the blocks of a meta model by float8 ones, in place.

    Names, and the roles of tensor parallelism, stay. Returns the layers that stay as they are with
    the reason. ValueError where no layer can be converted.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    settings = replace(
        Float8LinearConfig.from_recipe_name(float8.recipe),
        enable_fsdp_float8_all_gather=float8.gathers_float8,
        emulate=float8.emulates,
        pad_inner_dim=float8.pads_tokens and not float8.emulates,
    )
    inside = block_linears(model, plan.blocks)
    left = {
        name: reason
        for name, module in inside.items()
        if (reason := _reason(name, module, plan, float8, tp)) is not None
    }
    if len(left) == len(inside):
        first = next((f"{name}: {reason}" for name, reason in left.items()), "there is none")
        raise ValueError(
            f'model.converters has "float8", and no linear layer of the blocks can be converted '
            f"({first}); take it out"
        )
    convert_to_float8_training(
        model,
        module_filter_fn=lambda module, name: name in inside and name not in left,
        config=settings,
    )
    _cast_in_fewer_steps()
    _lay_out_by_transposing()
    if float8.gathers_float8:
        _cast_at_once()
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in inside]
    return left | dict.fromkeys(others, "it is outside the blocks, as the head is")


def _reason(
    name: str, module: nn.Linear, plan: ResolvedPlan, float8: Float8, tp: int
) -> str | None:
    """Say why a layer stays as it is, or None."""
    if any(part in name for part in float8.left_out):
        return "quantize.linear.float8.filter_fqns names it"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} computes its own product"
    sizes = list(module.weight.shape)
    split = SPLIT_DIM.get(plan.roles.get(name, "replicated"))
    if split is not None:
        sizes[split] //= tp
    if any(size % HARDWARE_MULTIPLE for size in sizes):
        return f"a rank's {sizes[0]} x {sizes[1]} weights are no multiples of {HARDWARE_MULTIPLE}"
    return None


def _cast_in_fewer_steps() -> None:
    """Leave out of casts what torchao has compiled kernels do anew for every few numbers.

    Scales are computed in single precision in place of double. And nothing is cut to the largest
    number: each scale is that of the tensor which is cast, so only rounding exceeds it, and
    converting rounds that back. This saves 5 of 368 ms in a step of 8 blocks of Llama 8B.
    """
    from torchao.float8 import float8_training_tensor, float8_utils

    if float8_utils.amax_to_scale.__module__ == __name__:
        return
    rounded_down = float8_utils._round_scale_down_to_power_of_2

    @torch.no_grad()
    def amax_to_scale(
        amax: Tensor, float8_dtype: torch.dtype, round_scales_to_power_of_2: bool = False
    ) -> Tensor:
        scale = torch.finfo(float8_dtype).max / amax.float().clamp(min=float8_utils.EPS)
        return rounded_down(scale) if round_scales_to_power_of_2 else scale

    float8_utils.amax_to_scale = amax_to_scale
    float8_training_tensor.to_fp8_saturated = Tensor.to


def _cast_at_once() -> None:
    """Let what FSDP gathers be cast in one pass over memory, where torchao's cast takes three.

    It runs before every gathering, outside of the compiled blocks.
    """
    from torchao.float8.float8_utils import tensor_to_scale
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    @torch.no_grad()
    def pre_all_gather(weight: Any, mesh: DeviceMesh) -> tuple[tuple[Tensor], tuple[Tensor]]:
        values, dtype, scale = weight._tensor, weight._dtype, weight._precomputed_scale
        if scale is None:
            scale = tensor_to_scale(values, dtype, reduce_amax=True, device_mesh=mesh)
        flat = _cast(values.device.type)(values.reshape(-1), scale, dtype)
        return (flat.view(values.shape),), (scale,)

    # In the class: its operations return it, so that FSDP would lose a subclass of it.
    WeightWithDynamicFloat8CastTensor.fsdp_pre_all_gather = pre_all_gather  # pyright: ignore


def scaled_bits(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` times a scale, at most the largest number of a float8 dtype, as that."""
    largest = torch.finfo(dtype).max
    return (values.float() * scale).clamp(-largest, largest).to(dtype)


@lru_cache
def _cast(device_type: str) -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    """Return `scaled_bits`; on GPUs one kernel for all lengths, where it can be compiled."""
    if device_type != "cuda" or not is_fusible():
        return scaled_bits
    return torch.compile(scaled_bits, fullgraph=True, dynamic=True)


def _lay_out_by_transposing() -> None:
    """Let a kernel of its own transpose the operands of products that are gradients of weights.

    GPUs multiply float8 along the rows of both operands alone. The compiler would make the
    transposing a part of the kernels which cast, and of those that go along rows, as the norms' do,
    it makes ones that write single bytes, each far from the next: 15 of 220 ms in a step of 8
    blocks of Llama 8B. A weight, which no such kernel casts, stays with the compiler: transposed
    apart it would be kept from the forward pass on, a byte for each of its numbers.
    """
    from torchao.float8 import float8_ops
    from torchao.float8.float8_training_tensor import GemmInputRole
    from torchao.float8.float8_utils import is_row_major

    if float8_ops.preprocess_addmm.__module__ == __name__:
        return
    checked_and_laid_out = float8_ops.preprocess_addmm

    def preprocess_addmm(left: Any, right: Any) -> Any:
        if left._linear_mm_config.output.emulate:  # its product takes operands as they are
            return checked_and_laid_out(left, right)
        if not is_row_major(left._data.stride()):
            left = _with_bits(left, transposed(left._data.t()))
        is_weight = right._gemm_input_role is GemmInputRole.WEIGHT
        if is_row_major(right._data.stride()) and not is_weight:
            right = _with_bits(right, transposed(right._data).t())
        return checked_and_laid_out(left, right)

    float8_ops.preprocess_addmm = preprocess_addmm


def _with_bits(operand: Any, bits: Tensor) -> Any:
    """Return a float8 tensor of torchao with its bits laid out otherwise."""
    names, settings = operand.__tensor_flatten__()
    inner = {**{name: getattr(operand, name) for name in names}, "_data": bits}
    return type(operand).__tensor_unflatten__(inner, settings, operand.size(), bits.stride())


def transposed(matrix: Tensor) -> Tensor:
    """Return a matrix (M, N) of float8 as (N, M) in memory of its own."""
    is_known = all(isinstance(size, int) for size in matrix.shape)  # not one of dynamic shapes
    if not (matrix.is_cuda and is_fusible() and is_known):
        return matrix.t().contiguous()
    from parallelisms.triton_kernels import transposed as transposed_on_gpu

    return transposed_on_gpu(matrix.contiguous())


def follow_weights(model: nn.Module, optimizer: Optimizer) -> None:
    """Compute the float8 scales of all weights at once after each update, with one reduction."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    def compute(*_: object) -> None:
        precompute_float8_dynamic_scale_for_fsdp(model)

    optimizer.register_step_post_hook(compute)


# ---- 8-bit AdamW --------------------------------------------------------------------------------


class AdamW8bit(Optimizer):
    """AdamW whose running means are bytes, with one scale for each 256 of a row.

    Rules and tables are torchao's; the state is kept as plain tensors laid out as the parameters,
    so that checkpoints hold it and other numbers of ranks can read it. A matrix is kept so where
    each rank's rows are whole blocks; other state has the parameters' dtype.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # A tensor: a number would be a new program for every learning rate.
            rate = torch.tensor(group["lr"], dtype=torch.float32)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                slots = self.state[parameter] or self._start(parameter)
                slots["step"] += 1
                values = local_part(full_precision(parameter.detach()))
                if not values.numel():
                    continue
                means = (_mean(slots, name, is_signed) for name, is_signed in _MEANS)
                # One program for each shape, and a model has more of them than the limit.
                with torch._dynamo.utils.disable_cache_limit():
                    _rule(values.device.type)(
                        *(values, local_part(parameter.grad), slots["step"], *means, None, rate),
                        *(*group["betas"], group["weight_decay"], group["eps"], True, False),
                    )

    def _start(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        slots: dict[str, Tensor] = {"step": torch.tensor(0.0)}
        columns = parameter.shape[-1]
        in_blocks = parameter.ndim == 2 and local_part(parameter).shape[-1] % STATE_BLOCK == 0
        plain = full_precision(parameter.detach())
        for name, _ in _MEANS:
            if not in_blocks or parameter.numel() < MIN_STATE_SIZE:
                slots[name] = torch.zeros_like(plain)
                continue
            slots[name + CODES] = torch.zeros_like(plain, dtype=torch.uint8)
            shape = (parameter.shape[0], columns // STATE_BLOCK)
            slots[name + SCALES] = zeros_by_rows(parameter, shape, torch.float32)
        self.state[parameter] = slots
        return slots

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over bytes as they are, and turn means that AdamW kept in numbers into bytes."""
        # The base class would turn bytes into the parameters' dtype.
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, slots in state_dict["state"].items():
            self.state[parameters[number]] = self._in_bytes(parameters[number], dict(slots))

    def _in_bytes(self, parameter: nn.Parameter, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of a parameter as `_start` lays it out, where it was not in bytes."""
        if any(name + CODES in found for name, _ in _MEANS):
            return found
        slots = self._start(parameter)
        for name, is_signed in _MEANS:
            if name in slots:
                slots[name] = found[name]
            else:
                _mean(slots, name, is_signed).copy_(local_part(found[name]))
        return {**slots, "step": found["step"]}


def refuse_other_state(optimizer: Optimizer, names: Collection[str]) -> None:
    """Raise ValueError where the state slots of a checkpoint are another optimizer's."""
    has_codes = any(name.endswith(CODES) for name in names)
    if has_codes and not isinstance(optimizer, AdamW8bit):
        raise ValueError(
            "the checkpoint's optimizer state is that of optimizer.name = 'AdamW8bit', and this "
            "run's optimizer is another; set optimizer.name = 'AdamW8bit', or leave the state out "
            "with checkpoint.exclude_from_loading = ['optimizer']"
        )


_MEANS = (("exp_avg", True), ("exp_avg_sq", False))
"""State slots of Adam, and whether the numbers have a sign."""


def _mean(slots: Mapping[str, Tensor], name: str, is_signed: bool) -> Tensor:
    """Return this rank's part of a running mean, as what torchao's rule reads and writes."""
    if name in slots:
        return local_part(slots[name])
    from torchao.optim.subclass_8bit import OptimState8bit

    codes, scales = local_part(slots[name + CODES]), local_part(slots[name + SCALES])
    return OptimState8bit(codes, scales.view(-1), _table(is_signed, codes.device), is_signed)


@lru_cache
def _table(is_signed: bool, device: torch.device) -> Tensor:
    """Return the 256 numbers that bytes stand for."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed=is_signed), device=device)


@lru_cache
def _rule(device_type: str) -> Callable[..., None]:
    """Return torchao's update of one parameter; on GPUs one kernel for each shape."""
    from torchao.optim.adam import single_param_adam

    if device_type != "cuda":
        return single_param_adam
    return torch.compile(single_param_adam, fullgraph=True, dynamic=False)
