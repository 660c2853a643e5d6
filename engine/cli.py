"""TOML file and command line to `JobConfig`, and how a user's mistake ends a program.

Precedence: command line, TOML, default. Every mistake of both is gathered into one `ValueError`;
`run_command` prints it without a traceback, once, and answers exit code 2.
"""

import contextlib
import difflib
import importlib
import inspect
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, TypeVar

import tomli
import tomli_w
import tyro

from engine import titan
from engine.config import JobConfig
from engine.distributed import ALONE
from engine.health import NonFiniteError
from engine.manifest import CheckpointError
from engine.schema import (
    Leaf,
    accepts,
    construct,
    describe,
    flatten,
    from_toml,
    leaves,
    nested,
    raise_mistakes,
    table_class,
)
from engine.tables import (
    apply_option,
    help_text,
    owner_of,
    spelled_list,
    table_mistakes,
    toml_word,
)

Config = TypeVar("Config")

CONFIG_FILE_KEY = "job.config_file"
CONFIG_MODULE_KEY = "job.custom_config_module"
OUR_PACKAGES = frozenset({"__main__", "engine", "models", "parallelisms", "scripts", "train"})
USER_MISTAKE_EXIT_CODE = 2


def load_config(argv: Sequence[str], *, prog: str = "train.py") -> JobConfig:
    """Return the configuration that a command line (without the program's name) describes.

    Prints it where `job.print_config` says so and imports `experimental.custom_import`; raises
    ValueError with every mistake that a single section can see. `engine.config.check` looks at
    what spans sections.
    """
    config = load(_config_class(argv), argv, prog=prog)
    if config.experimental.custom_import:
        import_user_module("experimental.custom_import", config.experimental.custom_import)
    if config.job.print_config and is_first_rank():
        print(to_toml(config), flush=True)
    return config


def _config_class(argv: Sequence[str]) -> type[JobConfig]:
    """Return our JobConfig, or the one derived from it that `job.custom_config_module` holds."""
    options = {option.name: option.words for option in split_options(argv)}
    words = options.get(CONFIG_MODULE_KEY)
    if words is None:
        path = options.get(CONFIG_FILE_KEY)
        job = read_toml(path[0]).get("job") if path else None
        words = [str(job.get("custom_config_module", ""))] if isinstance(job, dict) else []
    if not words or not words[0]:
        return JobConfig
    found = getattr(import_user_module(CONFIG_MODULE_KEY, words[0]), "JobConfig", None)
    if not (isinstance(found, type) and issubclass(found, JobConfig)):
        raise ValueError(
            f"{CONFIG_MODULE_KEY} = {words[0]!r} holds no class JobConfig derived from "
            "engine.config.JobConfig; add one, with your sections as further fields"
        )
    return found


def import_user_module(key: str, name: str) -> Any:
    """Import a user's module named by `key`, looking in the current folder too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key} = {name!r} cannot be imported ({error}); install the package, or start in "
            "the folder that holds it"
        ) from error


def load(cls: type[Config], argv: Sequence[str], *, prog: str = "train.py") -> Config:
    """Fill the config tree `cls` from the TOML file named in `argv` and the options after it."""
    schema = leaves(cls)
    problems: list[str] = []
    options = split_options(argv)
    files = [o.words[0] for o in options if o.name == CONFIG_FILE_KEY and o.words]
    values = {key: leaf.default for key, leaf in schema.items()}
    if files:
        values |= _toml_values(read_toml(files[-1]), schema, files[-1], problems)
    values |= _option_values(options, cls, schema, values, problems, prog)
    config, refused = construct(cls, values)
    raise_mistakes(problems + refused)
    assert config is not None, "a section that could not be built has said why"
    return config


# ---------------------------------------------------------------------------- the TOML file


def read_toml(path: str) -> dict[str, Any]:
    """Parse a TOML file; a missing or malformed one is the user's mistake."""
    try:
        with open(path, "rb") as file:
            return tomli.load(file)
    except OSError as error:
        raise ValueError(
            f"{CONFIG_FILE_KEY} = {path!r} cannot be read ({error.strerror}); give the path of a "
            "TOML file, such as train_configs/debug_model.toml"
        ) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FILE_KEY} = {path!r} is not valid TOML: {error}") from error


def _toml_values(
    tables: Mapping[str, Any], schema: Mapping[str, Leaf], path: str, problems: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in _toml_leaves(tables, schema, ""):
        if key not in schema:
            problems.append(f"{key} = {toml_word(value)} in {path} {_unknown(key, schema)}")
            continue
        leaf, given = schema[key], value
        value = from_toml(leaf.hint, given)
        if accepts(leaf.hint, value):
            values[key] = value
        elif table_class(leaf.hint):
            problems += table_mistakes(leaf, given, f" in {path}")
        else:
            problems.append(
                f"{key} = {toml_word(value)} in {path} has the wrong type; "
                f"give {describe(leaf.hint)}{_example(leaf)}"
            )
    values.pop(CONFIG_FILE_KEY, None)  # a saved configuration may be copied anywhere
    return values


def _toml_leaves(
    table: Mapping[str, Any], schema: Mapping[str, Leaf], prefix: str
) -> Iterable[tuple[str, Any]]:
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and key not in schema:
            yield from _toml_leaves(value, schema, f"{key}.")
        else:
            yield key, value


def _example(leaf: Leaf) -> str:
    if leaf.default in (None, "", []) or "one of" in describe(leaf.hint):
        return ""
    return f", such as {toml_word(leaf.default)}"


def _unknown(key: str, schema: Mapping[str, Leaf]) -> str:
    """Say that `key` does not exist and what was probably meant."""
    if key in titan.RENAMED:
        return f"is not a key; write {titan.RENAMED[key]} instead"
    section, _, name = key.rpartition(".")
    siblings = [k for k in schema if k.startswith(f"{section}.")]
    close = (
        difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
        or [k for k in schema if k.rpartition(".")[2] == name]
        or difflib.get_close_matches(key, list(schema), n=1, cutoff=0.75)
    )
    if close:
        return f"is not a key; did you mean {close[0]}?"
    if siblings:
        return f"is not a key; [{section}] has {', '.join(k.rpartition('.')[2] for k in siblings)}"
    sections = sorted({k.rpartition(".")[0] for k in schema})
    near = difflib.get_close_matches(section, sections, n=1)
    hint = f"did you mean [{near[0]}]?" if near else "--help lists every key"
    return f"is not a key, and there is no section [{section}]; {hint}"


# -------------------------------------------------------------------------- the command line


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One `--name` of a command line with the words that follow it."""

    name: str
    """As typed, without the dashes."""

    words: tuple[str, ...]

    def arguments(self) -> list[str]:
        """Return it as command-line words again."""
        if len(self.words) == 1:
            return [f"--{self.name}={self.words[0]}"]
        return [f"--{self.name}", *self.words]

    def __str__(self) -> str:
        """Return it as a person would type it."""
        return " ".join([f"--{self.name}", *self.words])


def split_options(argv: Sequence[str]) -> list[Option]:
    """Cut a command line into options; words before the first one get the empty name."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, [value] if equals else []))
        elif word == "-h":
            found.append(("help", []))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    return [Option(name=name, words=tuple(words)) for name, words in found]


def _option_values(
    options: Sequence[Option],
    cls: type,
    schema: Mapping[str, Leaf],
    defaults: Mapping[str, Any],
    problems: list[str],
    prog: str,
) -> dict[str, Any]:
    """Return what the command line sets; tyro turns the words into values."""
    if any(option.name == "help" for option in options):
        _print_help(_mirror(cls, schema, defaults), prog)
    switches = {_negative(k): k for k, leaf in schema.items() if leaf.hint is bool}
    known: list[tuple[str, Option]] = []
    lists: dict[str, Any] = {}
    for option in options:
        key = switches.get(option.name, option.name)
        if leaf := owner_of(option.name, schema):
            tables = lists.get(leaf.key, defaults[leaf.key])
            lists[leaf.key], refused = apply_option(leaf, option.name, option.words, tables)
            problems += refused
        elif key in schema and (items := spelled_list(schema[key], option.words)) is not None:
            lists[key] = items
        elif key in schema:
            known.append((key, option))
        elif not option.name:
            problems.append(f"{option.words[0]!r} on the command line belongs to no --section.key")
        else:
            problems.append(f"--{option.name} {_unknown(option.name, schema)}")
    if not known:
        return lists
    mirror = _mirror(cls, {key: schema[key] for key, _ in known}, defaults)
    parsed = _parse(mirror, [word for _, option in known for word in option.arguments()])
    if parsed is None:
        good = [(k, o) for k, o in known if _parse(mirror, o.arguments()) is not None]
        problems += [_bad_option(k, o, schema[k]) for k, o in known if (k, o) not in good]
        parsed = _parse(mirror, [word for _, option in good for word in option.arguments()])
        known = good
    flat = flatten(parsed)
    return {key: flat[key] for key, _ in known} | lists


def _negative(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"{section}.no_{name}"


def _bad_option(key: str, option: Option, leaf: Leaf) -> str:
    if leaf.hint is bool:
        return f"{option} takes no value; write --{key}, or --{_negative(key)} for false"
    return f"{option} has the wrong type; give {describe(leaf.hint)}{_example(leaf)}"


def _mirror(cls: Any, schema: Mapping[str, Leaf], defaults: Mapping[str, Any]) -> type:
    """Make a dataclass tree like `cls` for tyro: the keys of `schema`, without self-checks.

    A value of the file that the command line replaces must not be judged, so the sections'
    own checks run only on the outcome.
    """

    def make(default: Any, prefix: str) -> type:
        made: list[tuple[str, Any, Any]] = []
        for name in type(default).__dataclass_fields__:
            key, value = prefix + name, getattr(default, name)
            if key in schema:
                leaf = schema[key]
                # With its sentence at hand tyro does not go looking for it in source files.
                hint = Annotated[leaf.hint, tyro.conf.arg(help=leaf.sentence)]
                value = defaults[key]
                if table_class(leaf.hint):
                    hint = Annotated[str, tyro.conf.arg(help=help_text(leaf), metavar="TABLES")]
                    value = json.dumps([table["name"] for table in value])
                made.append((name, hint, _field(value)))
            elif any(known.startswith(f"{key}.") for known in schema):
                inner = make(value, f"{key}.")
                hint = Annotated[inner, tyro.conf.arg(help=inner.__doc__)]
                made.append((name, hint, field(default_factory=inner)))
        mirror = make_dataclass(type(default).__name__, made, kw_only=True)
        mirror.__doc__ = inspect.getdoc(type(default))
        return mirror

    return make(cls(), "")


def _field(value: Any) -> Any:
    if isinstance(value, list):
        return field(default_factory=lambda: list(value))
    return field(default=value)


def _parse(mirror: type, arguments: Sequence[str]) -> Any | None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return tyro.cli(mirror, args=arguments, use_underscores=True)
        except SystemExit:
            return None


def _print_help(mirror: type, prog: str) -> None:
    if not is_first_rank():
        raise SystemExit(0)
    tyro.cli(mirror, args=["--help"], prog=prog, use_underscores=True)


# ------------------------------------------------------------------------------- the way out


def to_toml(config: object, *, omit: Iterable[str] = (CONFIG_FILE_KEY,)) -> str:
    """Return the whole configuration as a TOML text that loads to the same configuration."""
    flat = flatten(config)
    for key in omit:
        flat.pop(key, None)
    return tomli_w.dumps(nested(flat))


def is_first_rank() -> bool:
    """Say whether this process speaks for the run; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def run_command(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a program and return its exit code; a user's mistake is one message and code 2.

    Our own code raises ValueError for mistakes of the user. One from a library is a defect and
    keeps its traceback. A failed save and a step that is not finite are one message and code 1.
    """
    try:
        main(arguments)
    except (CheckpointError, NonFiniteError) as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except ValueError as error:
        if not _is_raised_by_us(error):
            raise
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif ALONE in getattr(error, "__notes__", ()):
            print(f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        return USER_MISTAKE_EXIT_CODE
    return 0


def _is_raised_by_us(error: ValueError) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).split(".")[0] in OUR_PACKAGES
