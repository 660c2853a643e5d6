"""Hugging Face folders come in and go out without a changed bit, and bad ones are named."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine import hf_io, hf_weights
from engine.checkpoint import Checkpointer
from models.registry import load_family
from parallelisms.materialise import materialise
from tests.engine.checkpoint_cases import FSDP2_TP2, HSDP, ONE, TP2, assets, config, gathered, start
from tests.parity.cases import Case, build_case, model_config

TIED = Case(tied=True, tp=2, shard=2, vocab=61)
SAME_ARITHMETIC = 1e-5


def hf_folder(folder: Path, case: Case, *, max_shard_size: str = "5GB") -> dict[str, Tensor]:
    """Save a random transformers model of the case's shape; return its stored tensors."""
    torch.manual_seed(3)
    hf_config = LlamaConfig(**load_family("llama3").config_to_hf(model_config(case)))  # pyright: ignore[reportArgumentType]
    LlamaForCausalLM(hf_config).save_pretrained(folder, max_shard_size=max_shard_size)
    return stored(folder)


def stored(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _through(
    rank: int, world_size: int, case: Case, source: Path, target: Path, values: dict[str, Any]
) -> dict[str, Tensor]:
    """Import, export, and return what the model held in between."""
    state, _ = start(case)
    hf_weights.load_into(state.model, source, assets(case).key_map)
    dtype = values.pop("dtype", torch.float32)
    hf_io.export(state.model, target, assets(case), dtype=dtype, **values)
    return gathered(state)


@pytest.mark.parametrize("case", [ONE, TP2, FSDP2_TP2, HSDP, TIED], ids=str)
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
def test_import_then_export_is_bit_equal_per_tensor(
    ranks, tmp_path: Path, case: Case, shard_bytes: int
) -> None:
    size = "5GB" if shard_bytes > 10**6 else "20KB"
    original = hf_folder(tmp_path / "in", case, max_shard_size=size)
    held, *_ = ranks(
        case.world_size,
        _through,
        case,
        tmp_path / "in",
        tmp_path / "out",
        {"max_shard_bytes": shard_bytes},
    )
    exported = stored(tmp_path / "out")
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor, held[name]) and torch.equal(tensor, exported[name]), name
    is_sharded = shard_bytes < 10**6
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or not is_sharded
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == is_sharded


@pytest.mark.parametrize("case", [Case(), Case(tied=True)], ids=str)
def test_transformers_computes_the_same_logits_from_an_export(tmp_path: Path, case: Case) -> None:
    model, _ = build_alone(case)
    hf_io.export(model, tmp_path / "out", assets(case), dtype=torch.float32, max_shard_bytes=20_000)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    tokens = torch.randint(case.vocab, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(24).expand(2, 24)
    with torch.no_grad():
        difference = model(tokens, positions_BT=positions) - theirs(tokens).logits
    assert difference.abs().max() < SAME_ARITHMETIC
    assert (tmp_path / "out" / "generation_config.json").is_file()


def build_alone(case: Case) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Our model in this process, without any parallelism."""
    torch.manual_seed(5)
    family = load_family("llama3")
    model = family.build(model_config(case))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.1)
    return model, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_export_has_the_dtype_asked_for_and_says_so(tmp_path: Path, dtype: torch.dtype) -> None:
    model, tensors = build_alone(ONE)
    hf_io.export(model, tmp_path / "out", assets(ONE), dtype=dtype)
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, tensors[name].to(dtype)), name
    name = str(dtype).removeprefix("torch.")
    assert hf_io.read_hf_config(tmp_path / "out")["dtype"] == name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


def test_sixteen_bit_files_fill_fp32_parameters_exactly(tmp_path: Path) -> None:
    hf_folder(tmp_path, ONE)
    rounded = {name: tensor.bfloat16() for name, tensor in stored(tmp_path).items()}
    save_file(rounded, tmp_path / "model.safetensors")
    model, tensors = build_alone(ONE)
    hf_weights.load_into(model, tmp_path, assets(ONE).key_map)
    for name, tensor in rounded.items():
        assert tensors[name].dtype == torch.float32 and torch.equal(tensors[name], tensor.float())


@pytest.mark.parametrize(("case", "ranks_of_a_node", "readers"), [(TP2, 2, 2), (HSDP, 2, 4)])
def test_ranks_read_disjoint_rows_and_replicas_too_on_several_nodes(
    ranks, tmp_path: Path, case: Case, ranks_of_a_node: int, readers: int
) -> None:
    original = hf_folder(tmp_path, case)
    vectors = sum(tensor.nbytes for tensor in original.values() if tensor.ndim == 1)
    matrices = sum(tensor.nbytes for tensor in original.values() if tensor.ndim == 2)
    expected = vectors // case.shard + matrices // readers
    found = ranks(case.world_size, _bytes_read, tmp_path, case, ranks_of_a_node)
    assert found == [expected] * case.world_size


def _bytes_read(rank: int, world_size: int, folder: Path, case: Case, ranks_of_a_node: int) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_of_a_node)
    state, _ = start(case)
    done = hf_weights.load_into(state.model, folder, assets(case).key_map)
    held, original = gathered(state), stored(folder)
    assert all(torch.equal(held[name], tensor) for name, tensor in original.items())
    return done.bytes_read


def load(folder: Path, case: Case = ONE) -> None:
    with torch.device("meta"):
        model = load_family("llama3").build(model_config(case))
    materialise(model, "cpu")
    hf_weights.load_into(model, folder, assets(case).key_map)


def test_missing_and_unexpected_tensors_are_fatal_and_listed(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path, ONE)
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"lack model\.layers\.0\.mlp\.up_proj.*no place for model\.layers\.9\.mlp\.up_proj",
    ):
        load(tmp_path)


def test_names_that_match_an_allowed_pattern_may_be_missing_or_left_over(
    ranks, tmp_path: Path
) -> None:
    tensors = hf_folder(tmp_path, TP2)
    tensors["extra.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    for kept, loaded in ranks(2, _load_allowed, tmp_path):
        assert kept and loaded
    with pytest.raises(ValueError, match=r"no place for extra\.weight"):
        load(tmp_path, TP2)


def _load_allowed(rank: int, world_size: int, folder: Path) -> tuple[bool, bool]:
    state, _ = start(TP2)
    before = gathered(state)
    allowed = ("extra.*", "model.layers.*.mlp.up_proj.weight")
    hf_weights.load_into(state.model, folder, assets(TP2).key_map, allowed=allowed)
    after = gathered(state)
    missing, present = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    return torch.equal(before[missing], after[missing]), not torch.equal(
        before[present], after[present]
    )


def test_known_tables_without_parameters_are_passed_over(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path, ONE)
    for name in ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached"):
        tensors[f"model.{name}"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_its_file(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path, ONE)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight in model\.safetensors has shape \(5,\).*\(32,\)"
    ):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "broken header", "missing"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_corrupt_shard_is_named(tmp_path: Path, damage: str, sharded: bool) -> None:
    hf_folder(tmp_path, ONE, max_shard_size="20KB" if sharded else "5GB")
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    if damage == "cut short":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "broken header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    else:
        file.unlink()
    named = file.name if sharded or damage != "missing" else str(tmp_path)
    if damage == "cut short":
        named += r" is cut short: (model\.norm|lm_head)\.weight ends at .* tensors are not whole"
    with pytest.raises(ValueError, match=named):
        load(tmp_path)


def test_a_broken_index_and_a_broken_config_are_named(tmp_path: Path) -> None:
    hf_folder(tmp_path, ONE, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["lm_head.weight"]
    wrong = content["weight_map"]["model.embed_tokens.weight"]
    content["weight_map"]["model.norm.weight"] = wrong
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        load(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        hf_io.read_hf_config(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        hf_io.read_hf_config(tmp_path / "nowhere")


def _failing_export(rank: int, world_size: int, target: Path) -> str:
    model, _ = build_case(TP2)
    original = hf_io.FolderWriter.add
    count = 0

    def add(self: hf_io.FolderWriter, name: str, tensor: Tensor) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, name, tensor)

    hf_io.FolderWriter.add = add
    try:
        hf_io.export(model, target, assets(TP2), dtype=torch.float32)
    except OSError as error:
        return str(error)
    finally:
        hf_io.FolderWriter.add = original
    return ""


def test_a_disk_that_fills_up_fails_the_export_on_every_rank_and_keeps_the_old_folder(
    ranks, tmp_path: Path
) -> None:
    model, tensors = build_alone(ONE)
    hf_io.export(model, tmp_path / "out", assets(ONE), dtype=torch.float32)
    for complaint in ranks(2, _failing_export, tmp_path / "out"):
        assert "No space left" in complaint
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, tensors[name]), name


def test_an_export_replaces_the_old_one(tmp_path: Path) -> None:
    model, tensors = build_alone(ONE)
    hf_io.export(model, tmp_path / "out", assets(ONE), dtype=torch.float32, max_shard_bytes=20_000)
    with torch.no_grad():
        tensors["model.norm.weight"].fill_(7.0)
    hf_io.export(model, tmp_path / "out", assets(ONE), dtype=torch.float32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    [file] = (tmp_path / "out").glob("*.safetensors")
    with safe_open(file, framework="pt") as shard:
        assert torch.equal(shard.get_tensor("model.norm.weight"), torch.full((32,), 7.0))


def _start_from_hf(rank: int, world_size: int, case: Case, run: Path, source: Path) -> Any:
    state, _ = start(case)
    checkpointer = Checkpointer(
        config(initial_load_path=str(source), initial_load_in_hf=True, last_save_in_hf=True),
        run / "checkpoint",
        files={},
        hf=assets(case),
    )
    step = checkpointer.load(state)
    checkpointer.save(1, state, last=True)
    checkpointer.close()
    return step, gathered(state)


def test_a_run_starts_from_a_hugging_face_folder_and_leaves_one(ranks, tmp_path: Path) -> None:
    original = hf_folder(tmp_path / "in", TIED)
    for step, held in ranks(4, _start_from_hf, TIED, tmp_path, tmp_path / "in"):
        assert step == 0
        assert all(torch.equal(held[name], tensor) for name, tensor in original.items())
    exported = stored(tmp_path / "hf")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    assert (tmp_path / "checkpoint" / "step-1" / ".complete").is_file()
