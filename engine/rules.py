"""What a rule about a configuration is, and what it may look at. The table is `combinations.py`."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from engine.data.chat_templates import template_names
from engine.data.config import PREFERENCE_FORMATS
from engine.hf_io import CONFIG_NAME
from engine.manifest import step_folder, steps_in
from engine.model import ModelNeeds, choose_backend, difference_from, find_architecture
from engine.objectives import WITH_REFERENCE
from engine.provenance import HF_PREFIX
from engine.schema import value_of
from models.registry import member_names
from models.sizes import Feature, ModelSizes

if TYPE_CHECKING:
    from engine.config import JobConfig

FLOAT8_CAPABILITY = (8, 9)
"""CUDA compute capability from which GPUs multiply in float8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What rules may look at."""

    config: "JobConfig"
    world_size: int
    device_type: str
    decoder: ModelSizes | None = None
    """Sizes of the model; None where they could not be found, which is reported elsewhere."""

    attention: str = "sdpa"
    """Attention backend in force."""

    is_here: bool = True
    """Whether this machine is one that trains, so that its files, packages and GPUs count."""

    num_gpus: int = 0
    """Usable GPUs of this machine."""

    num_local_ranks: int = 1
    """Ranks on this machine."""

    gpu_capability: tuple[int, int] | None = None
    """CUDA compute capability of the GPU; None where this machine has none."""

    missing: frozenset[str] = frozenset()
    """Optional programs and packages that are not installed."""

    tokenizer_vocab_size: int | None = None
    """Tokens that the tokenizer can produce; None where it is not loaded yet."""

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.config.parallelism.tensor_parallel_degree

    @property
    def cp(self) -> int:
        """Context-parallel degree."""
        return self.config.parallelism.context_parallel_degree

    @property
    def fsdp_degree(self) -> int:
        """Ranks that share one copy of the parameters."""
        return self.world_size // (self.config.parallelism.data_parallel_replicate_degree * self.tp)

    def uses_context(self, mode: str) -> bool:
        """Whether ranks share the tokens of a row in this mode."""
        return self.cp > 1 and self.config.parallelism.context_parallel_mode == mode

    @property
    def local_heads(self) -> int:
        """Query heads of one tensor-parallel rank; 0 where they are not known or not whole."""
        return 0 if self.decoder is None else _whole(self.decoder.num_heads, self.tp)

    @property
    def local_kv_heads(self) -> int:
        """Key/value heads of one tensor-parallel rank; 0 where not known or not whole."""
        return 0 if self.decoder is None else _whole(self.decoder.num_kv_heads, self.tp)

    @property
    def fixed_degrees(self) -> int:
        """Product of the degrees that are not inferred."""
        parallelism = self.config.parallelism
        shard = max(parallelism.data_parallel_shard_degree, 1)
        return parallelism.data_parallel_replicate_degree * shard * self.cp * self.tp

    @property
    def num_data_parallel_ranks(self) -> int:
        """Ranks, or groups of them, that read rows of their own."""
        return self.world_size // (self.cp * self.tp)

    @property
    def even_data_parallel_ranks(self) -> str:
        """Numbers of data-parallel ranks that share the rows of a step without fillers."""
        return ", ".join(map(str, self.config.training.even_degrees()))

    @property
    def trains(self) -> bool:
        """Whether there will be a backward pass."""
        return not self.config.validation.only

    @property
    def validates(self) -> bool:
        """Whether held-out rows will be read."""
        return self.config.validation.enable or self.config.validation.only

    @property
    def shortest_row(self) -> int:
        """Tokens of the shortest rows that will be read."""
        training, validation = self.config.training.seq_len, self.config.validation.seq_len
        read = [training] * self.trains + [validation] * self.validates
        return min(read)

    @property
    def longest_padded_row(self) -> int:
        """Tokens of the longest rows that will be read, as a batch under a budget pads them."""
        training, validation = self.config.training.seq_len, self.config.validation.seq_len
        longest = max([training] * self.trains + [validation] * self.validates)
        multiple = self.config.data.pad_to_multiple
        return -(-longest // multiple) * multiple

    @property
    def shared_multiple(self) -> int:
        """Least multiple of `data.pad_to_multiple` that ranks which share a row can divide."""
        return math.lcm(self.config.data.pad_to_multiple, self.config.parallelism.token_multiple)

    @property
    def attention_refusal(self) -> str | None:
        """Why the attention backend cannot run on this device."""
        needs = model_needs(self.config, self.device_type)
        if self.decoder is not None:
            return needs.refusal_for(self.attention, self.decoder)
        return needs.refusal(self.attention, head_dim=64, has_window=False, has_softcap=False)

    @property
    def has_window(self) -> bool:
        """Whether some blocks of the model see less than the longest rows that are read."""
        longest = model_needs(self.config, self.device_type).longest_row
        return self.decoder is not None and self.decoder.has_window_in(longest)

    def refusal(self, feature: Feature) -> str | None:
        """Why the model cannot do this, or None where it can."""
        return None if self.decoder is None else self.decoder.refusal(feature)

    @property
    def refusals(self) -> dict[str, str | None]:
        """The same for every feature, for messages."""
        return {feature: self.refusal(feature) for feature in get_args(Feature)}

    @property
    def sources_read(self) -> set[tuple[str, str]]:
        """Dataset and format of every source that will be read."""
        config, form = self.config, self.config.data.format
        found = config.data.read(config.training.dataset) if self.trains else set()
        if self.validates:
            held_out = {(one.dataset, one.format or form) for one in config.validation.sources}
            found = found | (held_out or {(config.validation.dataset, form)})
        return found

    @property
    def names(self) -> dict[str, list[str]]:
        """The files of ours that a key can name, by what they hold."""
        return {
            "objective": list(member_names("engine.objectives")),
            "format": list(member_names("engine.data.formats")),
            "template": template_names(),
        }

    @property
    def unknown_format(self) -> str | None:
        """A format that is read and is neither a file of ours nor a dotted path."""
        read = sorted(form for dataset, form in self.sources_read if dataset != "dummy")
        return next((n for n in read if "." not in n and n not in self.names["format"]), None)

    @property
    def reads_preferences(self) -> bool:
        """Whether rows hold answers to compare, each with another beside it."""
        return any(
            name != "dummy" and form in PREFERENCE_FORMATS for name, form in self.sources_read
        )

    @property
    def packs_documents(self) -> bool:
        """Whether rows hold several documents; preferences always do, dummy rows never."""
        has_documents = any(dataset != "dummy" for dataset, _ in self.sources_read)
        is_packed = self.config.data.packing != "none" and has_documents
        return is_packed or self.reads_preferences

    @property
    def packing_remedy(self) -> str:
        """What makes rows of one document."""
        if self.reads_preferences:
            return "train another model: two answers are compared in one row, however it is packed"
        return "set data.packing = 'none'"

    @property
    def reference_folder(self) -> Path | None:
        """The folder of `objective.reference_path`, where this machine is to read it."""
        objective = self.config.objective
        if not self.is_here or objective.name not in WITH_REFERENCE or not objective.reference_path:
            return None
        return Path(objective.reference_path).expanduser()

    @property
    def reference_difference(self) -> str | None:
        """In what that folder's config.json is another model's; None where it is not, or none.

        A step has its config.json under `hf/`, and the steps of a folder are of one model.
        """
        folder = self.reference_folder
        if folder is None or self.decoder is None:
            return None
        steps = [folder, *(step_folder(folder, step) for step in steps_in(folder)[-1:])]
        for place in (folder, *(step / HF_PREFIX for step in steps)):
            if (place / CONFIG_NAME).is_file():
                return difference_from(place, self.config.model, self.decoder)
        return None

    @property
    def longest_row(self) -> int:
        """Tokens of the longest rows that will be read, padding included."""
        return _longest_row(self.config)

    @property
    def compiles_model(self) -> bool:
        """Whether blocks are compiled."""
        return self.config.compile.enable and "model" in self.config.compile.components

    @property
    def asks_for_liger(self) -> bool:
        """Whether Liger's kernels are asked for by name."""
        return self.config.model.kernels == "liger"

    @property
    def multiplies_float8(self) -> bool:
        """Whether the device multiplies in float8; a GPU that is not here is taken to."""
        if self.device_type != "cuda":
            return False
        known = self.gpu_capability if self.is_here else None
        return known is None or known >= FLOAT8_CAPABILITY

    @property
    def float8_capability(self) -> str:
        """What GPU that takes, for messages."""
        return ".".join(map(str, FLOAT8_CAPABILITY))

    @property
    def freezes_weights(self) -> bool:
        """Whether weights of the model itself are not trained."""
        return bool(self.config.model.freeze or self.config.adapter.specs)

    def uses_inductor(self, device_type: str) -> bool:
        """Whether this machine will compile with inductor for such a device."""
        config = self.config.compile
        return (
            self.is_here
            and self.device_type == device_type
            and config.enable
            and config.backend == "inductor"
        )

    @property
    def selective_every(self) -> int | None:
        """The n of every n-th checkpointed block, where that mode is on."""
        config = self.config.activation_checkpoint
        option = config.selective_ac_option
        return int(option) if config.mode == "selective" and option.isdigit() else None


def _whole(size: int, parts: int) -> int:
    return 0 if size % parts else size // parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One combination that is refused."""

    id: str
    keys: tuple[str, ...]
    """Settings that the message shows with their values."""

    applies: Callable[[Facts], bool]
    reason: str
    """Why, in words that follow the settings; `{f.name}` is replaced by a fact."""

    remedy: str
    """What to write instead."""

    def message(self, facts: Facts) -> str:
        """Return the settings with their values, the reason and the remedy."""
        shown = " and ".join(f"{key} = {value_of(facts.config, key)!r}" for key in self.keys)
        return f"{shown}: {self.reason.format(f=facts)}; {self.remedy.format(f=facts)}"


def model_needs(config: "JobConfig", device_type: str) -> ModelNeeds:
    """Return what a configuration asks of the model's arithmetic on such a device."""
    parallelism = config.parallelism
    return ModelNeeds(
        device_type=device_type,
        training=not config.validation.only,
        dtype=getattr(torch, config.training.mixed_precision_param),
        longest_row=_longest_row(config),
        separate_operations=(not config.compile.enable and parallelism.tensor_parallel_degree == 1),
        whole_rows=(
            parallelism.context_parallel_degree == 1
            or parallelism.context_parallel_mode == "ulysses"
        ),
    )


def _longest_row(config: "JobConfig") -> int:
    validates = config.validation.enable or config.validation.only
    read = [config.training.seq_len] * (not config.validation.only)
    longest = max(read + [config.validation.seq_len] * validates)
    multiple = math.lcm(config.parallelism.token_multiple, config.data.pad_to_multiple)
    return -(-longest // multiple) * multiple


def missing_extras() -> frozenset[str]:
    """Return which optional packages and programs that rules name are not installed."""
    missing = {
        name for name in ("wandb", "triton", "liger_kernel", "torchao") if find_spec(name) is None
    }
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if not any(shutil.which(name) for name in compilers):
        missing.add("a C++ compiler")
    return frozenset(missing)


def usable_gpus() -> int:
    """Return the number of GPUs that torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gather_facts(
    config: "JobConfig", world_size: int, *, device_type: str | None = None, is_here: bool = True
) -> tuple[Facts, list[str]]:
    """Return what the rules look at, and the mistakes met while finding the model's sizes.

    `device_type` is where it will train; None asks `job.device` and this machine.
    """
    num_gpus = usable_gpus()
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device_type is None:
        has_gpus = num_gpus >= num_local_ranks
        on_cuda = config.job.device == "cuda" or (config.job.device == "auto" and has_gpus)
        device_type = "cuda" if on_cuda else "cpu"
    facts = Facts(
        config=config,
        world_size=world_size,
        device_type=device_type,
        is_here=is_here,
        num_gpus=num_gpus,
        num_local_ranks=num_local_ranks,
        gpu_capability=torch.cuda.get_device_capability() if num_gpus else None,
        missing=missing_extras() if is_here else frozenset(),
    )
    try:
        architecture = find_architecture(config.model)
    except ValueError as error:
        return facts, [str(error)]
    backend = choose_backend(config.model, architecture, model_needs(config, device_type))
    return replace(facts, decoder=architecture.config, attention=backend), []
