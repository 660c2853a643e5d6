"""Lists of tables in TOML and on the command line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine import cli
from engine.schema import flatten, leaves
from engine.tables import spread
from tests.engine.toy_config import JobToy


@dataclass(frozen=True, kw_only=True, slots=True)
class PartToy:
    """A part."""

    name: str
    """Name."""

    weight: float = 1.0
    """Weight."""

    path: str | None = None
    """Path."""

    steps: list[list[float]] | None = None
    """Steps."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"parts.{self.name}.weight = {self.weight}; give 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataToy:
    """Data."""

    parts: list[PartToy] = field(default_factory=list[PartToy])
    """Parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyOfTables:
    """A whole toy."""

    job: JobToy = field(default_factory=JobToy)
    data: DataToy = field(default_factory=DataToy)


TWO = '[[data.parts]]\nname = "a"\nweight = 2\n[[data.parts]]\nname = "b.c"\npath = "x"\n'


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *words: str) -> list[PartToy]:
        path = tmp_path / "x.toml"
        path.write_text(text)
        return cli.load(ToyOfTables, ["--job.config_file", str(path), *words]).data.parts

    return load


def test_tables_become_the_dataclass_with_its_defaults(load):
    assert load(TWO) == [PartToy(name="a", weight=2.0), PartToy(name="b.c", path="x")]
    assert load("") == []


def test_a_written_configuration_loads_to_itself(load):
    parts = load(TWO, "--data.parts.a.steps", "[[0, 1], [5, 0.5]]", "--data.parts.b.c.path", "None")
    text = cli.to_toml(ToyOfTables(data=DataToy(parts=parts)))
    assert text.count("[[data.parts]]") == 2
    assert load(text) == parts


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.parts.a.weight", "0.5"], ("a", 0.5, None)),
        (["--data.parts.a.weight=3"], ("a", 3.0, None)),
        (["--data.parts.a.path=0.5"], ("a", 2.0, "0.5")),
        (["--data.parts.a.path=y", "--data.parts.a.path=None"], ("a", 2.0, None)),
        (["--data.parts", '[{name = "z", weight = 4}]'], ("z", 4.0, None)),
        (["--data.parts=[{name = 'z'}]", "--data.parts.z.weight=5"], ("z", 5.0, None)),
    ],
)
def test_the_command_line_changes_one_key_or_replaces_all(load, words, expected):
    first = load(TWO, *words)[0]
    assert (first.name, first.weight, first.path) == expected
    assert isinstance(first.weight, float)


def test_the_command_line_may_take_all_away(load):
    assert load(TWO, "--data.parts", "[]") == []


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (TWO + "wieght = 1", [], r"data.parts[1].wieght = 1 of 'b.c' in "),
        (TWO + "wieght = 1", [], "did you mean weight?"),
        (TWO + "xyz = 1", [], "a table has name, weight, path, steps"),
        (TWO + "steps = [0, 1]", [], "data.parts[1].steps = [0, 1] of 'b.c'"),
        (TWO + "[[data.parts]]", [], "data.parts[2] has no name in "),
        ("[data.parts]\nname = 'a'", [], "write [[data.parts]] above each"),
        ("[data]\nparts = [1]", [], "data.parts[0] = 1 in "),
        ("[data]\nparts = 1", [], "has the wrong type; give a list of tables, each with name"),
        (TWO + "weight = -1", [], "data.parts.b.c.weight = -1.0; give 0 or more"),
        (TWO, ["--data.parts.b.weight", "1"], "no table of data.parts is called 'b'; there are a"),
        ("", ["--data.parts.b.weight", "1"], "there is none at all"),
        (TWO, ["--data.parts.weight", "1"], "no table of data.parts is called 'weight'"),
        (TWO, ["--data.parts.a.wieght", "1"], "wieght is not a key; did you mean weight?"),
        (TWO, ["--data.parts.a.weight", "x"], "--data.parts.a.weight x has the wrong type"),
        (TWO, ["--data.parts.a.weight"], "give a number"),
        (TWO, ["--data.parts", "x"], 'data.parts = "x" on the command line has the wrong type'),
        (TWO, ["--data.parts", "[{nme = 'x'}]"], "data.parts[0] has no name on the command line"),
    ],
)
def test_a_mistake_is_named_with_its_table_and_remedy(load, text, words, message):
    with pytest.raises(ValueError) as caught:
        load(text, *words)
    assert message in str(caught.value)


def test_help_lists_the_keys_of_a_table(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.load(ToyOfTables, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--data.parts.NAME.KEY sets one key" in text and "steps: Steps." in text


def test_differences_are_those_of_single_keys(load):
    flat = flatten(ToyOfTables(data=DataToy(parts=load(TWO))))
    other = {"data.parts": [{"name": "z"}, {"name": "b.c"}]}
    found = spread(flat, other, leaves(ToyOfTables))
    assert found["data.parts"] == ["a", "b.c"]
    assert found["data.parts.b.c.path"] == "x" and "data.parts.a.weight" not in found
