"""What a configuration asks of low precision: float8 layers, frozen weights in four bits; rules.

The arithmetic is `parallelisms/low_precision.py` and `parallelisms/nf4.py`.
"""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.optim import Optimizer

from engine.objectives import WITH_REFERENCE
from engine.rules import Facts, Rule
from parallelisms.low_precision import HARDWARE_MULTIPLE, Float8, follow_weights

if TYPE_CHECKING:
    from engine.config import JobConfig

log = logging.getLogger("tessera")

FLOAT8_NAMES = ("float8", "quantize.linear.float8")
"""Spellings of the float8 converter; the second is that of torchtitan 0.2.2."""

NF4_NAME = "nf4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8LinearConfig:
    """Float8 training of the blocks' linear layers; model.converters = ["float8"] turns it on."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather parameters in float8, half the bytes of bfloat16; for the recipe tensorwise."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all gathered parameters at once after an update, with one reduction in
    place of one each; needs enable_fsdp_float8_all_gather."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """One scale for a tensor (fastest, and the default), one for each row (closer), or that with
    the weight gradients' products in the usual precision."""

    filter_fqns: list[str] = field(default_factory=list[str])
    """Parts of names of modules to leave alone, such as "attention" or "layers.0."."""

    emulate: bool = False
    """Round to float8 and multiply in the usual precision: on any device, and slower."""


def float8_of(config: "JobConfig") -> Float8 | None:
    """Return how linear layers become float8 ones; None where they do not."""
    if not set(config.model.converters) & set(FLOAT8_NAMES):
        return None
    section = config.quantize.linear.float8
    return Float8(
        recipe=section.recipe_name or "tensorwise",
        gathers_float8=section.enable_fsdp_float8_all_gather,
        precomputes_scales=section.precompute_float8_dynamic_scale_for_fsdp,
        emulates=section.emulate,
        pads_tokens=_may_have_odd_tokens(config),
        left_out=tuple(section.filter_fqns),
    )


def _may_have_odd_tokens(config: "JobConfig") -> bool:
    """Say whether the tokens that a rank holds of a microbatch may be no multiple of 16."""
    if config.data.packing == "none" or config.data.batch_tokens:
        return True
    # Of one row: how many a microbatch has, up to local_batch_size, depends on the ranks.
    row_multiple = HARDWARE_MULTIPLE * config.parallelism.context_parallel_degree
    return config.training.seq_len % row_multiple != 0


def packs_frozen(config: "JobConfig") -> bool:
    """Say whether frozen linear layers are kept in four bits."""
    return NF4_NAME in config.model.converters


def log_conversion(config: "JobConfig", model: nn.Module) -> None:
    """Say what of low precision a person should know, and show the model where it is asked for."""
    if config.model.print_after_conversion and config.model.converters:
        log.info("model after conversion: %s", model)
    float8 = float8_of(config)
    if float8 is None:
        return
    if not config.compile.compiles("model"):
        log.warning("float8 without compile.enable: casts are kernels of their own, which is slow")
    if float8.precomputes_scales and not float8.gathers_float8:
        log.warning(
            "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp has no effect "
            "without enable_fsdp_float8_all_gather"
        )


def follow_updates(config: "JobConfig", model: nn.Module, optimizer: Optimizer) -> None:
    """Let scales of gathered float8 weights be computed after each update, where that is asked."""
    float8 = float8_of(config)
    if float8 is not None and float8.gathers_float8 and float8.precomputes_scales:
        follow_weights(model, optimizer)


def _float8(facts: Facts) -> Float8 | None:
    return float8_of(facts.config)


def _packs(facts: Facts) -> bool:
    return packs_frozen(facts.config)


LOW_PRECISION_RULES = (
    Rule(
        id="converters_that_are_not_there",
        keys=("model.converters",),
        applies=lambda f: bool(set(f.config.model.converters) - {*FLOAT8_NAMES, NF4_NAME}),
        reason="the rewrites of a model that there are: 'float8' and 'nf4'",
        remedy="leave others out, and train in bfloat16",
    ),
    Rule(
        id="float8_and_four_bits",
        keys=("model.converters",),
        applies=lambda f: _float8(f) is not None and _packs(f),
        reason="a layer is either trained in float8 or frozen in four bits",
        remedy="choose one of the two",
    ),
    Rule(
        id="float8_on_a_device_without_it",
        keys=("model.converters", "quantize.linear.float8.emulate"),
        applies=lambda f: (
            (chosen := _float8(f)) is not None and not chosen.emulates and not f.multiplies_float8
        ),
        reason=(
            "float8 products need GPUs of compute capability {f.float8_capability} (Ada, Hopper) "
            "or later"
        ),
        remedy=(
            "take 'float8' out, or set quantize.linear.float8.emulate = true to try its numbers, "
            "slowly"
        ),
    ),
    Rule(
        id="float8_beside_adapters",
        keys=("model.converters", "adapter.kind"),
        applies=lambda f: _float8(f) is not None and bool(f.config.adapter.specs),
        reason=(
            "frozen layers would be cast to float8 for every pass, for gradients that nobody wants"
        ),
        remedy="take 'float8' out, or train the model itself with adapter.kind = 'none'",
    ),
    Rule(
        id="float8_without_its_package",
        keys=("model.converters",),
        applies=lambda f: f.is_here and _float8(f) is not None and "torchao" in f.missing,
        reason="the package torchao is not installed",
        remedy="pip install torchao, or take 'float8' out",
    ),
    Rule(
        id="float8_gathering_of_scaled_rows",
        keys=(
            "quantize.linear.float8.enable_fsdp_float8_all_gather",
            "quantize.linear.float8.recipe_name",
        ),
        applies=lambda f: (
            (chosen := _float8(f)) is not None
            and chosen.gathers_float8
            and chosen.recipe != "tensorwise"
        ),
        reason="what is gathered in float8 has one scale for the whole tensor",
        remedy="set recipe_name = 'tensorwise', or enable_fsdp_float8_all_gather = false",
    ),
    Rule(
        id="eight_bit_state_without_its_package",
        keys=("optimizer.name",),
        applies=lambda f: (
            f.is_here
            and f.trains
            and f.config.optimizer.name == "AdamW8bit"
            and "torchao" in f.missing
        ),
        reason="the package torchao, which has its tables, is not installed",
        remedy="pip install torchao, or set optimizer.name = 'AdamW'",
    ),
    Rule(
        id="four_bits_where_nothing_is_frozen",
        keys=("model.converters", "model.freeze"),
        applies=lambda f: _packs(f) and not f.freezes_weights,
        reason="only frozen weights are kept in four bits, and all are trained",
        remedy="train adapters (adapter.kind) or freeze linears with model.freeze, or leave it out",
    ),
    Rule(
        id="four_bits_with_tensor_parallelism",
        keys=("model.converters", "parallelism.tensor_parallel_degree"),
        applies=lambda f: _packs(f) and f.tp > 1,
        reason="scales of a row share a factor, so that a part of a row would be other numbers",
        remedy="set it to 1, and raise parallelism.data_parallel_shard_degree instead",
    ),
    Rule(
        id="four_bits_in_host_memory",
        keys=("model.converters", "training.enable_cpu_offload"),
        applies=lambda f: _packs(f) and f.config.training.enable_cpu_offload,
        reason="packed rows would cross from the host for every pass, to save half a byte a weight",
        remedy="set enable_cpu_offload = false",
    ),
    Rule(
        id="four_bits_that_stay_gathered",
        keys=("model.converters", "parallelism.fsdp_reshard_after_forward"),
        applies=lambda f: _packs(f) and f.config.parallelism.fsdp_reshard_after_forward == "never",
        reason="blocks would stay dequantised after their forward pass, as large as unpacked ones",
        remedy="set it to 'default'",
    ),
    Rule(
        id="four_bits_beside_a_whole_reference",
        keys=("model.converters", "objective.name"),
        applies=lambda f: (
            _packs(f) and f.config.objective.name in WITH_REFERENCE and not f.config.adapter.specs
        ),
        reason="the answers would be compared with those of the unpacked model, kept beside it",
        remedy="train adapters, without which the base is the reference, or take 'nf4' out",
    ),
)
"""What low precision cannot be combined with."""
