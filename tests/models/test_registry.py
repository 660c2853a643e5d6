"""Families are found by file name, and mistakes name what there is."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest

from models.registry import family_for_hf, load_family, load_member, member_names


def test_a_family_is_found_by_its_file_name():
    assert load_family("llama3").name == "llama3"


def test_an_unknown_family_names_the_files_there_are():
    with pytest.raises(ValueError, match=r"did you mean 'llama3'.*llama3"):
        load_family("lama3")


def test_a_dotted_name_loads_a_module_from_outside_the_repository(monkeypatch):
    module = ModuleType("somebody.their_model")
    module.FAMILY = "theirs"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody", ModuleType("somebody"))
    monkeypatch.setitem(sys.modules, "somebody.their_model", module)
    assert load_member("models.families", "somebody.their_model", "FAMILY") == "theirs"


def test_a_dotted_name_that_cannot_be_imported_or_lacks_the_record_is_a_user_mistake():
    with pytest.raises(ValueError, match="cannot be imported"):
        load_family("nobody.no_model")
    with pytest.raises(ValueError, match="does not define 'FAMILY'"):
        load_family("json.decoder")


def test_a_config_json_chooses_its_family_by_model_type():
    assert family_for_hf({"model_type": "llama"}).name == "llama3"
    with pytest.raises(ValueError, match=r"model_type = 'gpt2'.*llama"):
        family_for_hf({"model_type": "gpt2"})


def test_an_unknown_flavor_suggests_the_nearest_one():
    with pytest.raises(ValueError, match=r"did you mean '8B'"):
        load_family("llama3").flavor("8b")


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_flavors_named_after_a_backend_differ_in_their_attention_alone(backend: str):
    family = load_family("llama3")
    for size in ("debugmodel", "8B", "70B"):
        expected = replace(family.flavor(size), attention=backend)
        assert family.flavor(f"{size}_{backend}") == expected
    assert family.flavor(f"debugmodel_{backend}_attn") == family.flavor(f"debugmodel_{backend}")
    assert family.flavor("8B").attention == "sdpa"


def test_every_file_of_the_families_package_defines_the_family_of_its_name():
    for name in member_names("models.families"):
        assert load_family(name).name == name
