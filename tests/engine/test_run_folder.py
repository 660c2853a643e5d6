"""The run folder: its layout, the configuration in it, and when it may be used again."""

import json
from pathlib import Path

import pytest

from engine.cli import load_config
from engine.config import JobConfig
from engine.manifest import Manifest, commit, no_fault
from engine.run_folder import (
    DECIDES_THE_ROWS,
    DECIDES_THE_WEIGHTS,
    SAYS_NOTHING_OF_THE_RUN,
    RunFolder,
)
from engine.schema import leaves


def configure(folder: Path, *words: str) -> JobConfig:
    return load_config([f"--job.dump_folder={folder}", "--checkpoint.enable", *words])


def start(config: JobConfig, world_size: int = 1, *, steps_saved: bool = True) -> RunFolder:
    """Leave a folder as a run leaves it."""
    folder = RunFolder.of(config)
    folder.write_config(config, world_size)
    if steps_saved:
        (folder.checkpoints / "step-10").mkdir(parents=True)
    return folder


def test_everything_of_a_run_lies_under_its_folder(tmp_path: Path):
    folder = RunFolder.of(configure(tmp_path / "run", "--checkpoint.folder=saved"))
    assert not (tmp_path / "run").exists()
    for path in (folder.config, folder.checkpoints, folder.hf, folder.profile, folder.logs):
        assert path.parent == folder.path == tmp_path / "run"
    assert folder.checkpoints.name == "saved"


def test_the_written_configuration_starts_the_same_run_again(tmp_path: Path):
    config = configure(tmp_path, "--training.steps=7", "--training.local_batch_size=3")
    folder = start(config)
    again = load_config(["--job.config_file", str(folder.config)])
    assert again.job.dump_folder == str(tmp_path)
    assert again.training.steps == 7
    assert folder.check_reuse(again, 1) == []


def test_the_written_configuration_keeps_the_global_batch_on_other_ranks(tmp_path: Path):
    folder = start(configure(tmp_path, "--training.local_batch_size=2"), world_size=4)
    again = load_config(["--job.config_file", str(folder.config)])
    assert again.training.global_batch_size == 8
    assert again.parallelism.data_parallel_shard_degree == -1
    assert folder.check_reuse(again, 2) == []


def test_a_new_folder_is_used_without_a_word(tmp_path: Path):
    config = configure(tmp_path / "new")
    assert RunFolder.of(config).check_reuse(config, 1) == []


@pytest.mark.parametrize(
    "word",
    [
        "--training.steps=8",
        "--optimizer.lr=1e-5",
        "--metrics.log_freq=3",
        "--parallelism.tensor_parallel_degree=2",
        "--data.num_processes=2",
        "--job.description=again",
        "--parallelism.context_parallel_load_balancer=None",
    ],
)
def test_a_difference_that_can_resume_is_shown(tmp_path: Path, word: str):
    folder = start(configure(tmp_path, "--training.global_batch_size=16"), world_size=2)
    config = configure(tmp_path, "--training.global_batch_size=16", word)
    (difference,) = folder.check_reuse(config, 2)
    assert str(difference).startswith(word[2:].partition("=")[0])
    assert " -> " in str(difference)


@pytest.mark.parametrize(
    "word",
    [
        "--model.flavor=1B",
        "--training.seq_len=128",
        "--training.global_batch_size=16",
        "--training.local_batch_size=2",
        "--training.dataset=dummy",
        "--training.dtype=bfloat16",
        "--data.packing=none",
        "--debug.seed=3",
    ],
)
def test_a_difference_that_cannot_resume_is_refused_where_a_checkpoint_is(
    tmp_path: Path, word: str
):
    folder = start(configure(tmp_path))
    config = configure(tmp_path, word)
    with pytest.raises(
        ValueError, match=r"job\.dump_folder.*holds checkpoints of another"
    ) as caught:
        folder.check_reuse(config, 1)
    key = word[2:].partition("=")[0].replace("local_batch", "global_batch")
    assert key in str(caught.value)
    assert "give another job.dump_folder" in str(caught.value)


def test_a_folder_that_has_moved_can_be_named_anew(tmp_path: Path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    folder = start(configure(tmp_path, f"--model.tokenizer_path={tmp_path / 'here'}"))
    moved = configure(tmp_path, f"--model.tokenizer_path={tmp_path / 'there'}")
    with pytest.raises(
        ValueError, match=r"config\.toml\), or write there where the same has moved"
    ):
        folder.check_reuse(moved, 1)
    folder.config.write_text(folder.config.read_text().replace("/here", "/there"))
    assert folder.check_reuse(moved, 1) == []


def test_another_number_of_ranks_may_not_change_the_global_batch_in_silence(tmp_path: Path):
    folder = start(configure(tmp_path), world_size=2)
    with pytest.raises(ValueError, match=r"training\.global_batch_size: 16 -> 32"):
        folder.check_reuse(configure(tmp_path), 4)
    assert folder.check_reuse(configure(tmp_path, "--training.global_batch_size=16"), 1) == []


def test_without_a_checkpoint_any_difference_is_only_shown(tmp_path: Path):
    folder = start(configure(tmp_path), steps_saved=False)
    differences = folder.check_reuse(configure(tmp_path, "--training.seq_len=128"), 1)
    assert [d.key for d in differences] == ["training.seq_len"]


def test_a_run_that_would_not_resume_may_not_write_over_another_configuration(tmp_path: Path):
    folder = start(configure(tmp_path))
    config = configure(tmp_path, "--training.seq_len=128", "--checkpoint.no_enable")
    with pytest.raises(ValueError, match=r"training\.seq_len: 2048 -> 128"):
        folder.check_reuse(config, 1)
    alike = configure(tmp_path, "--training.steps=7", "--checkpoint.no_enable")
    shown = [d.key for d in folder.check_reuse(alike, 1)]
    assert "checkpoint.enable" in shown and "training.seq_len" not in shown


def test_validation_alone_may_read_other_text_but_not_another_model(tmp_path: Path):
    folder = start(configure(tmp_path))
    folder.check_reuse(configure(tmp_path, "--training.seq_len=128", "--validation.only"), 1)
    with pytest.raises(ValueError, match=r"model\.flavor"):
        folder.check_reuse(configure(tmp_path, "--model.flavor=1B", "--validation.only"), 1)


def test_a_run_that_ended_with_the_model_alone_is_finished(tmp_path: Path):
    folder = start(configure(tmp_path))
    ended = configure(tmp_path, "--training.steps=5")
    assert folder.finished_step(ended) is None
    for step in folder.checkpoints.iterdir():
        step.rmdir()
    temporary = folder.checkpoints / "step-5.tmp"
    temporary.mkdir()
    manifest = Manifest(step=5, contents="model", world_size=1, files={})
    commit(temporary, folder.checkpoints / "step-5", manifest, no_fault)
    assert folder.finished_step(ended) == 5
    more = configure(tmp_path, "--training.steps=6")
    assert folder.finished_step(more) is None


def test_half_written_steps_are_no_checkpoints(tmp_path: Path):
    folder = start(configure(tmp_path), steps_saved=False)
    for name in ("step-3.tmp", "step-2.damaged", "notes"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert not folder.holds_checkpoints()


def test_a_configuration_of_an_older_version_is_compared_with_defaults(tmp_path: Path):
    config = configure(tmp_path)
    folder = start(config)
    lines = folder.config.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("on_nonfinite")]
    folder.config.write_text("\n".join(kept) + "\n[gone]\nkey = 1\n")
    assert [str(d) for d in folder.check_reuse(config, 1)] == ["gone.key: 1 -> None"]


def test_an_unreadable_configuration_is_named(tmp_path: Path):
    folder = start(configure(tmp_path))
    folder.config.write_text("[job")
    with pytest.raises(ValueError, match=r"config\.toml cannot be read"):
        folder.check_reuse(configure(tmp_path), 1)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"job\.dump_folder = .* is a file"):
        RunFolder.of(configure(tmp_path / "run"))
    config = configure(tmp_path / "run" / "below")
    with pytest.raises(ValueError, match=r"job\.dump_folder = .* cannot be written to"):
        RunFolder.of(config).write_config(config, 1)


@pytest.mark.parametrize("name", ["copy.toml", "sub/copy.json"])
def test_a_copy_is_saved_where_asked(tmp_path: Path, name: str):
    config = configure(tmp_path, f"--job.save_config_file={name}", "--training.steps=7")
    start(config)
    text = (tmp_path / name).read_text()
    if name.endswith(".json"):
        assert json.loads(text)["training"]["steps"] == 7
    else:
        assert load_config([f"--job.config_file={tmp_path / name}"]).training.steps == 7


def test_the_keys_that_forbid_resuming_exist():
    known = set(leaves(JobConfig))
    assert known >= DECIDES_THE_ROWS | DECIDES_THE_WEIGHTS | SAYS_NOTHING_OF_THE_RUN
