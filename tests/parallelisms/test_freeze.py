"""What the entries of `model.freeze` leave to train."""

import pytest
import torch

from models.decoder import DecoderLM
from parallelisms.freeze import trainable_names
from tests.parity.cases import Case, model_config

BLOCKS = ("model.layers.0", "model.layers.1", "model.layers.2")


def frozen_by(*entries: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> set[str]:
    """Return the names that the entries stop, with the blocks' own names left out of them."""
    with torch.device("meta"):
        model = DecoderLM(model_config(Case(tied=tied))).to(dtype)
    names = {name for name, _ in model.named_parameters()}
    return names - trainable_names(model, entries, BLOCKS)


def blocks_of(names: set[str]) -> list[int]:
    """Return the numbers of the blocks that are frozen whole; nothing else may be frozen."""
    numbers = sorted({int(name.split(".")[2]) for name in names})
    assert names == frozen_by(*(BLOCKS[number] for number in numbers))
    return numbers


@pytest.mark.parametrize(
    ("entry", "numbers"),
    [
        ("blocks:bottom:1", [0]),
        ("blocks:bottom:3", [0, 1, 2]),
        ("blocks:top:1", [2]),
        ("blocks:top:2", [1, 2]),
        ("blocks:interweave:2", [0, 2]),
        ("blocks:interweave:3", [0, 1]),
    ],
)
def test_blocks_are_counted_from_either_end_or_interweaved(entry: str, numbers: list[int]) -> None:
    assert blocks_of(frozen_by(entry)) == numbers


def test_a_name_stands_for_all_below_it_and_an_expression_for_whole_parameter_names() -> None:
    assert frozen_by() == set()
    assert frozen_by("model.norm") == {"model.norm.weight"} == frozen_by("model.norm.weight")
    assert blocks_of(frozen_by("model.layers.[02]")) == [0, 2]
    assert len(frozen_by("model.layers.*.self_attn")) == 12
    assert frozen_by("model.layers.*.self_attn") == frozen_by(r"regex:.*\.self_attn\..*")
    assert frozen_by(r"regex:model\.norm\.weight|lm_.*") == {"model.norm.weight", "lm_head.weight"}
    assert len(frozen_by(r"regex:(?!lm_head).*")) == len(frozen_by("model"))
    assert frozen_by("lm_head", "model.norm") == frozen_by("lm_head") | frozen_by("model.norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", ["lm_head", "model.embed_tokens", "regex:lm_head.*"])
def test_a_tied_tensor_is_frozen_by_either_of_its_names(entry: str, dtype: torch.dtype) -> None:
    assert frozen_by(entry, tied=True, dtype=dtype) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("model.embed_token", r"'model\.embed_token' matches nothing.*model\.embed_tokens"),
        ("model.layers.3", r"'model\.layers\.3' matches nothing.*model\.layers\.2"),
        (r"regex:model\.norm", r"no whole parameter name.*nearest.*model\.norm\.weight"),
        ("regex:(", r"'\(' is no regular expression \(missing \)"),
        ("blocks:top:4", r"'blocks:top:4' asks for 4 of the model's 3 blocks; give at most 3"),
        ("blocks:interweave:4", r"asks for 4 of the model's 3 blocks"),
        ("blocks:interweave:1", r"chooses no blocks.*interweave:n with n from 2"),
        ("blocks:bottom:0", r"'blocks:bottom:0' chooses no blocks"),
        ("blocks:bottom:-1", r"'blocks:bottom:-1' chooses no blocks"),
        ("blocks:first:2", r"'blocks:first:2' chooses no blocks"),
        ("blocks:", r"'blocks:' chooses no blocks"),
        ("layers:top:2", r"begins with 'layers'; give a pattern of names, 'regex:'"),
    ],
)
def test_an_entry_that_freezes_nothing_is_refused_by_name(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.freeze.*{message}"):
        frozen_by(entry)
