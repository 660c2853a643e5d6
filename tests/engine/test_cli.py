"""Command line and TOML: precedence, types, hints, help, exit codes. The config tree is a toy."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine import cli
from engine.config import JobConfig
from engine.schema import flatten, leaves
from tests.engine.toy_config import ToyConfig

REPOSITORY = Path(__file__).parents[2]


def load(*words: str) -> ToyConfig:
    return cli.load(ToyConfig, words)


def refusal(*words: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(*words)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "x.toml"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(toml):
    path = toml("[training]\nsteps = 20\nlr = 0.5")
    config = load("--job.config_file", path, "--training.steps", "30")
    assert (config.training.steps, config.training.lr, config.training.max_norm) == (30, 0.5, 1.0)


def test_an_option_may_come_before_the_file_and_still_wins(toml):
    path = toml("[training]\nsteps = 20")
    assert load("--training.steps=30", f"--job.config_file={path}").training.steps == 30


def test_the_last_of_two_equal_options_wins():
    assert load("--training.steps", "3", "--training.steps", "4").training.steps == 4


def test_a_value_of_the_file_that_the_command_line_replaces_is_not_judged(toml):
    path = toml("[training]\nsteps = -1")
    assert "training.steps = -1" in refusal("--job.config_file", path)
    assert load("--job.config_file", path, "--training.steps", "5").training.steps == 5


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--training.compile"], "compile", True),
        (["--training.no_compile"], "compile", False),
        (["--training.steps=7"], "steps", 7),
        (["--training.max_norm", "2"], "max_norm", 2.0),
        (["--training.max_norm", "-0.5"], "max_norm", -0.5),
        (["--training.lr", "1e-4"], "lr", 1e-4),
        (["--training.decay", "cosine"], "decay", "cosine"),
        (["--training.balancer", "None"], "balancer", None),
        (["--training.balancer", "ring"], "balancer", "ring"),
        (["--training.names"], "names", []),
        (["--training.names", "x", "y"], "names", ["x", "y"]),
        (["--training.names=x"], "names", ["x"]),
        (['--training.names=["x", "y"]'], "names", ["x", "y"]),
        (["--training.names", "[]"], "names", []),
        (["--training.names", "[qkv]_proj"], "names", ["[qkv]_proj"]),
        (["--training.names", "[1]"], "names", ["[1]"]),
    ],
)
def test_options_of_every_type_arrive(words: list[str], key: str, value: object):
    assert getattr(load(*words).training, key) == value


def test_keys_of_nested_sections_arrive(toml):
    assert load().training.dataloader.num_workers == 3
    assert load("--training.dataloader.num_workers", "2").training.dataloader.num_workers == 2
    path = toml("[training.dataloader]\nnum_workers = 5")
    assert load("--job.config_file", path).training.dataloader.num_workers == 5


def test_toml_values_become_what_the_fields_say(toml):
    path = toml('[training]\nlr = 1\nbalancer = "None"\nparts = [["a"], ["b", "c"]]')
    training = load("--job.config_file", path).training
    assert isinstance(training.lr, float)
    assert training.lr == 1.0
    assert training.balancer is None
    assert training.parts == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ('steps = "ten"', "a whole number, such as 10"),
        ("steps = 1.5", "a whole number"),
        ("steps = true", "a whole number"),
        ("lr = true", "a number"),
        ('compile = "yes"', "true or false"),
        ("compile = 1", "true or false"),
        ('decay = "liner"', "one of 'linear', 'cosine'"),
        ('names = ["a", 1]', "a list, each item text"),
        ('names = "a"', "a list"),
        ("balancer = 3", "'None' for none"),
    ],
)
def test_a_wrong_type_in_the_file_is_named_with_key_value_and_remedy(toml, line: str, hint: str):
    key, value = line.split(" = ")
    message = refusal("--job.config_file", toml(f"[training]\n{line}"))
    assert message.startswith(f"training.{key} = {value} in ")
    assert hint in message


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--training.steps", "ten"], "a whole number"),
        (["--training.steps", "2.5"], "a whole number"),
        (["--training.steps"], "a whole number"),
        (["--training.steps", "1", "2"], "a whole number"),
        (["--training.max_norm", "abc"], "a number"),
        (["--training.decay", "liner"], "one of 'linear', 'cosine'"),
        (["--training.compile", "true"], "write --training.compile, or --training.no_compile"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_shown_with_what_to_give(words: list[str], hint: str):
    message = refusal(*words)
    assert message.startswith(" ".join(words))
    assert hint in message


def test_unknown_config_key_suggests_the_nearest_one(toml):
    path = toml("[training]\nlocal_batchsize = 3")
    assert "did you mean training.local_batch_size?" in refusal("--job.config_file", path)
    assert "did you mean training.steps?" in refusal("--training.step", "3")
    assert "did you mean training.compile?" in refusal("--training.no-compile")


def test_a_key_of_the_wrong_section_is_sent_to_the_right_one(toml):
    assert "did you mean job.dump_folder?" in refusal("--training.dump_folder", "x")
    path = toml("[trainig]\nlr = 1.0")
    assert "did you mean training.lr?" in refusal("--job.config_file", path)


def test_a_key_like_no_other_lists_its_section(toml):
    message = refusal("--job.config_file", toml("[job]\nxyzzy = 1"))
    assert "[job] has config_file, dump_folder" in message
    assert "--help" in refusal("--job.config_file", toml("xyzzy = 1"))


def test_an_older_spelling_is_answered_with_todays_one(toml):
    path = toml("[training]\nbatch_size = 3\n[float8]\nrecipe_name = 'rowwise'")
    message = refusal("--job.config_file", path)
    assert "training.batch_size = 3" in message
    assert "write training.local_batch_size instead" in message
    assert "write quantize.linear.float8.recipe_name instead" in message


def test_all_mistakes_come_in_one_message(toml):
    path = toml('[training]\nsteps = "ten"\nstep = 3\nlr = 2.0')
    message = refusal("stray", "--job.config_file", path, "--training.decay", "x", "--foo.bar", "1")
    assert message.startswith("5 mistakes in the configuration:")
    for part in ("training.steps", "training.step ", "--training.decay x", "'stray'", "--foo.bar"):
        assert part in message


def test_a_mistake_does_not_hide_what_a_section_refuses():
    message = refusal("--training.steps", "-3", "--training.decay", "x")
    assert message.startswith("2 mistakes")
    assert "training.steps = -3; give at least 1" in message


def test_a_nested_sections_message_shows_the_whole_key():
    with pytest.raises(ValueError, match=r"^validation\.dataloader\.num_workers = -1"):
        cli.load_config(["--validation.dataloader.num_workers", "-1"])


def test_a_missing_or_malformed_file_is_a_clear_message(toml, tmp_path: Path):
    message = refusal("--job.config_file", str(tmp_path / "nope.toml"))
    assert "job.config_file" in message
    assert "No such file" in message
    assert "not valid TOML" in refusal("--job.config_file", toml("[training\nsteps = 3"))
    assert "cannot be read" in refusal("--job.config_file", str(tmp_path))


def test_the_written_configuration_loads_to_itself(toml):
    config = load(
        "--training.balancer=None", "--training.names", "x", "--training.parts", "a", "b",
        "--training.lr", "1e-5", "--job.dump_folder", 'a "quoted" \\ path',
    )  # fmt: skip
    assert load("--job.config_file", toml(cli.to_toml(config))).training == config.training


def test_a_saved_file_may_be_copied_anywhere(toml):
    path = toml(cli.to_toml(load("--job.config_file", toml("[training]\nsteps = 4"))))
    again = load("--job.config_file", path)
    assert again.training.steps == 4
    assert again.job.config_file == path


def test_every_field_of_the_configuration_has_its_sentence():
    silent = [leaf.key for leaf in leaves(JobConfig).values() if not leaf.sentence]
    assert not silent


def test_help_lists_every_key_with_its_sentence(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        cli.load_config(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.replace("│", " ").split())
    for leaf in leaves(JobConfig).values():
        assert f"--{leaf.key}" in text
        assert leaf.sentence.split(". ")[0][:25] in flat, leaf.key
    assert "parallelism options" in text


def test_help_shows_what_the_file_says_as_the_default(capsys, toml):
    with pytest.raises(SystemExit):
        load("--job.config_file", toml("[training]\nsteps = 4711"), "--help")
    assert "(default: 4711)" in capsys.readouterr().out


def test_print_config_prints_what_loads_again(capsys, toml):
    config = cli.load_config(["--job.print_config", "--training.steps", "7"])
    again = cli.load_config(["--job.config_file", toml(capsys.readouterr().out)])
    assert again.training == config.training


def _run_program(body: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\nfrom engine.cli import load_config, run_command\n"
        f"def main(arguments):\n    {body}\nsys.exit(run_command(main, sys.argv[1:]))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_a_users_mistake_ends_with_code_2_and_one_message_without_a_traceback():
    done = _run_program("load_config(arguments)", "--training.step", "3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --training.step is not a key; did you mean training.")
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_only_the_first_rank_speaks_and_each_exits_with_code_2():
    done = _run_program("load_config(arguments)", "--optimizer.lr=-1", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert not done.stdout + done.stderr


def test_a_value_error_of_a_library_keeps_its_traceback(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="Expecting"):
        cli.run_command(lambda arguments: json.loads("{"), [])
    assert not capsys.readouterr().err


def test_success_is_code_0():
    assert cli.run_command(lambda arguments: None, []) == 0


USER_PACKAGE = """
from dataclasses import dataclass, field
from engine.config import JobConfig as Ours

@dataclass(frozen=True, kw_only=True, slots=True)
class Mine:
    '''My section.'''

    scale: float = 2.0
    '''My scale.'''

@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig(Ours):
    '''With my section.'''

    mine: Mine = field(default_factory=Mine)
"""


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_own_config.py").write_text(USER_PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_own_config"


def test_a_users_module_adds_sections(user_package: str, toml):
    words = ["--job.custom_config_module", user_package, "--mine.scale", "3"]
    assert flatten(cli.load_config(words))["mine.scale"] == 3.0
    path = toml(f'[job]\ncustom_config_module = "{user_package}"\n[mine]\nscale = 4.0')
    assert flatten(cli.load_config(["--job.config_file", path]))["mine.scale"] == 4.0


def test_a_module_without_a_configuration_is_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "my_empty_module.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="holds no class JobConfig"):
        cli.load_config(["--job.custom_config_module", "my_empty_module"])
    with pytest.raises(ValueError, match="cannot be imported"):
        cli.load_config(["--job.custom_config_module", "no_such_module_anywhere"])


def test_the_custom_import_runs_before_anything_is_built(tmp_path: Path, monkeypatch):
    (tmp_path / "my_registration.py").write_text("import sys\nsys.my_registration_ran = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    cli.load_config(["--experimental.custom_import", "my_registration"])
    assert sys.my_registration_ran  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"experimental\.custom_import = 'nope_nope'"):
        cli.load_config(["--experimental.custom_import", "nope_nope"])


def test_the_older_name_of_the_config_module_is_answered():
    with pytest.raises(ValueError, match=r"write job\.custom_config_module = 'x'"):
        cli.load_config(["--experimental.custom_args_module", "x"])


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().training.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
