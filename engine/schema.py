"""What a tree of config dataclasses says about itself: keys, types, defaults, sentences.

`engine/cli.py` fills such a tree from a file and a command line, `engine/run_folder.py` compares
two of them; neither knows a section by name.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

NONE_WORD = "None"
"""How a file spells the absence of a value, since TOML has no word for it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One key that a user can set."""

    key: str
    hint: Any
    default: Any
    sentence: str


def leaves(cls: type) -> dict[str, Leaf]:
    """Return every key below the dataclass `cls` (which needs no arguments), in file order."""
    return {leaf.key: leaf for leaf in _walk(cls, cls(), "")}


def _walk(cls: type, default: Any, prefix: str) -> Iterator[Leaf]:
    hints = get_type_hints(cls)
    sentences = field_sentences(cls)
    for field in dataclasses.fields(cls):
        key, value = prefix + field.name, getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(type(value), value, f"{key}.")
        else:
            sentence = sentences.get(field.name, "")
            yield Leaf(key=key, hint=hints[field.name], default=plain(value), sentence=sentence)


@cache
def _class_definitions(module_name: str) -> dict[str, ast.ClassDef]:
    source = inspect.getsource(sys.modules[module_name])
    nodes = ast.walk(ast.parse(source))
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def field_sentences(cls: type) -> dict[str, str]:
    """Return the string that stands under each field of `cls`, its base classes included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = _class_definitions(base.__module__)[base.__name__].body
        for statement, following in itertools.pairwise(body):
            if not (
                isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            ):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def table_class(hint: Any) -> type | None:
    """Return the dataclass of a list of tables such as `[[data.sources]]`; none of other hints."""
    item = get_args(hint)[0] if get_origin(hint) is list else None
    return item if isinstance(item, type) and dataclasses.is_dataclass(item) else None


def table_leaves(cls: type) -> dict[str, Leaf]:
    """Return the keys of one table of a list by name; the default of a required one is MISSING."""
    hints, sentences = get_type_hints(cls), field_sentences(cls)
    found: dict[str, Leaf] = {}
    for field in dataclasses.fields(cls):
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        found[field.name] = Leaf(
            key=field.name,
            hint=hints[field.name],
            default=default,
            sentence=sentences.get(field.name, ""),
        )
    return found


def plain(value: Any) -> Any:
    """Return a list of tables as `{name: value}` each; any other value as it is."""
    if not isinstance(value, list):
        return value
    items = typing.cast("list[Any]", value)
    return [flatten(item) if dataclasses.is_dataclass(item) else item for item in items]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{key: value}` for every key of a config tree, in file order.

    A list of tables is one key, and its value a list of such dictionaries.
    """
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = plain(value)
    return flat


def value_of(config: Any, key: str) -> Any:
    """Return the value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def construct(cls: type[Config], values: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """Build the tree from `{key: value}`; return it, or None and what the sections refused."""
    problems: list[str] = []
    return _construct(cls, cls(), values, "", problems), problems


def _construct(
    cls: Any, default: Any, values: Mapping[str, Any], prefix: str, problems: list[str]
) -> Any:
    arguments: dict[str, Any] = {}
    complete = True
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, value = prefix + field.name, getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            value = _construct(type(value), value, values, f"{key}.", problems)
            complete = complete and value is not None
        value = values.get(key, value)
        if item := table_class(hints[field.name]):
            value = [_table(item, table, f"{key}.", problems) for table in value]
            complete = complete and None not in value
        arguments[field.name] = value
    if not complete:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:
        problems.append(_with_full_keys(str(error), prefix))
        return None


def _table(cls: type, table: Any, prefix: str, problems: list[str]) -> Any:
    """Build one table of a list; its messages begin with the list's own name and the entry's."""
    try:
        return cls(**table) if isinstance(table, dict) else table
    except ValueError as error:
        problems.append(_with_full_keys(str(error), prefix))
        return None


def _with_full_keys(message: str, prefix: str) -> str:
    """Complete the keys in a nested section's message, which knows only its own name."""
    name = prefix.rstrip(".").rpartition(".")[2]
    return re.sub(rf"(?<![\w.]){name}\.", prefix, message) if name else message


def raise_mistakes(problems: Sequence[str]) -> None:
    """Raise one ValueError that holds every message; do nothing where there is none."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        lines = [f"{len(problems)} mistakes in the configuration:", *problems]
        raise ValueError("\n  - ".join(lines))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{key: value}` as nested tables ready for TOML: None becomes its word."""
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, name = key.split(".")
        table = root
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = _to_toml(value)
    return root


def _to_toml(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_toml(item) for item in typing.cast("list[Any]", value)]
    if isinstance(value, dict):
        items = typing.cast("dict[str, Any]", value).items()
        return {name: _to_toml(item) for name, item in items}
    return NONE_WORD if value is None else value


def _choices(hint: Any) -> list[Any]:
    return [c for part in _parts(hint) if get_origin(part) is Literal for c in get_args(part)]


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def accepts(hint: Any, value: object) -> bool:
    """Say whether `value`, as a TOML parser gives it, is of type `hint`; 1 is a valid float."""
    for part in _parts(hint):
        origin = get_origin(part)
        if part is type(None):
            matches = value is None
        elif origin is Literal:
            matches = any(type(value) is type(c) and value == c for c in get_args(part))
        elif origin is list:
            (item,) = get_args(part)
            matches = isinstance(value, list) and all(
                accepts(item, v) for v in typing.cast("list[object]", value)
            )
        elif dataclasses.is_dataclass(part):
            matches = isinstance(value, dict) and _accepts_table(
                table_leaves(typing.cast("type", part)), typing.cast("dict[str, object]", value)
            )
        elif part is float:
            matches = isinstance(value, float | int) and not isinstance(value, bool)
        else:
            matches = type(value) is part
        if matches:
            return True
    return False


def _accepts_table(schema: Mapping[str, Leaf], table: Mapping[str, object]) -> bool:
    required = {name for name, leaf in schema.items() if leaf.default is dataclasses.MISSING}
    return required <= table.keys() <= schema.keys() and all(
        accepts(schema[name].hint, value) for name, value in table.items()
    )


def describe(hint: Any) -> str:
    """Say in words what a value of type `hint` looks like."""
    choices = ", ".join(repr(choice) for choice in _choices(hint))
    words = [f"one of {choices}"] if choices else []
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    for part in _parts(hint):
        if cls := table_class(part):
            words.append(f"a list of tables, each with {', '.join(table_leaves(cls))}")
        elif get_origin(part) is list:
            words.append(f"a list, each item {describe(get_args(part)[0])}")
        elif part in names and not (part is int and float in _parts(hint)):
            words.append(names[part])
    if type(None) in _parts(hint):
        words.append(f"'{NONE_WORD}' for none")
    return ", or ".join(words)


def from_toml(hint: Any, value: object) -> object:
    """Turn a TOML value into a Python one: the word None, and whole numbers where floats go.

    Tables of a list get the defaults of the keys that they lack.
    """
    if (cls := table_class(hint)) and isinstance(value, list):
        return [_complete(table_leaves(cls), table) for table in typing.cast("list[object]", value)]
    if value == NONE_WORD and type(None) in _parts(hint):
        return None
    if type(value) is int and int not in _parts(hint) and float in _parts(hint):
        return float(value)
    return value


def _complete(schema: Mapping[str, Leaf], table: object) -> object:
    if not isinstance(table, dict):
        return table
    given = {
        name: from_toml(schema[name].hint, value) if name in schema else value
        for name, value in typing.cast("dict[str, object]", table).items()
    }
    defaults = {name: leaf.default for name, leaf in schema.items()}
    complete = {name: given.get(name, default) for name, default in defaults.items()}
    return {k: v for k, v in {**complete, **given}.items() if v is not dataclasses.MISSING}
