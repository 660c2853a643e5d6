"""Runs on pairs of answers: a reference asked in every step, or once before training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.loop import fit
from engine.reference import build_reference
from tests.engine.tiny_run import rows_of_run, tiny_config, tiny_folder

TOLD = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "nll"),
)


def write(path: Path, numbers: range) -> Path:
    pairs = [
        {
            "prompt": f"word{n} word{n % 7}",
            "chosen": " ".join(["word3"] * (1 + n % 5)),
            "rejected": " ".join(["word5"] * (1 + n % 3)),
        }
        for n in numbers
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def run(folder: Path, name: str, *options: str) -> list[dict[str, Any]]:
    """Train three steps in `folder`/`name` and return the rows of numbers."""
    home = folder / name
    home.mkdir()
    (home / "hf").symlink_to(folder / "hf")
    config = tiny_config(
        home,
        *("--objective.name=dpo", "--data.format=preference", "--data.chat_template=chatml"),
        *("--data.packing=best_fit", "--data.long_document=drop", "--data.num_processes=1"),
        *("--training.dataset=jsonl", f"--training.dataset_path={folder / 'pairs.jsonl'}"),
        *("--validation.dataset=jsonl", f"--validation.dataset_path={folder / 'held_out.jsonl'}"),
        *("--training.seq_len=90", "--validation.seq_len=90", "--validation.local_batch_size=2"),
        *("--validation.enable", "--validation.freq=3", "--training.steps=3"),
        *("--training.local_batch_size=2", "--training.global_batch_size=3"),
        *("--metrics.log_freq=1", "--lr_scheduler.warmup_steps=0", "--optimizer.lr=0.01"),
        *options,
    )
    fit(config)
    return rows_of_run(home)


def test_a_reference_asked_once_gives_the_run_of_one_asked_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_folder(tmp_path / "hf")
    write(tmp_path / "pairs.jsonl", range(30))
    write(tmp_path / "held_out.jsonl", range(30, 37))
    built: list[str] = []

    def counted(*args: Any) -> torch.nn.Module:
        built.append("reference")
        return build_reference(*args)

    monkeypatch.setattr("engine.reference.build_reference", counted)
    online = run(tmp_path, "online")
    assert online[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert online[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert online[2]["loss"] < 0.6 and online[2]["rewards/accuracies"] == 1.0
    assert online[2]["validation_rewards/accuracies"] == 1.0
    assert online[0]["perplexity"] == pytest.approx(math.exp(online[0]["nll"]))
    cache = f"--data.cache_folder={tmp_path / 'cache'}"
    asked_once = ("--objective.reference=precomputed", cache)
    first = run(tmp_path, "precomputed", *asked_once)
    assert len(built) == 2
    again = run(tmp_path, "again", *asked_once)
    assert len(built) == 2, "what the reference said is kept"
    names = ["loss", "grad_norm", *TOLD]
    for other in (first, again):
        for expected, row in zip(online, other, strict=True):
            assert [row[name] for name in names] == pytest.approx(
                [expected[name] for name in names], rel=1e-5, abs=1e-6
            )
        told = [f"validation_{name}" for name in TOLD]
        found, expected = (one[2] for one in (other, online))
        assert [found[n] for n in told] == pytest.approx([expected[n] for n in told], rel=1e-5)
    run(tmp_path, "other_seed", *asked_once, "--debug.seed=5", "--training.steps=1")
    assert len(built) == 3, "other values are asked anew"
    own = "--data.format=tests.engine.own_parts"
    with pytest.raises(ValueError, match=r"have no pairs of answers; let data\.format"):
        run(tmp_path, "own", own, "--data.text_field=prompt", "--validation.no_enable")


def test_a_reference_of_another_vocabulary_is_refused_before_anything_is_built(tmp_path: Path):
    tiny_folder(tmp_path / "hf")
    found = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "other").mkdir()
    text = json.dumps({**found, "vocab_size": found["vocab_size"] + 1})
    (tmp_path / "other" / "config.json").write_text(text)
    write(tmp_path / "pairs.jsonl", range(3))
    with pytest.raises(ValueError, match=r"reference_path = .*other.*vocabulary of 64"):
        run(tmp_path, "run", f"--objective.reference_path={tmp_path / 'other'}")
