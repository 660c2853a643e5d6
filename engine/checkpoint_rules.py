"""Settings of `checkpoint` that cannot be combined; `combinations.py` holds the whole table."""

from pathlib import Path

from engine.hf_weights import has_weights
from engine.rules import Rule

CHECKPOINT_RULES = (
    Rule(
        id="validation_of_weights_that_are_nowhere",
        keys=("validation.only", "checkpoint.enable"),
        applies=lambda f: f.config.validation.only and not f.config.checkpoint.enable,
        reason="without checkpoints no weights are loaded, and initial values are not worth a look",
        remedy="set checkpoint.enable = true",
    ),
    Rule(
        id="seed_checkpoint_without_checkpoints",
        keys=("checkpoint.create_seed_checkpoint", "checkpoint.enable"),
        applies=lambda f: (
            f.config.checkpoint.create_seed_checkpoint and not f.config.checkpoint.enable
        ),
        reason="nothing would be saved",
        remedy="set checkpoint.enable = true",
    ),
    Rule(
        id="seed_checkpoint_that_may_not_be_saved",
        keys=("checkpoint.create_seed_checkpoint", "checkpoint.load_only"),
        applies=lambda f: (
            f.config.checkpoint.enable
            and f.config.checkpoint.create_seed_checkpoint
            and f.config.checkpoint.load_only
        ),
        reason="the one saves the initial state, the other forbids saving",
        remedy="set one of them to false",
    ),
    Rule(
        id="seed_checkpoint_from_a_run_that_only_validates",
        keys=("checkpoint.create_seed_checkpoint", "validation.only"),
        applies=lambda f: (
            f.config.checkpoint.enable
            and f.config.checkpoint.create_seed_checkpoint
            and f.config.validation.only
        ),
        reason="both end the run before its first step, and only one can",
        remedy="set one of them to false",
    ),
    Rule(
        id="export_that_may_not_be_saved",
        keys=("checkpoint.last_save_in_hf", "checkpoint.load_only"),
        applies=lambda f: (
            f.config.checkpoint.enable
            and f.config.checkpoint.last_save_in_hf
            and f.config.checkpoint.load_only
        ),
        reason="the one writes a folder after the last step, the other forbids saving",
        remedy="set one of them to false",
    ),
    Rule(
        id="resuming_past_the_last_step",
        keys=("checkpoint.load_step", "training.steps"),
        applies=lambda f: (
            f.config.checkpoint.enable
            and f.trains
            and f.config.checkpoint.load_step > f.config.training.steps
        ),
        reason="the run would be over before it starts",
        remedy="load an earlier step, or raise training.steps",
    ),
    Rule(
        id="training_state_of_a_run_without_the_adapters",
        keys=("checkpoint.initial_load_model_only", "adapter.kind"),
        applies=lambda f: (
            f.config.checkpoint.enable
            and not f.config.checkpoint.initial_load_model_only
            and bool(f.config.adapter.specs)
        ),
        reason="new adapters stand beside the parameters there, whose optimizer is not theirs",
        remedy="set checkpoint.initial_load_model_only = true",
    ),
    Rule(
        id="initial_checkpoint_that_does_not_exist",
        keys=("checkpoint.initial_load_path",),
        applies=lambda f: (
            f.is_here
            and f.config.checkpoint.enable
            and bool(path := f.config.checkpoint.initial_load_path)
            and not Path(path).is_dir()
        ),
        reason="there is no such folder",
        remedy="give a checkpoint's or a Hugging Face folder, or leave it out to start anew",
    ),
    Rule(
        id="weights_of_a_folder_that_holds_none",
        keys=(
            "checkpoint.initial_load_in_hf",
            "checkpoint.initial_load_path",
            "model.hf_assets_path",
        ),
        applies=lambda f: (
            f.is_here
            and f.config.checkpoint.enable
            and f.config.checkpoint.initial_load_in_hf
            and not f.config.checkpoint.initial_load_path
            and not has_weights(f.config.model.hf_assets_path)
        ),
        reason=(
            "without initial_load_path the weights come from model.hf_assets_path, and no "
            "safetensors files are there"
        ),
        remedy="give a folder with model.safetensors or its index as either path",
    ),
)
