"""Expands a plan's patterns over a model and checks them; every parallelism reads the result.

Works on a meta model without a process group, so that a configuration can be checked anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from models.plan import ModelPlan, Role, match, match_or_raise
from parallelisms.mesh import ParallelDims

ENTRANCES: frozenset[Role] = frozenset({"gather_tokens", "split_tokens", "whole_output"})
"""Roles that describe what goes in or out of a module, not its parameters."""

SPLIT_DIM: Mapping[Role, int] = {
    "vocab_rows": 0,
    "vocab_rows_whole": 0,
    "columns": 0,
    "rows": 1,
    "columns_whole": 0,
    "rows_whole": 1,
    "vocab_columns": 0,
    "adapter_columns": 0,
    "adapter_rows": 1,
}
"""Which dim of a weight tensor parallelism splits; roles not listed replicate it."""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One line of the plan table: what one pattern means for one rank."""

    pattern: str
    role: str
    num_modules: int
    placement: str
    bytes_per_rank: int


@dataclass(frozen=True, kw_only=True)
class ResolvedPlan:
    """A plan whose patterns are replaced by the names they match, in model order."""

    first: tuple[str, ...]
    blocks: tuple[str, ...]
    last: tuple[str, ...]
    attention: tuple[str, ...]
    masks: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]
    roles: Mapping[str, Role]
    rows: tuple[PlanRow, ...]

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the linears that hold adapters: their parts lie two levels below them."""
        parts = [name for name in self.roles if self._is_part(name)]
        return frozenset(name.rsplit(".", 2)[0] for name in parts)

    def is_of_adapter(self, parameter_name: str) -> bool:
        """Say whether a parameter belongs to an adapter."""
        return self._is_part(parameter_name.rpartition(".")[0])

    def _is_part(self, name: str) -> bool:
        return self.roles.get(name, "replicated").startswith("adapter_")

    def table(self) -> str:
        """Return the plan table as text."""
        header = ("pattern", "role", "modules", "placement", "MiB per rank")
        lines = [header] + [
            (r.pattern or "(model)", r.role, str(r.num_modules), r.placement, _mib(r))
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _mib(row: PlanRow) -> str:
    return f"{row.bytes_per_rank / 2**20:,.2f}" if row.bytes_per_rank else "-"


def resolve(model: nn.Module, plan: ModelPlan, dims: ParallelDims) -> ResolvedPlan:
    """Match the plan with the model and check it against the degrees.

    Raises ValueError for a pattern without a match, a parameter without a role, parameters that
    are shared but not listed as tied, and sizes that the tensor-parallel degree does not divide.
    """
    names = [name for name, _ in model.named_modules()]

    def expand(patterns: Sequence[str]) -> tuple[str, ...]:
        found = [n for p in patterns for n in match_or_raise(names, p, "plan pattern")]
        return tuple(dict.fromkeys(found))

    roles: dict[str, Role] = {}
    for pattern, role in plan.tensor.items():
        for name in match_or_raise(names, pattern, "plan pattern"):
            roles[name] = role  # a later pattern is an exception from an earlier one
    owners = _owners(model, roles)
    _check_ties(model, plan.tied)
    if dims.tp > 1:
        _check_sizes(model, roles, dims.tp)
    return ResolvedPlan(
        first=expand(plan.first),
        blocks=expand(plan.blocks),
        last=expand(plan.last),
        attention=expand(plan.attention),
        masks=expand(plan.masks),
        tied=plan.tied,
        roles=roles,
        rows=_rows(model, plan, roles, owners, dims),
    )


def _owners(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, str]:
    """Return for each parameter the nearest enclosing module whose role says how it is split."""
    owners: dict[str, str] = {}
    orphans: list[str] = []
    for parameter_name, _ in model.named_parameters(remove_duplicate=False):
        enclosing = parameter_name.rpartition(".")[0]
        while enclosing and roles.get(enclosing, "whole_output") in ENTRANCES:
            enclosing = enclosing.rpartition(".")[0]
        if enclosing:
            owners[parameter_name] = enclosing
        else:
            orphans.append(parameter_name)
    if orphans:
        raise ValueError(
            f"the plan gives no tensor role to the parameters {', '.join(orphans)}; "
            "add their modules to ModelPlan.tensor, as 'replicated' if they are not to be split"
        )
    return owners


def _check_ties(model: nn.Module, tied: Sequence[tuple[str, str]]) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    for owner, other in tied:
        missing = [name for name in (owner, other) if name not in named]
        if missing or named[owner] is not named[other]:
            raise ValueError(
                f"the plan ties {other} to {owner}, but the model "
                + (f"has no {missing[0]}" if missing else "holds two tensors")
            )
    first_names: dict[int, str] = {}
    for name, parameter in named.items():
        first = first_names.setdefault(id(parameter), name)
        if first != name and (first, name) not in tied:
            raise ValueError(
                f"{name} and {first} are one tensor, but ModelPlan.tied does not list them; "
                f"add ({first!r}, {name!r})"
            )


def block_linears(model: nn.Module, blocks: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name; those inside another belong to it."""
    found: dict[str, nn.Linear] = {}
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            is_part = any(name.startswith(f"{other}.") for other in list(found)[-1:])
            if isinstance(module, nn.Linear) and not is_part:
                found[name] = module
    return found


def divisors(number: int) -> list[int]:
    """Return every whole number that divides `number`, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _check_sizes(model: nn.Module, roles: Mapping[str, Role], tp: int) -> None:
    for name, role in roles.items():
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if role.startswith("vocab") and weight is not None:
            _check_vocabulary(name, weight.shape[0], tp)
        if role not in SPLIT_DIM or role.startswith("vocab") or not isinstance(module, nn.Linear):
            continue
        size, unit = module.weight.shape[SPLIT_DIM[role]], "channels"
        head_dim = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
        if head_dim:
            # A rank must hold whole heads; the smaller count is that of keys and values.
            size, unit = size // head_dim, "attention heads"
            unit = "key/value heads" if name.endswith(("k_proj", "v_proj")) else unit
        if size % tp:
            allowed = ", ".join(map(str, divisors(size)[:12]))
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {tp} does not divide the {size} {unit} of "
                f"{name}; use one of {allowed}, and raise "
                "parallelism.data_parallel_shard_degree instead"
            )


def _check_vocabulary(name: str, num_rows: int, tp: int) -> None:
    """Uneven parts are fine, an empty one is not."""
    if -(-num_rows // tp) * (tp - 1) >= num_rows:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {tp} cuts the {num_rows} rows of {name} over "
            f"{tp} ranks such that one holds none; use a smaller degree"
        )


def _rows(
    model: nn.Module,
    plan: ModelPlan,
    roles: Mapping[str, Role],
    owners: Mapping[str, str],
    dims: ParallelDims,
) -> tuple[PlanRow, ...]:
    bytes_of: dict[str, int] = dict.fromkeys(roles, 0)
    for name, parameter in model.named_parameters():  # a tied parameter counts for its owner
        split = SPLIT_DIM.get(roles[owners[name]])
        shape = list(parameter.shape)
        if split is not None and split < len(shape):
            shape[split] = -(-shape[split] // dims.tp)
        shape[0] = -(-shape[0] // dims.fsdp_degree)
        numel = 1
        for size in shape:
            numel *= size
        bytes_of[owners[name]] += numel * parameter.element_size()
    names = list(roles)
    rows, seen = [], set[str]()
    for pattern, role in reversed(list(plan.tensor.items())):
        matched = [n for n in match(names, pattern) if n not in seen]
        seen.update(matched)
        rows.append(
            PlanRow(
                pattern=pattern,
                role=role,
                num_modules=len(matched),
                placement=_placement(role, dims),
                bytes_per_rank=sum(bytes_of[n] for n in matched),
            )
        )
    return tuple(reversed(rows))


def _placement(role: Role, dims: ParallelDims) -> str:
    if role in ENTRANCES:
        return "-"
    parts = []
    if dims.tp > 1:
        split = SPLIT_DIM.get(role)
        parts.append("tp: replicated" if split is None else f"tp: dim {split} / {dims.tp}")
    if dims.fsdp_degree > 1:
        parts.append(f"fsdp: dim 0 / {dims.fsdp_degree}")
    if dims.dp_replicate > 1:
        parts.append(f"copies: {dims.dp_replicate}")
    return ", ".join(parts) or "whole"
