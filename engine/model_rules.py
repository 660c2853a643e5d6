"""Rules on what the model itself cannot do, with the reasons that its sizes give."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.rules import Facts, Rule
from models.sizes import Feature


@dataclass(frozen=True, kw_only=True, slots=True)
class _Use:
    """When a run uses a feature that a model may lack."""

    keys: tuple[str, ...]
    applies: Callable[[Facts], bool]
    remedy: str


USES: dict[Feature, _Use] = {
    "tensor_parallel": _Use(
        keys=("parallelism.tensor_parallel_degree", "model.name"),
        applies=lambda f: f.tp > 1,
        remedy="set it to 1, and raise parallelism.data_parallel_shard_degree instead",
    ),
    "sequence_parallel": _Use(
        keys=("parallelism.sequence_parallel", "model.name"),
        applies=lambda f: f.tp > 1 and f.config.parallelism.sequence_parallel,
        remedy="set it to false",
    ),
    "context_parallel": _Use(
        keys=("parallelism.context_parallel_degree", "model.name"),
        applies=lambda f: f.cp > 1,
        remedy="set it to 1",
    ),
    "packed_documents": _Use(
        keys=("data.packing", "data.format", "model.name"),
        applies=lambda f: f.packs_documents,
        remedy="{f.packing_remedy}",
    ),
    "embedding_noise": _Use(
        keys=("training.neftune_noise_alpha", "model.name"),
        applies=lambda f: f.trains and f.config.training.neftune_noise_alpha > 0,
        remedy="set it to 0",
    ),
    "adapter_dropout": _Use(
        keys=("adapter.dropout", "adapter.more", "model.name"),
        applies=lambda f: f.trains and f.config.adapter.has_dropout,
        remedy="set it to 0",
    ),
    "liger_kernels": _Use(
        keys=("model.kernels", "model.name"),
        applies=lambda f: f.asks_for_liger,
        remedy="set it to 'auto'",
    ),
}
"""Each feature: the settings that ask for it, when they do, and what to write instead."""


def _rule(feature: Feature, use: _Use) -> Rule:
    def applies(facts: Facts) -> bool:
        return use.applies(facts) and facts.refusal(feature) is not None

    return Rule(
        id=f"{feature}_of_a_model_without_it",
        keys=use.keys,
        applies=applies,
        reason=f"{{f.refusals[{feature}]}}",
        remedy=use.remedy,
    )


MODEL_RULES = (
    *(_rule(feature, use) for feature, use in USES.items()),
    Rule(
        id="attention_backend_that_the_model_does_not_have",
        keys=("model.attention", "model.name"),
        applies=lambda f: (
            f.decoder is not None
            and bool(f.decoder.attention_backends)
            and f.attention not in f.decoder.attention_backends
        ),
        reason="the model's own attention runs with {f.decoder.attention_backends}",
        remedy="set model.attention = 'auto'",
    ),
    Rule(
        id="rows_longer_than_the_model_has_positions",
        keys=("training.seq_len", "validation.seq_len", "model.name"),
        applies=lambda f: (
            f.decoder is not None
            and f.decoder.longest_row is not None
            and f.longest_row > f.decoder.longest_row
        ),
        reason=(
            "the model has an embedding for each of {f.decoder.longest_row} positions, and rows of "
            "{f.longest_row} tokens will be read"
        ),
        remedy="set seq_len to at most {f.decoder.longest_row}",
    ),
)
