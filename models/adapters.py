"""Rewrites a model and its plan for adapters: which linears get some, and how they are split."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from models.layers.lora import PARTS, LoRALinear, adapted_linears, adapter_of, scale_of
from models.plan import ModelPlan, Role, match, match_expression, nearest_names
from models.sizes import Weight

ALL_LINEAR = "all-linear"
REGEX = "regex:"

ROLES_OF_PARTS: Mapping[Role, tuple[Role, Role, Role]] = {
    "columns": ("adapter_whole", "adapter_columns", "adapter_columns"),
    "columns_whole": ("adapter_whole", "adapter_columns", "adapter_columns"),
    "rows": ("adapter_rows", "adapter_whole", "adapter_whole"),
    "rows_whole": ("adapter_rows", "adapter_whole", "adapter_whole"),
    "replicated": ("adapter_whole", "adapter_whole", "adapter_whole"),
}
"""Roles of `PARTS` by that of the linear: what meets its inputs or outputs is split as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One adapter: its kind, its size and the layers that get it."""

    name: str
    kind: Literal["lora", "dora"]
    rank: int
    alpha: float
    use_rslora: bool = False
    dropout: float = 0.0
    targets: Sequence[str] = (ALL_LINEAR,)
    """Last parts of module names as a pattern (`*` within one dot-separated part), `regex:` and an
    expression for whole module names, or "all-linear", which is every linear of the blocks."""

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return scale_of(self.rank, self.alpha, use_rslora=self.use_rslora)


def adapt(model: nn.Module, plan: ModelPlan, specs: Sequence[AdapterSpec]) -> ModelPlan:
    """Give the targeted linears of a meta model their adapters, in place; return the new plan.

    Without `specs` nothing changes. Otherwise only adapters are left to train. A linear that
    several adapters target holds them all. Raises ValueError, before anything is changed, for a
    target that matches nothing or that cannot be adapted.
    """
    targets = {spec.name: find_targets(model, plan, spec) for spec in specs}
    if not specs:
        return plan
    model.requires_grad_(False)
    for spec in specs:
        for name in targets[spec.name]:
            _adapted(model, name).add(
                spec.name,
                rank=spec.rank,
                scale=spec.scale,
                dropout=spec.dropout,
                has_magnitude=spec.kind == "dora",
            )
    return replace(plan, tensor={**plan.tensor, **_roles(model, plan)})


def find_targets(model: nn.Module, plan: ModelPlan, spec: AdapterSpec) -> list[str]:
    """Return the names of the linears that an adapter targets, in model order."""
    modules = {name: module for name, module in model.named_modules() if name}
    roles = _module_roles(modules, plan)
    found: dict[str, None] = {}
    for target in spec.targets:
        for name in _matched(target, modules, plan):
            reason = _unfit(name, modules[name], roles.get(name), plan)
            if reason is not None:
                raise ValueError(
                    f"adapter.targets: {target!r}, of the adapter {spec.name!r}, matches {name}, "
                    f"and {reason}; match linears of the blocks alone, or give {ALL_LINEAR!r}"
                )
            found[name] = None
    return [name for name in modules if name in found]


def _matched(target: str, modules: Mapping[str, nn.Module], plan: ModelPlan) -> list[str]:
    names = list(modules)
    if target == ALL_LINEAR:
        blocks = {block for pattern in plan.blocks for block in match(names, pattern)}
        inside = [n for n in names if any(n.startswith(f"{block}.") for block in blocks)]
        found = [name for name in inside if _is_plain(modules[name])]
        if not found:
            kinds = sorted({type(modules[name]).__name__ for name in inside})
            raise ValueError(
                f"adapter.targets: {target!r} matches nothing, since the blocks of the model hold "
                f"no linear, but {', '.join(kinds)}; such a model cannot be adapted"
            )
        return found
    if target.startswith(REGEX):
        return match_expression(names, target.removeprefix(REGEX), "adapter.targets", "module")
    depth = target.count(".") + 1
    ends = {name: ".".join(name.split(".")[-depth:]) for name in names}
    found = [name for name, end in ends.items() if match([end], target)]
    if not found:
        hint = nearest_names(target, list(dict.fromkeys(ends.values())))
        raise ValueError(
            f"adapter.targets: {target!r} matches the end of no module's name in the model{hint}"
        )
    return found


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward in (
        nn.Linear.forward,
        LoRALinear.forward,
    )


def _unfit(name: str, module: nn.Module, role: Role | None, plan: ModelPlan) -> str | None:
    """Say why a module cannot be adapted, or None if it can."""
    weight = f"{name}.weight"
    for owner, other in plan.tied:
        if weight in (owner, other):
            twin = (other if weight == owner else owner).removesuffix(".weight")
            return f"its weight is that of {twin} too, which would change with it"
    if not _is_plain(module):
        return f"it is no plain linear but a {type(module).__name__}"
    if role is not None and role not in ROLES_OF_PARTS:
        return f"the model's plan treats it as {role!r}, which has no part for adapters"
    return None


def _module_roles(names: Iterable[str], plan: ModelPlan) -> dict[str, Role]:
    names = list(names)
    return {name: role for p, role in plan.tensor.items() for name in match(names, p)}


def _adapted(model: nn.Module, name: str) -> LoRALinear:
    """Return the linear of this name, replaced by one that can hold adapters if it is not yet."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), "its kind was looked at"
    if isinstance(module, LoRALinear):
        return module
    adapted = LoRALinear(module)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, adapted)
    return adapted


def _roles(model: nn.Module, plan: ModelPlan) -> dict[str, Role]:
    """Return the roles of the adapters' parts, one pattern for each of the plan's and each part."""
    names = [name for name, _ in adapted_linears(model)]
    found: dict[str, Role] = {}
    for pattern, role in plan.tensor.items():
        if role not in ROLES_OF_PARTS:
            continue
        linears = [model.get_submodule(name) for name in match(names, pattern)]
        for part, part_role in zip(PARTS, ROLES_OF_PARTS[role], strict=True):
            if any(len(getattr(linear, part)) for linear in linears):
                found[f"{pattern}.{part}.*"] = part_role
    return found


def adapter_weights(parameters: Iterable[tuple[str, int]]) -> dict[str, list[Weight]]:
    """Return the parameters of adapters by the name of the weight that they lie beside.

    `parameters` are names with numbers of elements. A magnitude is no matrix.
    """
    found: dict[str, list[Weight]] = {}
    for name, num_elements in parameters:
        if adapter_of(name) is not None:
            linear, part, _, _ = name.rsplit(".", 3)
            weight = Weight(name, num_elements, part != "lora_magnitude_vector")
            found.setdefault(f"{linear}.weight", []).append(weight)
    return found
