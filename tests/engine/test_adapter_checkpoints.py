"""Runs that train adapters: what their checkpoints hold, beside what base they go on, exports."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import Checkpointer
from engine.checkpoint_storage import read_metadata
from engine.convert import compare_logits
from engine.loop import fit
from engine.verify.case import Case
from models.layers.lora import adapter_of
from scripts import convert_dcp_to_hf, generate
from tests.engine.checkpoint_cases import FILES, assert_same, assets, config, gathered, start, step
from tests.engine.test_preference_run import TOLD, initial_weights, run, write
from tests.engine.tiny_run import tiny_config, tiny_folder
from tests.ranks import RankPool

SAVED = ("--checkpoint.enable", "--checkpoint.no_last_save_model_only", "--checkpoint.interval=2")
FROM_FOLDER = (*SAVED, "--checkpoint.initial_load_in_hf")
EXPORTED = "--checkpoint.last_save_in_hf"
DORA = ("--adapter.kind=dora", "--adapter.rank=4", "--adapter.alpha=8")
NAMES = ["loss", "grad_norm", *TOLD]


def steps_of(folder: Path) -> Path:
    return folder / "run" / "checkpoint"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "hf", initial_weights(seed=7))
    write(tmp_path / "pairs.jsonl", range(30))
    write(tmp_path / "held_out.jsonl", range(30, 37))
    return tmp_path


def test_all_references_of_adapters_give_the_same_run_and_its_checkpoints_hold_adapters_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    """The reference is the base: the model without adapters, a second one, or what that said."""
    built: list[Any] = []
    monkeypatch.setattr("engine.reference.build_reference", built.append)
    off = run(home, "off", *FROM_FOLDER, EXPORTED, *DORA)
    assert not built, "there is no second model"
    monkeypatch.undo()
    assert off[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert off[2]["loss"] < off[0]["loss"]
    for kind in ("online", "precomputed"):
        other = run(home, kind, *FROM_FOLDER, *DORA, f"--objective.reference={kind}")
        for expected, row in zip(off, other, strict=True):
            assert [row[n] for n in NAMES] == pytest.approx([expected[n] for n in NAMES], abs=1e-6)
    last = steps_of(home / "off") / "step-3"
    names = [n for n in read_metadata(last).state_dict_metadata if not n.startswith("rng.")]
    assert all(".lora_" in name for name in names)
    parameters = [name for name in names if adapter_of(name)]
    assert sum(name.startswith("optimizer.") for name in names) == 3 * len(parameters) > 0
    exported = load_file(home / "off" / "run" / "hf" / "adapter_model.safetensors")
    assert len(exported) == len(parameters)


def test_resumed_adapters_repeat_the_uninterrupted_run_beside_the_same_base_only(home: Path):
    whole = run(home, "whole", *FROM_FOLDER, *DORA, "--training.steps=4")
    run(home, "parts", *FROM_FOLDER, *DORA, "--training.steps=4", "--checkpoint.load_step=-1")
    parts = home / "parts" / "run"
    for path in [steps_of(home / "parts") / "step-4", parts / "metrics.jsonl"]:
        path.rename(path.with_name(f"{path.name}.away"))
    resumed = run(home, "parts", *FROM_FOLDER, *DORA, "--training.steps=4")
    assert [row["step"] for row in resumed] == [3, 4]
    for expected, row in zip(whole[2:], resumed, strict=True):
        assert [row[name] for name in NAMES] == [expected[name] for name in NAMES]
    other = tiny_folder(home / "other", initial_weights(seed=8))
    said = r"adapters in .*step-4 stand beside .*/hf with weights \w+, and this run would put them"
    with pytest.raises(ValueError, match=said):
        path = f"--checkpoint.initial_load_path={other}"
        run(home, "parts", *FROM_FOLDER, *DORA, "--training.steps=5", path)


def test_a_step_is_exported_by_itself_alone_or_merged_as_the_run_does(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    merged = run(home, "merged", *FROM_FOLDER, EXPORTED, *DORA, "--adapter.merge_export")
    alone = run(home, "alone", *FROM_FOLDER, EXPORTED, *DORA)
    assert [row["loss"] for row in merged] == [row["loss"] for row in alone]
    last = steps_of(home / "alone") / "step-3"
    convert_dcp_to_hf.main([str(last), str(home / "m"), "--merge", "--verify"])
    convert_dcp_to_hf.main([str(last.parent), str(home / "a")])
    for name, of_run in (("m", home / "merged"), ("a", home / "alone")):
        (file,) = (home / name).glob("*.safetensors")
        assert_same(load_file(file), load_file(of_run / "run" / "hf" / file.name))
    assert "against transformers" in capsys.readouterr().out
    for dtype in (torch.float32, torch.bfloat16):
        convert_dcp_to_hf.main(
            [str(last), str(home / f"{dtype}"), "--merge", "--dtype", str(dtype).split(".")[1]]
        )
        assert compare_logits(last, home / f"{dtype}", dtype).is_within(1e-5)
    capsys.readouterr()
    texts: list[str] = []
    for folder in (home / "m", home / "a"):
        generate.main(["--model", str(folder), "--prompt", "word3 word4", "--max_new_tokens", "6"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("word3 word4 ")
    (home / "hf" / "model.safetensors").rename(home / "gone")
    tiny_folder(home / "other", initial_weights(seed=8))
    (home / "other" / "model.safetensors").rename(home / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"adapts weights \w+, and .* now holds \w+; put the base"):
        convert_dcp_to_hf.main([str(last), str(home / "n"), "--merge"])


def test_adapters_start_beside_a_full_checkpoint_and_no_run_starts_from_adapters_alone(home: Path):
    full = tiny_config(home, *SAVED, "--training.steps=2", "--training.global_batch_size=1")
    fit(full)
    start = f"--checkpoint.initial_load_path={steps_of(home)}"
    rows = run(home, "dpo", *SAVED, start, *DORA)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    saved = json.loads((steps_of(home / "dpo") / "step-3" / "counters.json").read_text())
    assert saved["base"]["kind"] == "initial" and saved["base"]["name"].endswith("step-2")
    merge = [str(steps_of(home / "dpo")), str(home / "m"), "--merge"]
    convert_dcp_to_hf.main([*merge, "--verify"])
    alone = f"--checkpoint.initial_load_path={steps_of(home / 'dpo')}"
    said = r"step-3 holds adapters alone.*--merge and start from"
    for number, adapter in enumerate([(), DORA]):
        with pytest.raises(ValueError, match=said):
            run(home, f"again{number}", *SAVED, alone, *adapter)
    base = next((steps_of(home) / "step-2").glob("*.distcp"))
    content = base.read_bytes()
    base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"step-2 is not a usable checkpoint: the content of file"):
        convert_dcp_to_hf.main([*merge[:1], str(home / "other"), "--merge"])
    shutil.rmtree(base.parent)
    with pytest.raises(ValueError, match=r"initial_load_path = '.*' holds no complete step"):
        run(home, "dpo", *SAVED, start, *DORA, "--training.steps=4")


def test_several_adapters_are_verified_together_and_a_finished_run_merges_them_when_asked(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    two = (*FROM_FOLDER, EXPORTED, *DORA, "--adapter.more", "[{name = 'second', rank = 2}]")
    run(home, "two", *two)
    (folder,) = (home / "two").glob("run/hf")
    assert (folder / "second" / "adapter_config.json").is_file()
    pytest.importorskip("peft")
    convert_dcp_to_hf.main([str(steps_of(home / "two")), str(home / "a"), "--verify"])
    prompt = ["--prompt", "word3", "--max_new_tokens", "1"]
    generate.main(["--model", str(folder), *prompt])
    assert "note: without the adapters in second; " in capsys.readouterr().err
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="has its adapters in folders of their own, second; give"):
        generate.main(["--model", str(folder), *prompt])
    run(home, "two", *two, "--adapter.merge_export")
    assert (folder / "config.json").is_file() and not (folder / "second").exists()


def test_adapters_go_on_from_a_folder_and_are_compared_with_how_they_began(home: Path):
    """Beside a base in four bits, so that of the reference is packed too."""
    first = run(home, "first", *FROM_FOLDER, EXPORTED, *DORA)
    path = f"--adapter.path={home / 'first' / 'run' / 'hf'}"
    online = run(home, "online", *FROM_FOLDER, *DORA, path, "--model.converters=nf4")
    assert online[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    off = run(home, "off", *FROM_FOLDER, *DORA, path, "--objective.reference=adapters_off")
    assert off[0]["loss"] < min(0.68, first[1]["loss"])


def _saved(rank: int, world_size: int, case: Case, folder: Path) -> tuple[Any, float]:
    state, dims = start(case)
    step(state, dims, case)
    checkpointer = Checkpointer(config(), folder, files=FILES, hf=assets(case))
    checkpointer.save(1, state)
    checkpointer.close()
    return gathered(state), step(state, dims, case)


def _loaded(rank: int, world_size: int, case: Case, folder: Path) -> tuple[Any, float]:
    state, dims = start(case)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if adapter_of(name) is not None:
                parameter.zero_()
    checkpointer = Checkpointer(config(), folder, files=FILES, hf=assets(case))
    checkpointer.load(state)
    checkpointer.close()
    return gathered(state), step(state, dims, case)


def test_adapters_and_their_optimizer_go_on_in_another_layout(ranks: RankPool, tmp_path: Path):
    saved, loss = ranks(2, _saved, Case(shard=2, adapter="dora"), tmp_path)[0]
    for found, next_loss in ranks(2, _loaded, Case(tp=2, adapter="dora"), tmp_path):
        assert_same(found, saved)
        assert next_loss == pytest.approx(loss, rel=1e-5)
