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
    # Measured with torch 2.13, aot_eager and inductor on the CPU: the slope of the loss is 0.815,
    # and the gradients say 1.214. Delete when the partitioner keeps masks, or draws them again.
    Rule(
        id="dropout_that_the_compiler_draws_anew",
        keys=("adapter.dropout", "activation_checkpoint.mode"),
        applies=lambda f: (
            f.trains
            and f.config.adapter.has_dropout
            and f.config.activation_checkpoint.mode == "memory_budget"
        ),
        reason="the compiler may compute masks again in the backward, and draws other channels",
        remedy="set mode = 'selective' or 'full', or adapter.dropout = 0",
    ),
)
