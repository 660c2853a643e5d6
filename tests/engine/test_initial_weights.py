"""Where a run's Hugging Face weights come from."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.cli import run_command
from engine.hf_weights import list_groups
from engine.loop import fit
from models.decoder import DecoderLM
from models.initialise import initial_values
from parallelisms.materialise import fill
from tests.engine.tiny_run import SIZES, tiny_config, tiny_folder

UNTOUCHED = ("--training.steps=1", "--optimizer.lr=0", "--checkpoint.last_save_in_hf")
IN_HF = ("--checkpoint.enable", "--checkpoint.initial_load_in_hf")


def weights(seed: int) -> dict[str, Tensor]:
    model = DecoderLM(SIZES)
    fill(model, initial_values(model, SIZES, seed=seed))
    return model.state_dict()


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "hf" / "model.safetensors")


@pytest.mark.parametrize("has_path", [False, True], ids=["assets", "path"])
def test_the_weights_are_those_of_the_assets_folder_unless_a_path_is_given(
    tmp_path: Path, has_path: bool
) -> None:
    tiny_folder(tmp_path / "hf", weights(seed=1))
    tiny_folder(tmp_path / "other", weights(seed=2))
    path = (f"--checkpoint.initial_load_path={tmp_path / 'other'}",) if has_path else ()
    fit(tiny_config(tmp_path, *UNTOUCHED, *IN_HF, *path))
    expected, found = weights(seed=2 if has_path else 1), exported(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    text = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert ("the weights are model.hf_assets_path's" in text) is not has_path
    assert f"loading {tmp_path / ('other' if has_path else 'hf')} (hf)" in text


def test_an_assets_folder_without_weights_is_refused_before_anything_is_built(
    tmp_path: Path,
) -> None:
    tiny_folder(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"initial_load_in_hf = True.*hf_assets_path = .*/hf'"):
        fit(tiny_config(tmp_path, *UNTOUCHED, *IN_HF))
    assert not (tmp_path / "run").exists()


def test_weights_that_will_not_be_loaded_are_named(
    tmp_path: Path,
) -> None:
    tiny_folder(tmp_path / "hf")
    fit(tiny_config(tmp_path, "--training.steps=1", "--checkpoint.initial_load_in_hf"))
    text = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "checkpoint.initial_load_in_hf has no effect: checkpoint.enable = false" in text


def change_config(folder: Path, **values: object) -> None:
    path = folder / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other_tensor(folder: Path, name: str, tensor: Tensor | None) -> None:
    tensors = weights(seed=1)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "hf" / FILE)


FILE = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "hf" / FILE).unlink(), "hf_assets_path = .*no safetensors files"),
    "cut short": (lambda f: os.truncate(f / "hf" / FILE, 20_000), rf"{FILE} is cut short: model\."),
    "other family": (
        lambda f: change_config(f, model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        r"model\.name = 'llama3', but .*config\.json is of the family 'qwen2'",
    ),
    "other shape": (
        lambda f: change_config(f, intermediate_size=96),
        rf"layers\.0\.mlp\.down_proj\.weight in {FILE} has shape \(32, 48\), the model",
    ),
    "activation": (
        lambda f: change_config(f, hidden_act="gelu"),
        r"config\.json has hidden_act = 'gelu', which the llama3 family cannot reproduce",
    ),
    "missing": (lambda f: other_tensor(f, UP, None), rf"the files lack {UP}.*initial_load_allow"),
    "unexpected": (
        lambda f: other_tensor(f, "score.weight", torch.ones(2)),
        r"the model has no place for score\.weight",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_message_and_code_2_and_nothing_is_trained(
    name: str, tmp_path: Path, capsys
) -> None:
    tiny_folder(tmp_path / "hf", weights(seed=1))
    spoil, message = BAD_FOLDERS[name]
    spoil(tmp_path)
    options = ("--training.steps=1", *IN_HF)
    assert run_command(lambda _: fit(tiny_config(tmp_path, *options)), []) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"error: .*{message}", error), error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_is_allowed_to_be_missing_or_left_over_is_listed_and_starts_anew(
    tmp_path: Path,
) -> None:
    tiny_folder(tmp_path / "hf")
    tensors = weights(seed=1)
    tensors["score.weight"] = tensors.pop(UP)
    save_file(tensors, tmp_path / "hf" / FILE)
    allow = ("--checkpoint.initial_load_allow", "score.*", UP)
    fit(tiny_config(tmp_path, *UNTOUCHED, *IN_HF, *allow))
    found = exported(tmp_path)
    assert torch.equal(found[UP], weights(seed=42)[UP])  # the run's seed
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"])
    text = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert f"not in {tmp_path / 'hf'}, as allowed, and left at its initial value: {UP}" in text
    assert "without a place in the model, as allowed: score.weight" in text
    assert re.search(r"read 0\.00 GB of weights in .* on each of 1 ranks", text)


def test_names_of_many_layers_are_one_in_messages() -> None:
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(12)]
    assert list_groups([*names, "lm_head.weight"]) == (
        "lm_head.weight, model.layers.*.mlp.up_proj.weight (12, the first "
        "model.layers.0.mlp.up_proj.weight)"
    )
