"""The convert scripts need the folder alone, keep every bit and notice what is wrong."""

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import adapted_step, convert, hf_io, hf_weights
from engine.checkpoint import Checkpointer
from engine.cli import run_command
from engine.convert import DTYPES
from engine.data.tokenizer import load_tokenizer
from engine.hf_io import HfAssets
from engine.manifest import commit, digest_file, read_manifest, set_aside
from engine.provenance import checkpoint_files
from models.registry import load_family
from scripts import convert_dcp_to_hf, convert_hf_to_dcp, download_assets
from tests.engine.checkpoint_cases import FSDP2_TP2, assert_same, config, flip_bit, gathered, start
from tests.parity.cases import Case, model_config
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]
TIED = Case(tied=True, vocab=61)


def _save_complete(rank: int, world_size: int, case: Case, folder: Path) -> dict[str, Tensor]:
    """Save as a real run does: with configuration, tokenizer and provenance in the step."""
    family, sizes = load_family("llama3"), model_config(case)
    hf = HfAssets(
        key_map=family.key_map(sizes),
        config=family.config_to_hf(sizes),
        save_tokenizer=load_tokenizer(None, "").save,
    )
    files = checkpoint_files(
        config_toml="[job]\n", hf=hf, dtype=torch.float32, facts={"data_fingerprint": "f"}
    )
    state, _ = start(case)
    checkpointer = Checkpointer(config(), folder, files=files, hf=hf)
    checkpointer.save(7, state)
    checkpointer.close()
    return gathered(state)


@pytest.fixture(scope="module")
def saved(
    rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, rank_pool(4, _save_complete, FSDP2_TP2, folder)[0]


@pytest.fixture
def step(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return a copy of the saved step, which a test may damage, and what was saved."""
    folder, tensors = saved
    shutil.copytree(folder, tmp_path / "checkpoint")
    return tmp_path / "checkpoint" / "step-7", tensors


def test_a_step_carries_configuration_tokenizer_and_provenance(step: Any) -> None:
    path, _ = step
    names = set(read_manifest(path).files)
    assert {"config.toml", "hf/config.json", "hf/tokenizer.json", "counters.json"} <= names
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["data_fingerprint"] == "f"
    assert provenance["torch"] == version("torch") and provenance["commit"]


def test_a_converted_step_is_bit_equal_and_verified_against_transformers(
    step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, saved = step
    out = tmp_path / "out"
    arguments = [str(path.parent), str(out), "--verify", "--max_shard_gb", "0.00002"]
    assert run_command(convert_dcp_to_hf.main, arguments) == 0
    assert "against transformers: max abs difference" in capsys.readouterr().out
    stored = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_same(stored, saved)
    assert AutoTokenizer.from_pretrained(out)("def")["input_ids"]
    assert (out / "generation_config.json").is_file()


def test_a_tied_model_and_sixteen_bits_convert_and_verify(
    ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(1, _save_complete, TIED, tmp_path / "c")
    arguments = [str(tmp_path / "c"), str(tmp_path / "out"), "--verify", "--dtype", "bfloat16"]
    assert run_command(convert_dcp_to_hf.main, arguments) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == (
        torch.bfloat16
    )


def test_verification_fails_with_code_1_when_the_export_is_wrong(
    step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hf_io.FolderWriter.add

    def swap(self: hf_io.FolderWriter, name: str, tensor: Tensor) -> None:
        original(self, name, tensor.flip(0) if name.endswith("0.mlp.up_proj.weight") else tensor)

    monkeypatch.setattr(hf_io.FolderWriter, "add", swap)
    with pytest.raises(SystemExit, match="the logits differ") as leaving:
        convert_dcp_to_hf.main([str(step[0]), str(tmp_path / "out"), "--verify"])
    assert isinstance(leaving.value.code, str)  # python prints it and answers 1


def test_there_and_back_is_bit_equal_and_starts_a_run(ranks, step: Any, tmp_path: Path) -> None:
    path, saved = step
    convert.checkpoint_to_hf(path, tmp_path / "hf", torch.float32)
    arguments = [str(tmp_path / "hf"), str(tmp_path / "back")]
    assert run_command(convert_hf_to_dcp.main, arguments) == 0
    for loaded in ranks(4, _start_from, FSDP2_TP2, tmp_path / "run", tmp_path / "back"):
        assert_same(loaded, saved)
    convert.checkpoint_to_hf(tmp_path / "back", tmp_path / "again", torch.float32)
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def _start_from(
    rank: int, world_size: int, case: Case, run: Path, source: Path
) -> dict[str, Tensor]:
    state, _ = start(case)
    checkpointer = Checkpointer(config(initial_load_path=str(source)), run, files={})
    assert checkpointer.load(state) == 0
    checkpointer.close()
    return gathered(state)


def test_a_conversion_holds_one_tensor_at_a_time(
    step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def counting(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def read(*args: Any, **options: Any) -> Tensor:
            nonlocal most
            tensor = original(*args, **options)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            return tensor

        return read

    monkeypatch.setattr(adapted_step, "read_tensor", counting(adapted_step.read_tensor))
    monkeypatch.setattr(hf_weights.HfWeights, "read", counting(hf_weights.HfWeights.read))
    for dtype in DTYPES.values():
        folder = tmp_path / str(dtype)
        convert.checkpoint_to_hf(step[0], folder / "hf", dtype)
        convert.hf_to_checkpoint(folder / "hf", folder / "back", dtype)
    assert len(alive) == 2 * 3 * len(step[1])
    assert most <= 2  # the last one is let go of when the next has been read


@pytest.mark.parametrize("mistake", ["no such folder", "damaged", "existing out", "other model"])
def test_a_mistake_is_one_message_and_code_2(
    step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    path, _ = step
    out, source = tmp_path / "out", path
    if mistake == "no such folder":
        source = tmp_path / "nowhere"
    elif mistake == "damaged":
        flip_bit(path / "__1_0.distcp")
    elif mistake == "existing out":
        out.mkdir()
    else:
        _rewrite_config(path, num_hidden_layers=2)
    assert run_command(convert_dcp_to_hf.main, [str(source), str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    expected = {
        "no such folder": "nowhere is not a folder",
        "damaged": "__1_0.distcp has changed",
        "existing out": "exists already",
        "other model": "the model lacks model.layers.2",
    }
    assert expected[mistake] in message
    assert not list(tmp_path.glob("out.tmp"))


def _rewrite_config(path: Path, **changes: object) -> None:
    """Change a step's config.json and make its manifest agree again."""
    manifest = read_manifest(path)
    aside = set_aside(path, "tmp")
    file = aside / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    files = {**manifest.files, "hf/config.json": digest_file(file)}
    (aside / ".complete").unlink()
    commit(aside, path, type(manifest)(step=7, contents="full", world_size=4, files=files))


def test_importing_a_folder_that_is_not_the_models_is_code_2(
    step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert.checkpoint_to_hf(step[0], tmp_path / "hf", torch.float32)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"12345678")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "back")]
    assert run_command(convert_hf_to_dcp.main, arguments) == 2
    assert "model.safetensors is corrupt" in capsys.readouterr().err
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.tmp").exists()


@pytest.mark.slow
def test_the_script_runs_by_itself_from_the_folder_alone(step: Any, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "step-7"
    moved.parent.mkdir()
    step[0].rename(moved)
    script = ROOT / "scripts" / "convert_dcp_to_hf.py"
    command = [sys.executable, str(script), str(moved), str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_assets_are_fetched_by_kind_and_a_failure_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def fetch(repository: str, **options: Any) -> None:
        asked.update(options, repository=repository)
        if "broken" in repository:
            raise OSError("no route to host")

    monkeypatch.setattr(download_assets, "snapshot_download", fetch)
    arguments = ["owner/model", "--folder", str(tmp_path), "--assets", "config"]
    assert run_command(download_assets.main, arguments) == 0
    assert asked["repository"] == "owner/model" and asked["local_dir"] == tmp_path
    assert asked["allow_patterns"] == ["config.json", "generation_config.json"]
    assert run_command(download_assets.main, ["owner/broken"]) == 2
    assert "cannot fetch owner/broken: no route to host" in capsys.readouterr().err
