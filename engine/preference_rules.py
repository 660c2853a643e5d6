"""Rules on objectives that compare answers: the data they need, and what cannot be with it."""

from pathlib import Path

from engine.data.config import PREFERENCE_FORMATS
from engine.hf_weights import has_weights
from engine.manifest import DamagedCheckpoint, read_manifest, step_folder, steps_in
from engine.objectives import PAIRED, UNPAIRED
from engine.rules import Facts, Rule


def has_no_preferences(facts: Facts, form: str) -> bool:
    """Whether a source is of ours and of another format than `form`."""
    return any("." not in found and found != form for _, found in facts.sources_read)


def holds_weights(folder: Path) -> bool:
    """Whether a folder is one of Hugging Face with weights, a whole step, or holds one."""
    places = [folder, *(step_folder(folder, step) for step in steps_in(folder))]
    return has_weights(folder) or any(map(is_whole, places))


def is_whole(step: Path) -> bool:
    """Whether a folder is a step whose save came to its end; its tensors are not read."""
    try:
        read_manifest(step)
    except DamagedCheckpoint:
        return False
    return True


def has_no_reference(facts: Facts) -> bool:
    """Whether nothing can be loaded from `objective.reference_path`, which is of no other model."""
    folder = facts.reference_folder
    if folder is None or facts.reference_difference is not None:
        return False
    return not holds_weights(folder)


PREFERENCE_RULES = (
    Rule(
        id="pairs_wanted_and_not_read",
        keys=("objective.name", "data.format"),
        applies=lambda f: f.config.objective.name in PAIRED and has_no_preferences(f, "preference"),
        reason="it compares a chosen and a rejected answer, and some source has no such pairs",
        remedy="set data.format = 'preference', for all sources, or another objective",
    ),
    Rule(
        id="labelled_answers_wanted_and_not_read",
        keys=("objective.name", "data.format"),
        applies=lambda f: (
            f.config.objective.name in UNPAIRED and has_no_preferences(f, "unpaired_preference")
        ),
        reason="it learns from single labelled answers, and some source has none",
        remedy="set data.format = 'unpaired_preference', for all sources, or another objective",
    ),
    Rule(
        id="preferences_read_as_text",
        keys=("objective.name", "data.format"),
        applies=lambda f: (
            f.config.objective.name == "pretrain"
            and any(form in PREFERENCE_FORMATS for _, form in f.sources_read)
        ),
        reason="it would learn rejected answers as well as chosen ones",
        remedy="set objective.name = 'dpo', 'orpo', 'simpo' or 'kto', or read data.format = 'chat'",
    ),
    Rule(
        id="preferences_among_dummy_tokens",
        keys=("objective.name", "training.dataset", "validation.dataset"),
        applies=lambda f: (
            f.config.objective.name in PAIRED | UNPAIRED
            and any(dataset == "dummy" for dataset, _ in f.sources_read)
        ),
        reason="random tokens are no answers to compare",
        remedy="read a data set of preferences, such as python_stdlib_preference",
    ),
    Rule(
        id="adapters_off_without_adapters",
        keys=("objective.reference", "adapter.kind"),
        applies=lambda f: (
            f.config.objective.reference == "adapters_off" and not f.config.adapter.specs
        ),
        reason="there are no adapters to switch off",
        remedy="set objective.reference = 'online' or 'precomputed', or train adapters",
    ),
    Rule(
        id="reference_that_does_not_exist",
        keys=("objective.reference_path",),
        applies=has_no_reference,
        reason="there is no such folder, or neither safetensors weights nor a whole step in it",
        remedy=(
            "give a Hugging Face folder, a checkpoint step or a folder of steps, or leave it out "
            "to compare with what the run starts from"
        ),
    ),
    Rule(
        id="reference_of_another_model",
        keys=("objective.reference_path", "model.flavor", "model.hf_assets_path"),
        applies=lambda f: f.reference_difference is not None,
        reason="the folder's config.json is of another model: {f.reference_difference}",
        remedy="give a reference of the policy's family, sizes and settings",
    ),
)
