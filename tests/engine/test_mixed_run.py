"""A run on mixed sources, from TOML to metrics: exact after a resume, and refused by name."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from engine.config import JobConfig, check
from engine.loop import fit
from engine.run_folder import RunFolder
from tests.engine.tiny_run import packed_documents, rows_of_run, tiny_config, tiny_folder

SOURCES = """
[[data.sources]]
name = "text"
path = "{folder}/train.jsonl"
weights = [[0, 0.9], [2, 0.4]]

[[data.sources]]
name = "chats.small"
path = "{folder}/chats.jsonl"
format = "chat"
weight = 0.3

[[data.sources]]
name = "late"
dataset = "dummy"
weights = [[0, 0], [3, 0.3]]

[[validation.sources]]
name = "text"
path = "{folder}/validation.jsonl"

[[validation.sources]]
name = "noise"
dataset = "dummy"
"""
TEMPLATE = """{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %} {{ message.content }} word3{% endgeneration %}
{% else %} word4 {{ message.content }}{% endif %}{% endfor %}"""
NAMES = ("text", "chats.small", "late")
STEPS, SAVED = 5, 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "hf")
    packed_documents(tmp_path)
    (tmp_path / "words.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2"}]
    chats = [json.dumps({"messages": turns * n}) + "\n" for n in range(1, 30)]
    (tmp_path / "chats.jsonl").write_text("".join(chats))
    (tmp_path / "sources.toml").write_text(SOURCES.format(folder=tmp_path))
    return tmp_path


def config_of(folder: Path, *options: str) -> JobConfig:
    return tiny_config(
        folder,
        f"--job.config_file={folder / 'sources.toml'}",
        *("--training.dataset=python_stdlib", "--training.seq_len=13", "--validation.seq_len=13"),
        f"--data.chat_template={folder / 'words.jinja'}",
        *("--data.num_processes=1", "--data.dummy_tokens=260", f"--training.steps={STEPS}"),
        *("--training.global_batch_size=4", "--metrics.log_freq=1", "--validation.steps=2"),
        *("--checkpoint.enable", f"--checkpoint.interval={SAVED}", "--checkpoint.keep_latest_k=0"),
        *("--checkpoint.no_last_save_model_only", "--validation.enable", "--validation.freq=5"),
        *options,
    )


def told(folder: Path) -> list[dict[str, float | None]]:
    """Return of each row of numbers those that do not depend on the clock."""
    kinds = ("loss", "tokens", "epochs", "validation_loss", "grad_norm")
    rows = rows_of_run(folder)
    return [{k: v for k, v in row.items() if k.partition("/")[0] in kinds} for row in rows]


def test_tokens_and_losses_of_each_source_are_written_and_exact_after_a_resume(folder: Path):
    fit(config_of(folder))
    rows = told(folder)
    for step, row in enumerate(rows, start=1):
        assert sum(row[f"tokens/{name}"] or 0 for name in NAMES) == row["tokens"]
        assert (row["loss/late"] is None) == (step <= 3)
    assert (rows[2]["tokens/late"], rows[2]["epochs/late"]) == (0, 0.0)
    assert (rows[-1]["epochs/late"] or 0) > 0
    last = rows[-1]
    assert {key for key in last if key.startswith("validation_loss/")} == {
        "validation_loss/text",
        "validation_loss/noise",
    }
    saved = folder / "run" / "checkpoint" / f"step-{SAVED}" / "counters.json"
    counters = json.loads(saved.read_text())["counters"]
    assert {f"tokens/{name}": rows[SAVED - 1][f"tokens/{name}"] for name in NAMES} == {
        key: value for key, value in counters.items() if key.startswith("tokens/")
    }
    fit(config_of(folder, f"--checkpoint.load_step={SAVED}"))
    assert told(folder) == rows


def test_the_log_says_how_long_each_save_held_training_up(folder: Path):
    fit(config_of(folder))
    (log,) = (folder / "run" / "logs").glob("*")
    found = re.findall(r"step (\d+): saving held training up for \d+\.\d\d s", log.read_text())
    assert found == [str(SAVED), str(STEPS)]


def test_a_resume_with_another_mixture_is_refused_with_what_changed(folder: Path):
    config = config_of(folder)
    run = RunFolder.of(config)
    run.path.mkdir()
    run.write_config(config, 1)
    written = tomllib.loads(run.config.read_text())
    assert [table["name"] for table in written["data"]["sources"]] == [*NAMES]
    assert run.check_reuse(config, 1) == []
    (run.checkpoints / "step-3").mkdir(parents=True)
    changed = config_of(folder, "--data.sources.chats.small.weight=0.25")
    with pytest.raises(ValueError, match=r"data\.sources\.chats\.small\.weight: 0\.3 -> 0\.25"):
        run.check_reuse(changed, 1)
    renamed = config_of(folder, "--data.sources.text.name=prose")
    with pytest.raises(ValueError, match=r"data\.sources: \['text', .* -> \['prose', "):
        run.check_reuse(renamed, 1)
    held_out = config_of(folder, "--validation.sources.noise.name=random")
    (difference,) = run.check_reuse(held_out, 1)
    assert difference.key == "validation.sources"


@pytest.mark.parametrize("key", ["dataset=dummy", "dataset_path=x"])
def test_a_dataset_beside_sources_is_refused(folder: Path, key: str):
    with pytest.raises(ValueError, match=r"training\.dataset = .*data\.sources names all"):
        check(config_of(folder, f"--training.{key}"), 1)
    with pytest.raises(ValueError, match=r"validation\.dataset = .*stands beside"):
        config_of(folder, f"--validation.{key}")


def test_a_source_that_cannot_be_opened_is_named_by_its_table(folder: Path):
    config = config_of(folder, "--data.sources.text.path=nowhere.jsonl")
    with pytest.raises(ValueError, match=r"data\.sources\.text\.path = 'nowhere\.jsonl'"):
        fit(config)
