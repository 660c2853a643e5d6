"""Which parameters are trained: what is left of a model by the entries of `model.freeze`."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn import Parameter

from models.plan import match_expression, match_or_raise


def trainable_names(model: nn.Module, frozen: Sequence[str], blocks: Sequence[str]) -> set[str]:
    """Return the names of the parameters that are trained; a tied pair is frozen by either name.

    An entry of `frozen` is a pattern of names of parameters or of modules with all they hold,
    `regex:` and an expression that matches whole parameter names, or `blocks:` and which of
    `blocks` (in model order) are frozen: `bottom:n` the first n, `top:n` the last n,
    `interweave:n` all but every n-th.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    stopped = {id(p) for entry in frozen for p in _matched(entry, named, blocks)}
    return {n for n, p in model.named_parameters() if p.requires_grad and id(p) not in stopped}


def _matched(entry: str, named: Mapping[str, Parameter], blocks: Sequence[str]) -> list[Parameter]:
    kind, colon, rest = entry.partition(":")
    if kind == "regex" and colon:
        found = match_expression(list(named), rest, "model.freeze", "parameter")
        return [named[name] for name in found]
    if kind == "blocks" and colon:
        found = _chosen_blocks(entry, rest, blocks)
    elif colon:
        raise ValueError(
            f"model.freeze: {entry!r} begins with {kind!r}; give a pattern of names, 'regex:' and "
            "an expression, or 'blocks:' and bottom:n, top:n or interweave:n"
        )
    else:
        found = match_or_raise(_paths(named), entry, "model.freeze pattern")
    return [p for name, p in named.items() if any(_is_under(name, path) for path in found)]


def _chosen_blocks(entry: str, choice: str, blocks: Sequence[str]) -> list[str]:
    word, _, digits = choice.partition(":")
    number = int(digits) if digits.isdecimal() else 0
    least = 2 if word == "interweave" else 1  # all but every first would be none
    if word not in ("bottom", "top", "interweave") or number < least:
        raise ValueError(
            f"model.freeze: {entry!r} chooses no blocks; write blocks:bottom:n or blocks:top:n "
            "with n from 1, or blocks:interweave:n with n from 2"
        )
    if number > len(blocks):
        raise ValueError(
            f"model.freeze: {entry!r} asks for {number} of the model's {len(blocks)} blocks; give "
            f"at most {len(blocks)}"
        )
    if word == "interweave":
        return [name for place, name in enumerate(blocks, 1) if place % number]
    return list(blocks[:number] if word == "bottom" else blocks[-number:])


def _paths(names: Mapping[str, Parameter]) -> list[str]:
    """Return the names of parameters and of every module that holds one."""
    parts = [name.split(".") for name in names]
    paths = [".".join(p[:end]) for p in parts for end in range(1, len(p) + 1)]
    return list(dict.fromkeys(paths))


def _is_under(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")
