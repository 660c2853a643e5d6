"""Finds an architecture by its file name and describes it in one record.

Standard library only, so that every package can look things up without loading torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from models.plan import ModelPlan

if TYPE_CHECKING:
    from models.weights import KeyMap

FAMILIES = "models.families"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily:
    """Everything the engine needs to know about one architecture; see `models/families/`."""

    name: str
    """File name of the family, the value of `model.name`."""

    hf_model_types: tuple[str, ...]
    """Values of `model_type` in a Hugging Face config.json that this family builds; empty: any, but
    only for a run that names the family."""

    flavors: Mapping[str, Any]
    """Named sizes, the values of `model.flavor`: records of the family's own, as `ModelSizes`."""

    config_from_hf: Callable[[Mapping[str, object]], Any]
    """Read a config.json; ValueError for what the family cannot reproduce."""

    config_to_hf: Callable[[Any], dict[str, object]]
    """Write a complete config.json, without the dtype of the weights."""

    build: Callable[[Any], Any]
    """Make the model on the current default device, parameters not initialised."""

    plan: Callable[[Any], ModelPlan]
    """Describe the model to the parallelisms."""

    key_map: Callable[[Any], "KeyMap"]
    """Translate parameter names to and from a Hugging Face checkpoint."""

    settings: Callable[[Any], Mapping[str, object]] | None = None
    """Takes the place of `config_to_hf` where models are compared; for a family whose config.json
    may leave out what has a default."""

    initial_values: Callable[..., Callable[..., Any]] | None = None
    """Takes the place of the function of that name in `models/initialise.py`."""

    def flavor(self, name: str) -> Any:
        """Return the named size; ValueError lists the sizes there are."""
        if not self.flavors:
            raise ValueError(
                f"model.name = {self.name!r} has no sizes of its own; set model.hf_assets_path to "
                "a Hugging Face folder with a config.json"
            )
        if name in self.flavors:
            return self.flavors[name]
        raise ValueError(
            f"model.flavor = {name!r} is not a size of {self.name}; "
            f"{suggestion(name, self.flavors)}use one of {', '.join(self.flavors)}"
        )


def suggestion(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Return "did you mean 'x'? " for the nearest known name, or nothing."""
    by_lower_case = {one.lower(): one for one in known}
    nearest = get_close_matches(name.lower(), by_lower_case, n=1)
    return f"did you mean {by_lower_case[nearest[0]]!r}? " if nearest else ""


def member_names(package: str) -> tuple[str, ...]:
    """Return the names of the modules in a package, sorted, but those with `_` first."""
    found = iter_modules(import_module(package).__path__)
    return tuple(sorted(m.name for m in found if not (m.ispkg or m.name.startswith("_"))))


def load_member(package: str, name: str, attribute: str) -> Any:
    """Return `attribute` of the module called `name` in `package`.

    A dotted `name` is the path of a module outside this repository. ValueError lists the modules
    that the package holds.
    """
    if "." in name:
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"module {name!r} cannot be imported: {error}") from error
        if not hasattr(module, attribute):
            raise ValueError(f"module {name!r} does not define {attribute!r}")
        return getattr(module, attribute)
    names = member_names(package)
    if name not in names:
        raise ValueError(
            f"{name!r} is not one of the files of {package}; {suggestion(name, names)}"
            f"use one of {', '.join(names)}, or the dotted path of a module of your own"
        )
    return getattr(import_module(f"{package}.{name}"), attribute)


def load_family(name: str) -> ModelFamily:
    """Return the family in `models/families/<name>.py`."""
    return load_member(FAMILIES, name, "FAMILY")


def family_for_hf(hf_config: Mapping[str, object], *, or_any: bool = False) -> ModelFamily:
    """Return the family that builds the model of a Hugging Face config.json.

    With `or_any` that is the one that builds any for types that no other builds; else ValueError.
    """
    model_type = hf_config.get("model_type")
    families = [load_family(name) for name in member_names(FAMILIES)]
    for family in families:
        if model_type in family.hf_model_types:
            return family
    if or_any:
        return next(family for family in families if not family.hf_model_types)
    known = sorted(t for family in families for t in family.hf_model_types)
    raise ValueError(
        f"config.json has model_type = {model_type!r}, which no file of models/families builds; "
        f"use a model of type {', '.join(known)}, or train transformers' own module of this type "
        "with model.name = 'hf'"
    )
