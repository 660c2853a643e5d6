"""What a case of the table of combinations is, and the cases of budgets and of preferences."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration that one rule refuses, and a neighbour that nothing refuses.

    The model is the debugmodel: 4 blocks, 8 query and 4 key/value heads, 4096 tokens.
    """

    refused: str
    """Options; `--section.key` is written `section.key`."""

    allowed: str
    world_size: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    allowed_facts: dict[str, Any] = field(default_factory=dict)


BUDGET = "data.packing=none data.batch_tokens=4096 training.local_batch_size=1"
SHARED = "parallelism.context_parallel_degree=4 parallelism.tensor_parallel_degree=2"

BUDGET_CASES = {
    "several_budgets_in_a_microbatch": Case(
        refused="data.packing=none data.batch_tokens=4096", allowed=BUDGET
    ),
    "several_budgets_in_a_validation_microbatch": Case(
        refused=f"{BUDGET} validation.enable",
        allowed=f"{BUDGET} validation.enable validation.local_batch_size=1",
    ),
    "budget_smaller_than_a_row": Case(
        refused=f"{BUDGET} training.seq_len=4089 data.pad_to_multiple=24",
        allowed=f"{BUDGET} training.seq_len=4089",
    ),
    "batches_whose_length_ranks_cannot_share": Case(
        refused=f"{BUDGET} {SHARED}",
        allowed=f"{BUDGET} {SHARED} data.pad_to_multiple=16",
        world_size=8,
    ),
    "budget_for_dummy_tokens": Case(
        refused=f"{BUDGET} training.dataset=dummy", allowed="training.dataset=dummy"
    ),
}
"""By rule."""

ANOTHER = "scripts/bench/llama_1b_untied"
UNCUT = "data.packing=best_fit data.long_document=drop"
PAIRS = f"data.format=preference {UNCUT}"

PREFERENCE_CASES = {
    "pairs_wanted_and_not_read": Case(
        refused=f"objective.name=dpo data.format=unpaired_preference {UNCUT}",
        allowed=f"objective.name=dpo {PAIRS}",
    ),
    "labelled_answers_wanted_and_not_read": Case(
        refused=f"objective.name=kto {PAIRS}",
        allowed=f"objective.name=kto data.format=unpaired_preference {UNCUT}",
    ),
    "preferences_read_as_text": Case(
        refused=PAIRS, allowed=f"objective.name=tests.engine.own_parts {PAIRS}"
    ),
    "preferences_among_dummy_tokens": Case(
        refused=f"objective.name=orpo {PAIRS} training.dataset=dummy",
        allowed=f"objective.name=orpo {PAIRS} validation.dataset=dummy",
    ),
    "reference_that_does_not_exist": Case(
        refused=f"objective.name=dpo {PAIRS} objective.reference_path=/no/such/folder",
        allowed=f"objective.name=dpo {PAIRS} objective.reference_path=.",
    ),
    "reference_of_another_model": Case(
        refused=f"objective.name=dpo {PAIRS} objective.reference_path={ANOTHER}",
        allowed=f"objective.name=orpo {PAIRS}",
    ),
}
"""By rule."""
