"""Rules on adapters beside what else a run does."""

from engine.rules import Rule

ADAPTER_RULES = (
    Rule(
        id="dropout_that_recomputation_draws_anew",
        keys=("adapter.dropout", "activation_checkpoint.preserve_rng_state"),
        applies=lambda f: (
            f.trains
            and f.config.adapter.has_dropout
            and f.config.activation_checkpoint.mode in ("full", "selective")
            and not f.config.activation_checkpoint.preserve_rng_state
        ),
        reason="what is computed again in the backward would drop other channels than before",
        remedy="set preserve_rng_state = true, or adapter.dropout = 0",
    ),
)
