"""Any causal language model of transformers that no other family builds, as its own module."""

from collections.abc import Mapping
from typing import Any

from models.registry import ModelFamily
from models.weights import KeyMap
from models.wrapped.describe import WrappedSizes, describe
from models.wrapped.initial import initial_values
from models.wrapped.module import build, read_config


def config_to_hf(config: WrappedSizes) -> dict[str, object]:
    """Return the config.json that was read."""
    return dict(config.hf)


def settings(config: WrappedSizes) -> dict[str, object]:
    """Return the config.json with transformers' defaults for what it leaves out."""
    return read_config(config.hf).to_dict()


def key_map(config: WrappedSizes) -> KeyMap:
    """Return the identity; tied parameters are stored once, older files lack the base's name."""
    return KeyMap(
        not_stored=frozenset(other for _, other in config.plan.tied),
        ignorable=config.ignorable,
        optional_prefix=f"{config.base_name}.",
    )


def build_wrapped(config: WrappedSizes) -> Any:
    """Build the model that the configuration was read off."""
    return build(config.hf, config.attention)


def config_from_hf(hf: Mapping[str, Any]) -> WrappedSizes:
    """Describe the model of a config.json of any type."""
    return describe(hf)


FAMILY = ModelFamily(
    name="hf",
    hf_model_types=(),
    flavors={},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    build=build_wrapped,
    plan=lambda config: config.plan,
    key_map=key_map,
    settings=settings,
    initial_values=initial_values,
)
