"""Runs on pairs of answers: a reference asked in every step, or once before training."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.combinations import refusals
from engine.loop import fit, objective_row
from engine.model import find_architecture
from engine.objectives import dpo
from engine.origin import Origin
from engine.reference import Policy, build_reference, find_reference, open_reference
from engine.rules import gather_facts
from models.decoder import DecoderLM
from models.initialise import initial_values
from parallelisms.materialise import fill
from tests.engine.combination_cases import limited
from tests.engine.tiny_run import SIZES, rows_of_run, tiny_config, tiny_folder

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


def initial_weights(seed: int) -> dict[str, Tensor]:
    model = DecoderLM(SIZES)
    fill(model, initial_values(model, SIZES, seed=seed))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def run(folder: Path, name: str, *options: str) -> list[dict[str, Any]]:
    """Train three steps in `folder`/`name`, or go on there, and return the rows of numbers."""
    home = folder / name
    home.mkdir(exist_ok=True)
    if not (home / "hf").exists():
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
    built: list[torch.nn.Module] = []

    def counted(*args: Any) -> torch.nn.Module:
        built.append(build_reference(*args))
        return built[-1]

    monkeypatch.setattr("engine.reference.build_reference", counted)
    # As among several ranks: one holds frozen parameters whole, and gathers none.
    monkeypatch.setattr("parallelisms.fsdp._whole_frozen", lambda *args: set())
    kept = ("--checkpoint.enable", "--checkpoint.no_last_save_model_only")
    online = run(tmp_path, "online", *kept)
    assert all(isinstance(one, DTensor) for one in built[0].parameters()), "some stay gathered"
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
    del built[:]
    other = tiny_folder(tmp_path / "other", initial_weights(seed=7))
    steps = tmp_path / "online" / "run" / "checkpoint"
    for path in (other, steps):
        with pytest.raises(
            ValueError, match=r"step-3 was trained against initial values, seed 42 with.*give obj"
        ):
            run(tmp_path, "online", *kept, f"--objective.reference_path={path}")
    assert not built, "it is refused before there is a second model"
    resumed = run(tmp_path, "online", *kept, "--training.steps=4", "--validation.no_enable")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    own = "--data.format=tests.engine.own_parts"
    with pytest.raises(ValueError, match=r"have no pairs of answers; let data\.format"):
        run(tmp_path, "own", own, "--data.text_field=prompt", "--validation.no_enable")


@pytest.mark.parametrize("place", ["", "hf", "step-5/hf"])
def test_a_reference_that_computes_otherwise_is_refused_by_the_first_key_that_differs(
    place: str, tmp_path: Path
):
    tiny_folder(tmp_path / "hf")
    known = json.loads((tmp_path / "hf" / "config.json").read_text())
    other = tmp_path / "other" / place
    other.mkdir(parents=True)
    named = ("--objective.name=dpo", f"--objective.reference_path={tmp_path / 'other'}")
    facts, _ = gather_facts(tiny_config(tmp_path, *named), 1)
    for changes, said in (
        ({"vocab_size": 65}, "vocab_size is 65 there and 64 in the run"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps is 0.1 there and"),
        ({"rope_theta": 7.0, "rope_parameters": None}, r"(rope_\w+) is .*7\.0.* there and"),
        (
            {"model_type": "mistral"},
            "model_type = 'mistral', which the llama3 family",
        ),
        ({"initializer_range": 0.5, "eos_token_id": 3, "max_position_embeddings": 9}, None),
    ):
        (other / "config.json").write_text(json.dumps({**known, **changes}))
        found = facts.reference_difference
        assert re.search(said, found or "") if said else found is None, (changes, found)
    assert any("neither safetensors weights nor a whole step" in one for one in refusals(facts))
    save_file(initial_weights(seed=7), tmp_path / "other" / "model.safetensors")
    assert not any("objective.reference_path" in one for one in refusals(facts))


def test_a_reference_is_told_apart_by_its_weights_and_by_the_seed_that_draws_the_rest(
    tmp_path: Path,
):
    tiny_folder(tmp_path / "hf", initial_weights(seed=7))
    tiny_folder(tmp_path / "moved", initial_weights(seed=7))
    known = ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--objective.name=dpo")
    unread: Any = None
    found: dict[str, str] = {}
    for name, options in {
        "folder": [],
        "its copy": [f"--objective.reference_path={tmp_path / 'moved'}"],
        "part": ["--checkpoint.initial_load_allow", "model.norm.*"],
        "drawn": ["--checkpoint.no_initial_load_in_hf"],
    }.items():
        for seed in (1, 2):
            config = tiny_config(tmp_path, *known, f"--debug.seed={seed}", *options)
            policy = Policy(config, unread, unread, unread, unread)
            reference = find_reference(policy, dpo.build(config.objective), None)
            assert reference is not None
            found[f"{name} {seed}"] = reference.weights
    assert len({found[f"{one} {seed}"] for one in ("folder", "its copy") for seed in (1, 2)}) == 1
    assert len(set(found.values())) == 5


def test_what_a_reference_said_is_kept_apart_by_all_that_it_computes_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_folder(tmp_path / "hf")
    asked: list[str] = []
    monkeypatch.setattr("engine.reference.prepare", lambda *a: asked.append(a[2].reference))
    unread: Any = None
    adapter = ("--adapter.kind=lora", f"--adapter.path={tmp_path}")
    for options in (
        (),
        ("--training.mixed_precision_param=bfloat16",),
        ("--model.converters=float8",),
        ("--model.converters=float8", "--quantize.linear.float8.recipe_name=rowwise"),
        adapter,
        (*adapter, "--adapter.alpha=8"),
    ):
        own = ("--objective.name=dpo", "--objective.reference=precomputed", *options)
        config = tiny_config(tmp_path, *own)
        policy = Policy(config, unread, unread, find_architecture(config.model), unread)
        found = Origin(source=None, seed=1, is_partly_drawn=False, weights="same")
        assert open_reference(policy, found, [], unread) is None
    assert len(set(asked)) == len(asked) == 6


def test_preferences_are_refused_of_a_model_that_mixes_the_documents_of_a_row(tmp_path: Path):
    tiny_folder(tmp_path / "hf")
    pairs = ("--objective.name=orpo", "--data.packing=none", "--data.long_document=drop")
    pairs += ("--data.format=preference", "--training.dataset=python_stdlib_preference")
    facts, _ = gather_facts(tiny_config(tmp_path, *pairs), 1)
    assert refusals(facts) == []
    (found,) = refusals(replace(facts, **limited(lacks="packed_documents"), attention="sdpa"))
    assert "data.format = 'preference'" in found and found.count("train another model") == 1
    assert "set data.packing" not in found


def test_a_step_without_an_answer_that_the_nll_counts_has_no_perplexity():
    assert objective_row({"nll": None, "kl": 1.0}) == {"perplexity": None, "nll": None, "kl": 1.0}
    assert objective_row({"nll": 0.0})["perplexity"] == 1.0 and objective_row({}) == {}
