"""What is saved comes back: in every layout, every part of it, and nothing else is accepted."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.optim import AdamW

from engine.checkpoint import Checkpointer
from engine.checkpoint_state import model_tensors, refuse_other_model
from engine.manifest import read_manifest, steps_in
from tests.engine.checkpoint_cases import (
    FILES,
    FSDP2_TP2,
    FSDP4,
    HSDP,
    ONE,
    TP2,
    assert_same,
    config,
    flip_bit,
    gathered,
    load_case,
    loaded_toy,
    save_case,
    saved_toy,
    toy,
    toy_checkpointer,
    toy_step,
)
from tests.parity.cases import FP32_REORDERED_SUM, Case

TIED = Case(tied=True, tp=2, shard=2, vocab=61)
ONE_TIED = Case(tied=True, vocab=61)


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Saves each layout once; returns the folder, the whole state and the next step's loss."""
    made: dict[Case, tuple[Path, Any]] = {}

    def save(ranks: Any, case: Case) -> tuple[Path, Any]:
        if case not in made:
            folder = tmp_path_factory.mktemp("layout")
            made[case] = folder, ranks(case.world_size, save_case, case, folder, {})[0]
        return made[case]

    return save


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (FSDP4, ONE),
        (FSDP4, TP2),
        (FSDP4, FSDP2_TP2),
        (FSDP4, HSDP),
        (FSDP2_TP2, FSDP4),
        (FSDP2_TP2, ONE),
        (HSDP, TP2),
        (TIED, ONE_TIED),
        (ONE_TIED, TIED),
    ],
    ids=str,
)
def test_parameters_and_optimizer_are_bit_equal_in_another_layout(
    ranks, saved_folder, saved: Case, loaded: Case
) -> None:
    folder, (before, next_loss) = saved_folder(ranks, saved)
    for step, state, counters, loss in ranks(loaded.world_size, load_case, loaded, folder, {}):
        assert step == 2
        assert counters == {"step": 2, "rows_consumed": 16}
        assert_same(before, state)
        assert abs(loss - next_loss) <= FP32_REORDERED_SUM * abs(loss)


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    saved_toy(tmp_path, 1)
    expected = draw()
    draw()
    loaded_toy(tmp_path)
    assert draw() == expected


def _draw_after_load(rank: int, world_size: int, folder: Path, saving: bool) -> float:
    state = toy()
    torch.manual_seed(100 * saving + rank)
    checkpointer = Checkpointer(config(), folder, files=FILES)
    if saving:
        checkpointer.save(1, state)
    else:
        assert checkpointer.load(state) == 1
    checkpointer.close()
    return float(torch.rand(()))


def test_each_rank_gets_its_own_generators_back_and_new_ranks_keep_their_seeds(
    ranks, tmp_path: Path
) -> None:
    saved = ranks(2, _draw_after_load, tmp_path, True)
    assert saved[0] != saved[1]
    assert ranks(2, _draw_after_load, tmp_path, False) == saved
    assert ranks(1, _draw_after_load, tmp_path, False) == saved[:1]
    more = ranks(4, _draw_after_load, tmp_path, False)
    assert more[:2] == saved and len(set(more)) == 4


def test_files_of_the_run_lie_in_every_step(tmp_path: Path) -> None:
    saved_toy(tmp_path, 1)
    assert (tmp_path / "step-1" / "config.toml").read_bytes() == FILES["config.toml"]
    manifest = read_manifest(tmp_path / "step-1")
    assert manifest.files.keys() >= {"config.toml", "provenance.json", "counters.json", ".metadata"}


def test_a_checkpoint_of_another_width_is_refused_by_name_and_changes_nothing(
    tmp_path: Path,
) -> None:
    saved_toy(tmp_path, 1)
    state = toy(seed=1, width=6)
    before = gathered(state)
    checkpointer = toy_checkpointer(tmp_path)
    with pytest.raises(ValueError, match=r"0\.weight has shape \(8, 4\) in the .* \(6, 4\) here"):
        checkpointer.load(state)
    checkpointer.close()
    assert_same(gathered(state), before)


def test_a_checkpoint_of_another_model_is_refused_with_the_keys_of_both(tmp_path: Path) -> None:
    saved_toy(tmp_path, 1)
    state = toy()
    state.model = torch.nn.ModuleDict({"other": torch.nn.Linear(2, 2)})
    checkpointer = toy_checkpointer(tmp_path)
    with pytest.raises(ValueError, match=r"lacks other\.bias.*model lacks 0\.bias, 0\.weight"):
        checkpointer.load(state)
    checkpointer.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_dtype_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Trap S6: torch converts without a word."""
    saved_toy(tmp_path, 1)
    checkpointer = toy_checkpointer(tmp_path)
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float32 in the .*, torch\.\w+ here"):
        checkpointer.load(toy(dtype=dtype))
    checkpointer.close()


@pytest.mark.parametrize(("saved", "here"), [("rows", "values"), ("values", "rows")])
def test_weights_packed_in_four_bits_on_one_side_are_refused_with_the_way_to_the_other(
    tmp_path: Path, saved: str, here: str
) -> None:
    size, remedy = torch.Size([4, 36]), {"rows": "last_save_in_hf", "values": "convert_dcp_to_hf"}
    dtypes = {"rows": torch.uint8, "values": torch.float32}
    properties = TensorProperties(dtype=dtypes[saved])
    entry = TensorStorageMetadata(properties=properties, size=size, chunks=[])
    tensors = {"0.weight": torch.zeros(size, dtype=dtypes[here])}
    with pytest.raises(ValueError, match=rf"0\.weight (.|\n)*nf4(.|\n)*{remedy[saved]}"):
        refuse_other_model(tensors, Metadata({"0.weight": entry}), tmp_path, any_dtype=True)


def test_a_position_in_other_data_is_refused_unless_excluded(tmp_path: Path) -> None:
    saved_toy(tmp_path, 3)
    for excluded in ([], ["dataloader"]):
        state = toy(seed=1)
        state.data_fingerprint = "other rows"
        checkpointer = toy_checkpointer(tmp_path, exclude_from_loading=excluded)
        if excluded:
            assert checkpointer.load(state) == 3
            assert state.counters == {"step": 3, "rows_consumed": 3}  # rows as they were: one step
        else:
            with pytest.raises(ValueError, match=r"fingerprint 'rows'.*'other rows'.*dataloader"):
                checkpointer.load(state)
        checkpointer.close()


def test_excluded_parts_stay_as_they_were(tmp_path: Path) -> None:
    saved = saved_toy(tmp_path, 3)
    fresh = gathered(toy(seed=1))
    step, state = loaded_toy(tmp_path, exclude_from_loading=["optimizer", "train_state"])
    assert step == 0 and state.counters == {"step": 1, "rows_consumed": 9}
    for name, tensor in gathered(state).items():
        expected = fresh if "exp_avg" in name or "step" in name else saved
        assert torch.equal(tensor, expected[name]), name


def test_hyperparameters_are_those_of_the_configuration_not_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    saved_toy(tmp_path, 2)
    state = toy(seed=1)
    assert state.optimizer is not None
    state.optimizer.param_groups[0].update(lr=0.5, weight_decay=0.25)
    checkpointer = toy_checkpointer(tmp_path)
    checkpointer.load(state)
    checkpointer.close()
    assert state.optimizer.param_groups[0]["lr"] == 0.5
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_a_state_without_a_first_step_starts_the_optimizer_at_zero(tmp_path: Path) -> None:
    state = toy()
    state.optimizer = AdamW(state.model.parameters())
    checkpointer = toy_checkpointer(tmp_path)
    checkpointer.save(0, state)
    loaded = toy(seed=1)
    loaded.optimizer = AdamW(loaded.model.parameters())
    assert checkpointer.load(loaded) == 0
    checkpointer.close()
    assert_same(gathered(loaded), gathered(state))
    assert not loaded.optimizer.state


def test_load_step_takes_that_step_and_names_the_steps_there_are(tmp_path: Path) -> None:
    saved_toy(tmp_path, 1, 2, 3)
    assert loaded_toy(tmp_path, load_step=2)[0] == 2
    with pytest.raises(ValueError, match=r"load_step = 7 is not among the steps \[1, 2, 3\]"):
        loaded_toy(tmp_path, load_step=7)
    flip_bit(tmp_path / "step-2" / "manifest.json")
    with pytest.raises(ValueError, match=r"step-2 is not a usable checkpoint"):
        loaded_toy(tmp_path, load_step=2)


def test_when_to_save() -> None:
    def steps(**values: Any) -> list[int]:
        checkpointer = Checkpointer(config(interval=4, **values), Path("unused"), files=FILES)
        found = [step for step in range(1, 11) if checkpointer.should_save(step, step == 10)]
        checkpointer.close()
        return found

    assert steps() == [4, 8, 10]
    assert steps(enable_first_step_checkpoint=True) == [1, 4, 8, 10]
    assert steps(load_only=True) == steps(enable=False) == []


def test_load_only_and_off_write_nothing(tmp_path: Path) -> None:
    for values in ({"load_only": True}, {"enable": False}):
        checkpointer = Checkpointer(config(**values), tmp_path, files=FILES)
        checkpointer.save(1, toy(), last=True)
        checkpointer.close()
    assert not list(tmp_path.iterdir())
    assert loaded_toy(tmp_path, enable=False)[0] is None


def _saved_last(folder: Path, **values: Any) -> dict[str, Tensor]:
    state = toy()
    checkpointer = toy_checkpointer(folder, last_save_model_only=True, **values)
    checkpointer.save(1, state)
    toy_step(state)
    checkpointer.save(2, state, last=True)
    checkpointer.close()
    return gathered(state)


def test_a_last_save_of_the_model_alone_starts_another_run_in_wider_numbers(
    tmp_path: Path,
) -> None:
    saved = _saved_last(tmp_path / "old", export_dtype="bfloat16", async_mode="async")
    for path in (tmp_path / "old" / "step-2", tmp_path / "old"):
        step, state = loaded_toy(tmp_path / "new", initial_load_path=str(path))
        assert step == 0 and state.counters == {"step": 1, "rows_consumed": 3}
        for name, tensor in model_tensors(state.model).items():
            assert torch.equal(tensor, saved[name].bfloat16().float()), name


def test_a_run_goes_on_from_the_last_full_step_not_from_a_model_alone(tmp_path: Path) -> None:
    _saved_last(tmp_path)
    assert loaded_toy(tmp_path)[0] == 1
    with pytest.raises(ValueError, match=r"step-2 holds the model alone.*initial_load_path"):
        loaded_toy(tmp_path, load_step=2)
    shutil.rmtree(tmp_path / "step-1")
    with pytest.raises(ValueError, match=r"no checkpoint that a run can go on from.*step-2 holds"):
        loaded_toy(tmp_path)


def test_an_evaluation_takes_the_newest_parameters_and_renames_nothing(tmp_path: Path) -> None:
    saved = _saved_last(tmp_path)
    saved_toy(tmp_path, 3)
    (tmp_path / "step-3" / ".complete").unlink()
    state = toy(seed=1)
    checkpointer = toy_checkpointer(tmp_path)
    source = checkpointer.find(only_model=True)
    assert source is not None and source.step == 2
    assert checkpointer.load(state, source) == 0
    checkpointer.close()
    assert steps_in(tmp_path) == [1, 2, 3]
    assert all(torch.equal(tensor, saved[n]) for n, tensor in model_tensors(state.model).items())


def test_an_initial_checkpoint_gives_everything_where_asked(tmp_path: Path) -> None:
    saved = saved_toy(tmp_path / "old", 4)
    old = str(tmp_path / "old")
    step, state = loaded_toy(tmp_path / "new", initial_load_path=old, initial_load_model_only=False)
    assert step == 4 and state.counters == {"step": 4, "rows_consumed": 12}
    assert_same(gathered(state), saved)


def test_the_runs_own_checkpoint_wins_over_the_initial_one(tmp_path: Path) -> None:
    saved_toy(tmp_path / "old", 4)
    saved_toy(tmp_path / "new", 2)
    assert loaded_toy(tmp_path / "new", initial_load_path=str(tmp_path / "old"))[0] == 2


@pytest.mark.parametrize("content", ["nowhere", "empty", "damaged"])
def test_an_initial_path_that_cannot_be_used_is_a_users_mistake(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "old"
    if content != "nowhere":
        path.mkdir()
    if content == "damaged":
        saved_toy(path, 1)
        flip_bit(path / "step-1" / "counters.json")
    with pytest.raises(ValueError, match="old"):
        loaded_toy(tmp_path / "new", initial_load_path=str(path))
    assert content != "damaged" or (path / "step-1").is_dir()  # another run's folder is left alone


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": 0}, r"checkpoint\.interval = 0"),
        ({"keep_latest_k": -1}, r"checkpoint\.keep_latest_k = -1"),
        ({"load_step": -2}, r"checkpoint\.load_step = -2"),
        ({"exclude_from_loading": ["lr_scheduler"]}, r"names \['lr_scheduler'\].*train_state"),
        ({"initial_load_in_hf_quantized": True}, r"initial_load_in_hf_quantized = true"),
        (
            {
                "initial_load_in_hf": True,
                "initial_load_path": "x",
                "initial_load_model_only": False,
            },
            r"initial_load_model_only = false",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_a_feature_that_is_off_accepts_its_keys() -> None:
    assert not config(enable=False, initial_load_in_hf_quantized=True).enable
