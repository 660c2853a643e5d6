"""Rules on objectives that compare answers: the data they need, and what cannot be with it."""

from pathlib import Path

from engine.data.config import PREFERENCE_FORMATS
from engine.hf_io import CONFIG_NAME, read_hf_config
from engine.objectives import PAIRED, UNPAIRED, WITH_REFERENCE
from engine.rules import Facts, Rule
from models.registry import family_for_hf

SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def formats_read(facts: Facts) -> set[str]:
    """Return the formats of all sources that a run reads."""
    config = facts.config
    found: set[str] = set()
    if facts.trains:
        found |= {form for _, form in config.data.read(config.training.dataset)}
    if facts.validates:
        sources = config.validation.sources
        found |= {one.format or config.data.format for one in sources} or {config.data.format}
    return found


def datasets_read(facts: Facts) -> set[str]:
    """Return the datasets that a run reads."""
    config = facts.config
    found: set[str] = set()
    if facts.trains:
        found |= {dataset for dataset, _ in config.data.read(config.training.dataset)}
    if facts.validates:
        held_out = {one.dataset for one in config.validation.sources}
        found |= held_out or {config.validation.dataset}
    return found


def has_no_preferences(facts: Facts, form: str) -> bool:
    """Whether a source is of ours and of another format than `form`."""
    return any("." not in found and found != form for found in formats_read(facts))


def reference_differs(facts: Facts) -> bool:
    """Whether `objective.reference_path` has a config.json with other sizes than the policy."""
    folder = Path(facts.config.objective.reference_path).expanduser()
    is_named = bool(facts.config.objective.reference_path) and facts.is_here
    if facts.decoder is None or not is_named or not (folder / CONFIG_NAME).is_file():
        return False
    try:
        hf_config = read_hf_config(folder)
        theirs = family_for_hf(hf_config).config_from_hf(hf_config)
    except ValueError:  # another kind of model
        return True
    return any(getattr(theirs, name) != getattr(facts.decoder, name) for name in SIZES)


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
            f.config.objective.name == "pretrain" and bool(formats_read(f) & PREFERENCE_FORMATS)
        ),
        reason="it would learn rejected answers as well as chosen ones",
        remedy="set objective.name = 'dpo', 'orpo', 'simpo' or 'kto', or read data.format = 'chat'",
    ),
    Rule(
        id="preferences_among_dummy_tokens",
        keys=("objective.name", "training.dataset", "validation.dataset"),
        applies=lambda f: (
            f.config.objective.name in PAIRED | UNPAIRED and "dummy" in datasets_read(f)
        ),
        reason="random tokens are no answers to compare",
        remedy="read a data set of preferences, such as python_stdlib_preference",
    ),
    Rule(
        id="reference_that_does_not_exist",
        keys=("objective.reference_path",),
        applies=lambda f: (
            f.is_here
            and f.config.objective.name in WITH_REFERENCE
            and bool(path := f.config.objective.reference_path)
            and not Path(path).expanduser().is_dir()
        ),
        reason="there is no such folder",
        remedy=(
            "give a Hugging Face folder, a checkpoint step or a folder of steps, or leave it out "
            "to compare with what the run starts from"
        ),
    ),
    Rule(
        id="reference_of_another_model",
        keys=("objective.reference_path", "model.flavor", "model.hf_assets_path"),
        applies=lambda f: f.config.objective.name in WITH_REFERENCE and reference_differs(f),
        reason=(
            "the folder's config.json is of another model: the policy has a vocabulary of "
            "{f.decoder.vocab_size}, width {f.decoder.hidden_size}, {f.decoder.num_layers} blocks"
        ),
        remedy="give a reference of the policy's family, sizes and vocabulary",
    ),
)
