"""Which architecture a run trains: a flavor of a family, or the config.json of a folder."""

import logging
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from engine.distributed import cores_of_rank
from engine.hf_io import CONFIG_NAME, read_hf_config
from models.attention import unsupported_reason
from models.initialise import initial_values
from models.layers import liger
from models.plan import ModelPlan
from models.registry import ModelFamily, family_for_hf, load_family
from models.sizes import ModelSizes
from parallelisms.materialise import Draw

UNFELT = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache"),
    }
)
"""Keys of a config.json that do not change what given weights compute."""

log = logging.getLogger("tessera")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture and how its arithmetic is done."""

    name: str = "llama3"
    """Family: the name of a file in models/families; "hf" trains transformers' own module of any
    other model whose config.json is in `hf_assets_path`."""

    flavor: str = "debugmodel"
    """Size from the family's table; ignored where `hf_assets_path` holds a config.json."""

    hf_assets_path: str = ""
    """Hugging Face folder with a tokenizer, and optionally config.json, which then decides the
    architecture, and weights; empty takes the built-in tokenizer."""

    tokenizer_path: str | None = None
    """Folder of the tokenizer where it is not `hf_assets_path`."""

    converters: list[str] = field(default_factory=list[str])
    """Rewrites of the model: "float8" multiplies in the blocks' linear layers in float8 (section
    `quantize.linear.float8`), "nf4" keeps those of them that are frozen in four bits."""

    print_after_conversion: bool = False
    """Log the model's modules after the converters have run."""

    attention: Literal["auto", "eager", "sdpa", "flex", "cudnn", "varlen", "flash"] = "auto"
    """Attention backend; auto takes sdpa on the CPU, or eager for models that cap scores softly,
    and on CUDA cudnn where it can run (package nvidia-cudnn-frontend, Hopper and later), else
    flex."""

    kernels: Literal["auto", "torch", "liger"] = "auto"
    """What computes norms, SwiGLU and GEGLU, rotary embedding and the scores of labels: torch, or
    the Triton kernels of the package liger-kernel, on GPUs without compile.enable and tensor
    parallelism; auto takes Liger's wherever they can run."""

    freeze: list[str] = field(default_factory=list[str])
    """What is not trained: names of parameters or modules (`*` within one dot-separated part),
    `regex:` and an expression for whole parameter names, or `blocks:bottom:n`, `blocks:top:n` or
    `blocks:interweave:n` (all but every n-th block)."""

    @property
    def tokenizer_folder(self) -> str:
        """Folder to read the tokenizer from; empty means the built-in tokenizer."""
        return self.tokenizer_path or self.hf_assets_path


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A family with the sizes that this run takes from it."""

    family: ModelFamily
    config: Any
    """The family's own configuration record, such as `models.decoder.DecoderConfig`."""

    origin: str
    """Where the sizes come from, for the log."""

    @property
    def plan(self) -> ModelPlan:
        """The parallel description of this architecture."""
        return self.family.plan(self.config)

    def build_meta(self) -> nn.Module:
        """Build the model without memory for its parameters."""
        with torch.device("meta"):
            return self.family.build(self.config)

    def initial_values(self, model: nn.Module, *, seed: int) -> Draw:
        """Return the function that draws part of a named parameter of `model`."""
        if self.family.initial_values is not None:
            return self.family.initial_values(model, self.config, seed=seed)
        return initial_values(model, self.config, seed=seed, num_threads=cores_of_rank())


def _named_family(config: ModelConfig) -> ModelFamily:
    try:
        return load_family(config.name)
    except ValueError as error:
        raise ValueError(f"model.name = {config.name!r}: {error}") from error


def find_architecture(config: ModelConfig) -> Architecture:
    """Return what flavor or config.json say, whatever the device can run."""
    folder = config.hf_assets_path
    if folder and not Path(folder).is_dir():
        raise ValueError(
            f"model.hf_assets_path = {folder!r} is not a folder; download the tokenizer there with "
            "scripts/download_assets.py, or set it to '' for the built-in tokenizer"
        )
    if folder and (Path(folder) / CONFIG_NAME).is_file():
        hf_config = read_hf_config(Path(folder))
        named = _named_family(config)
        family = family_for_hf(hf_config) if named.hf_model_types else named
        if family.name != config.name:
            raise ValueError(
                f"model.name = {config.name!r}, but {folder}/config.json is of the family "
                f"{family.name!r}; set model.name = {family.name!r}"
            )
        try:
            sizes = family.config_from_hf(hf_config)
        except ValueError as error:
            raise ValueError(f"model.hf_assets_path = {folder!r}: {error}") from error
        return Architecture(
            family=family,
            config=sizes,
            origin=f"{folder}/config.json (model.flavor is ignored)",
        )
    family = _named_family(config)
    return Architecture(
        family=family, config=family.flavor(config.flavor), origin=f"flavor {config.flavor}"
    )


def difference_from(folder: Path, config: ModelConfig, sizes: Any) -> str | None:
    """Say in what the model of a folder's config.json computes otherwise than one of `sizes`.

    That is the first key that differs, or why the run's family cannot read the file; None where
    the two are the same. Dropout, which is never applied, does not count.
    """
    named = _named_family(config)
    settings = named.settings or named.config_to_hf
    try:
        theirs = settings(named.config_from_hf(read_hf_config(folder)))
    except ValueError as error:
        return str(error)
    ours = settings(sizes)
    # Where it is more than a limit, our families have it among the rotary settings.
    unfelt = UNFELT if named.settings else UNFELT | {"max_position_embeddings"}
    for key in dict.fromkeys([*ours, *theirs]):
        if key in unfelt or key.endswith(("dropout", "pdrop")):
            continue
        if ours.get(key) != theirs.get(key):
            return f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} in the run"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNeeds:
    """What a run asks of the model's arithmetic."""

    device_type: str
    training: bool = True

    dtype: torch.dtype | None = None
    """That of queries, keys and values; None where it is not known."""

    separate_operations: bool = False
    """Blocks are run operation by operation on whole tensors: not compiled, not tensor-parallel."""

    longest_row: int | None = None
    """Tokens of the longest row, padding included; None where it is not known."""

    whole_rows: bool = True
    """Queries meet the keys of their own rows only, as they do unless context parallelism hands
    keys round."""

    def refusal(
        self, backend: str, *, head_dim: int, has_window: bool, has_softcap: bool
    ) -> str | None:
        """Say why a backend cannot do this, or None if it can."""
        return unsupported_reason(
            backend,
            device_type=self.device_type,
            training=self.training,
            head_dim=head_dim,
            dtype=self.dtype,
            has_window=has_window,
            has_softcap=has_softcap,
        )

    def refusal_for(self, backend: str, sizes: ModelSizes) -> str | None:
        """Say why a backend cannot do this for a model of such sizes."""
        return self.refusal(
            backend,
            head_dim=sizes.head_dim,
            has_window=sizes.has_window_in(self.longest_row),
            has_softcap=sizes.attention_softcap is not None,
        )


def choose_backend(config: ModelConfig, architecture: Architecture, needs: ModelNeeds) -> str:
    """Return the attention backend that `model.attention` asks for."""
    sizes = architecture.config
    if config.attention != "auto":
        return config.attention
    # A flavor asks for one by name, on any device; or it has one of those that run everywhere.
    asks = sizes.attention not in ("sdpa", "eager") or sizes.attention in sizes.attention_backends
    if asks or needs.device_type != "cuda":
        return sizes.attention
    has_cudnn = needs.whole_rows and find_spec("cudnn") is not None
    return "cudnn" if has_cudnn and needs.refusal_for("cudnn", sizes) is None else "flex"


def choose_kernels(
    config: ModelConfig, architecture: Architecture, needs: ModelNeeds
) -> liger.Kernels:
    """Return the kernels that `model.kernels` asks for."""
    if config.kernels != "auto":
        return config.kernels
    # Llama 1B, 2 rows of 8,192 tokens, one H100: torch operation by operation 35,981 tokens/s,
    # Liger 47,131, compiled 48,546 (scripts/bench/records/2026-11-24-h100-kernels-1gpu.json).
    can = architecture.config.refusal("liger_kernels") is None
    is_faster = can and needs.separate_operations
    return "liger" if is_faster and liger.unsupported_reason(needs.device_type) is None else "torch"


def resolve_architecture(config: ModelConfig, needs: ModelNeeds) -> Architecture:
    """Decide sizes, attention backend and kernels; raise ValueError where they cannot be had."""
    architecture = find_architecture(config)
    backend = choose_backend(config, architecture, needs)
    sizes = architecture.config
    reason = needs.refusal_for(backend, sizes)
    if reason is not None:
        raise ValueError(f"model.attention = {config.attention!r} cannot run here: {reason}")
    kernels = choose_kernels(config, architecture, needs)
    reason = liger.unsupported_reason(needs.device_type) if kernels == "liger" else None
    if reason is not None:
        raise ValueError(f"model.kernels = {config.kernels!r} cannot run here: {reason}")
    return replace(architecture, config=replace(sizes, attention=backend, kernels=kernels))
