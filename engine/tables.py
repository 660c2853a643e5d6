"""Lists of tables such as `[[data.sources]]`: their mistakes, command-line options, differences.

Such a list is one key, and its value a list of `{name: value}`. A table is called by its `name`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any, cast, get_origin

import tomli

from engine.schema import Leaf, accepts, describe, from_toml, table_class, table_leaves

Table = dict[str, Any]


def owner_of(option: str, schema: Mapping[str, Leaf]) -> Leaf | None:
    """Return the list of tables that an option such as `data.sources.code.weight` belongs to."""
    return next(
        (
            leaf
            for key, leaf in schema.items()
            if table_class(leaf.hint) and (option == key or option.startswith(f"{key}."))
        ),
        None,
    )


def help_text(leaf: Leaf) -> str:
    """Return the sentence of a list of tables for `--help`, with the keys of its tables."""
    fields = table_leaves(_class_of(leaf)).values()
    keys = " ".join(f"{field.key}: {field.sentence}" for field in fields)
    return (
        f"{leaf.sentence} --{leaf.key}.NAME.KEY sets one key of the table called NAME; "
        f"--{leaf.key} alone replaces all, by an array of TOML. Keys: {keys}"
    )


def table_mistakes(leaf: Leaf, value: object, where: str) -> list[str]:
    """Say what is wrong with a list of tables that `accepts` refuses; `where` ends the settings."""
    if isinstance(value, dict):
        return [f"{leaf.key}{where} is a single table; write [[{leaf.key}]] above each of them"]
    if not isinstance(value, list):
        return [
            f"{leaf.key} = {toml_word(value)}{where} has the wrong type; give {describe(leaf.hint)}"
        ]
    problems: list[str] = []
    for number, table in enumerate(cast("list[object]", value)):
        place = f"{leaf.key}[{number}]"
        if not isinstance(table, dict):
            problems.append(f"{place} = {toml_word(table)}{where} is no table; give {{name = ...}}")
            continue
        problems += _mistakes(leaf, cast("Table", table), place, where)
    return problems


def _mistakes(leaf: Leaf, table: Table, place: str, where: str) -> list[str]:
    schema = table_leaves(_class_of(leaf))
    called = f" of {table['name']!r}" if isinstance(table.get("name"), str) else ""
    problems = [
        f"{place} has no {name}{where}; give each table of {leaf.key} one"
        for name, field in schema.items()
        if field.default is MISSING and name not in table
    ]
    for name, value in table.items():
        if name not in schema:
            given = f"{place}.{name} = {toml_word(value)}{called}{where}"
            problems.append(f"{given} {_unknown(name, schema)}")
        elif not accepts(schema[name].hint, from_toml(schema[name].hint, value)):
            problems.append(
                f"{place}.{name} = {toml_word(value)}{called}{where} has the wrong type; "
                f"give {describe(schema[name].hint)}"
            )
    return problems


def _class_of(leaf: Leaf) -> type:
    cls = table_class(leaf.hint)
    assert cls is not None, "only lists of tables come here"
    return cls


def toml_word(value: object) -> str:
    """Return a value as a message shows it: JSON spells plain TOML values alike, on one line."""
    return json.dumps(value, default=str)


def _unknown(name: str, known: Mapping[str, object]) -> str:
    if close := difflib.get_close_matches(name, list(known), n=1, cutoff=0.6):
        return f"is not a key; did you mean {close[0]}?"
    return f"is not a key; a table has {', '.join(known)}"


def apply_option(
    leaf: Leaf, name: str, words: Sequence[str], tables: Sequence[Table]
) -> tuple[list[Table], list[str]]:
    """Return the tables that a command-line option makes of `tables`, and the mistakes in it."""
    option = " ".join([f"--{name}", *words])
    if name == leaf.key:
        value = _parsed(" ".join(words) or "[]")
        complete = from_toml(leaf.hint, value)
        if accepts(leaf.hint, complete):
            return cast("list[Table]", complete), []
        return list(tables), table_mistakes(leaf, value, " on the command line")
    entry, _, key = name.removeprefix(f"{leaf.key}.").rpartition(".")
    schema = table_leaves(_class_of(leaf))
    names = [table["name"] for table in tables]
    if entry not in names:
        found = f"there are {', '.join(names)}" if names else "there is none at all"
        return list(tables), [
            f"{option}: no table of {leaf.key} is called {entry or key!r}; {found}; write "
            f"--{leaf.key}.NAME.KEY"
        ]
    if key not in schema:
        return list(tables), [f"{option}: {key} {_unknown(key, schema)}"]
    hint, text = schema[key].hint, " ".join(words)
    value = from_toml(hint, text)
    if not accepts(hint, value):
        value = from_toml(hint, _parsed(text))
    if not words or not accepts(hint, value):
        return list(tables), [f"{option} has the wrong type; give {describe(hint)}"]
    return [{**t, key: value} if t["name"] == entry else t for t in tables], []


def spelled_list(leaf: Leaf, words: Sequence[str]) -> list[Any] | None:
    """Return the list that one word spells as TOML does, `["a", "b"]`; None where it does not."""
    if get_origin(leaf.hint) is not list or len(words) != 1 or not words[0].startswith("["):
        return None
    value = from_toml(leaf.hint, _parsed(words[0]))
    # A pattern such as [qkv]_proj begins so too, and is an item.
    return cast("list[Any]", value) if accepts(leaf.hint, value) else None


def _parsed(text: str) -> object:
    """Return what a text means as a TOML value; the text itself where it means nothing."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def spread(
    flat: Mapping[str, Any], other: Mapping[str, Any], schema: Mapping[str, Leaf]
) -> dict[str, Any]:
    """Return `flat` with the keys of each table, `data.sources.code.weight`, for a comparison.

    A list becomes the names of its tables; tables that `other` lacks have no keys beside them.
    """
    found: dict[str, Any] = {}
    for key, value in flat.items():
        if key not in schema or table_class(schema[key].hint) is None:
            found[key] = value
            continue
        found[key] = [table.get("name") for table in value]
        shared = {table.get("name") for table in other.get(key, [])}
        tables = [table for table in value if table.get("name") in shared]
        found |= {f"{key}.{t['name']}.{name}": one for t in tables for name, one in t.items()}
    return found
