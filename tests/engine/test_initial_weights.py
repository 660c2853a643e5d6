"""Where a run's Hugging Face weights come from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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
