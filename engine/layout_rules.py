"""Rules on how ranks divide the work: degrees, heads, widths, rows of a batch, tokens of a row.

That tokens can be dealt evenly needs a rule only where a budget counts the padding: rows are padded
to a multiple of `ParallelConfig.token_multiple`.
"""

from engine.rules import Rule
from models.attention import needs_whole_rows, returns_lse

LAYOUT_RULES = (
    Rule(
        id="degrees_that_do_not_divide_the_ranks",
        keys=(
            "parallelism.data_parallel_replicate_degree",
            "parallelism.context_parallel_degree",
            "parallelism.tensor_parallel_degree",
        ),
        applies=lambda f: (
            f.config.parallelism.data_parallel_shard_degree == -1
            and f.world_size % f.fixed_degrees != 0
        ),
        reason="their product {f.fixed_degrees} does not divide the {f.world_size} ranks",
        remedy="lower a degree, or start a multiple of {f.fixed_degrees} ranks",
    ),
    Rule(
        id="degrees_that_do_not_multiply_to_the_ranks",
        keys=(
            "parallelism.data_parallel_replicate_degree",
            "parallelism.data_parallel_shard_degree",
            "parallelism.context_parallel_degree",
            "parallelism.tensor_parallel_degree",
        ),
        applies=lambda f: (
            f.config.parallelism.data_parallel_shard_degree != -1
            and f.fixed_degrees != f.world_size
        ),
        reason="their product is {f.fixed_degrees}, but the run has {f.world_size} ranks",
        remedy="set data_parallel_shard_degree = -1 to infer it, or start {f.fixed_degrees} ranks",
    ),
    Rule(
        id="heads_that_tensor_parallelism_does_not_divide",
        keys=("parallelism.tensor_parallel_degree",),
        applies=lambda f: f.decoder is not None and f.decoder.num_kv_heads % f.tp != 0,
        reason=(
            "it does not divide the {f.decoder.num_kv_heads} key/value heads (for "
            "{f.decoder.num_heads} query heads) of the model"
        ),
        remedy="use a degree that does, and raise parallelism.data_parallel_shard_degree instead",
    ),
    Rule(
        id="feed_forward_width_that_tensor_parallelism_does_not_divide",
        keys=("parallelism.tensor_parallel_degree",),
        applies=lambda f: f.decoder is not None and f.decoder.intermediate_size % f.tp != 0,
        reason="it does not divide the feed-forward width {f.decoder.intermediate_size}",
        remedy="use a degree that does",
    ),
    Rule(
        id="more_data_parallel_ranks_than_rows_of_a_step",
        keys=("training.global_batch_size",),
        applies=lambda f: (
            f.trains and 0 < f.config.training.global_batch_size < f.num_data_parallel_ranks
        ),
        reason="there are {f.num_data_parallel_ranks} data-parallel ranks, some without any row",
        remedy=(
            "raise it, raise a tensor- or context-parallel degree, or start fewer ranks; those "
            "that share the rows evenly are {f.even_data_parallel_ranks}"
        ),
    ),
)

BUDGET_RULES = (
    Rule(
        id="several_budgets_in_a_microbatch",
        keys=("data.batch_tokens", "training.local_batch_size"),
        applies=lambda f: (
            f.config.data.batch_tokens > 0 and f.trains and f.config.training.local_batch_size != 1
        ),
        reason="the first says how many rows a microbatch has, so the second counts whole batches",
        remedy="set training.local_batch_size = 1; more batches a step: training.global_batch_size",
    ),
    Rule(
        id="several_budgets_in_a_validation_microbatch",
        keys=("data.batch_tokens", "validation.local_batch_size"),
        applies=lambda f: (
            f.config.data.batch_tokens > 0
            and f.validates
            and f.config.validation.local_batch_size != 1
        ),
        reason="the first says how many rows a forward pass has, the second counts whole batches",
        remedy="set validation.local_batch_size = 1",
    ),
    Rule(
        id="budget_smaller_than_a_row",
        keys=("data.batch_tokens", "data.pad_to_multiple"),
        applies=lambda f: 0 < f.config.data.batch_tokens < f.longest_padded_row,
        reason="the longest rows that may be read have {f.longest_padded_row} tokens with padding",
        remedy="give at least {f.longest_padded_row} tokens, or lower seq_len",
    ),
    Rule(
        id="batches_whose_length_ranks_cannot_share",
        keys=(
            "data.pad_to_multiple",
            "parallelism.tensor_parallel_degree",
            "parallelism.context_parallel_degree",
        ),
        applies=lambda f: (
            f.config.data.batch_tokens > 0 and f.config.data.pad_to_multiple != f.shared_multiple
        ),
        reason="ranks that share a row would pad it further, beyond data.batch_tokens",
        remedy="set data.pad_to_multiple = {f.shared_multiple}",
    ),
    Rule(
        id="budget_for_dummy_tokens",
        keys=("data.batch_tokens", "training.dataset"),
        applies=lambda f: (
            f.config.data.batch_tokens > 0 and f.trains and f.config.training.dataset == "dummy"
        ),
        reason="dummy rows all have training.seq_len tokens",
        remedy="set data.batch_tokens = 0 and training.local_batch_size, or train on documents",
    ),
)

CONTEXT_RULES = (
    Rule(
        id="heads_that_ulysses_does_not_divide",
        keys=("parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree"),
        applies=lambda f: f.uses_context("ulysses") and f.local_heads % f.cp != 0,
        reason=(
            "context_parallel_mode = 'ulysses' deals the {f.local_heads} query heads of each "
            "tensor-parallel rank to context-parallel ranks evenly"
        ),
        remedy="use a degree that divides them, or context_parallel_mode = 'ring' or 'allgather'",
    ),
    Rule(
        id="key_heads_that_ulysses_cannot_deal",
        keys=("parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree"),
        applies=lambda f: (
            f.uses_context("ulysses")
            and f.local_kv_heads > 0
            and f.local_heads % f.cp == 0
            and f.local_kv_heads % f.cp != 0
            and f.cp % f.local_kv_heads != 0
        ),
        reason=(
            "context_parallel_mode = 'ulysses' deals the {f.local_kv_heads} key/value heads of "
            "each tensor-parallel rank evenly, or repeats each as often"
        ),
        remedy=(
            "use a degree that divides them or that they divide, or context_parallel_mode = "
            "'ring' or 'allgather'"
        ),
    ),
    Rule(
        id="ring_with_a_backend_that_returns_no_log_sum_exp",
        keys=("parallelism.context_parallel_mode", "model.attention"),
        applies=lambda f: f.uses_context("ring") and not returns_lse(f.attention),
        reason=(
            "the ring joins pieces of attention by their log-sum-exp, which {f.attention!r} does "
            "not return"
        ),
        remedy="use another backend, or context_parallel_mode = 'allgather' or 'ulysses'",
    ),
    Rule(
        id="ring_with_a_sliding_window",
        keys=("parallelism.context_parallel_mode", "model.flavor"),
        applies=lambda f: f.uses_context("ring") and f.has_window,
        reason=(
            "the ring attends to whole pieces of a row, and the model sees only the newest "
            "{f.decoder.sliding_window} tokens in some layers"
        ),
        remedy="use context_parallel_mode = 'allgather' or 'ulysses'",
    ),
    Rule(
        id="whole_rows_attended_where_keys_travel",
        keys=("parallelism.context_parallel_mode", "model.attention"),
        applies=lambda f: f.uses_context("allgather") and needs_whole_rows(f.attention),
        reason="{f.attention!r} attends document by document and needs the queries of whole rows",
        remedy="use context_parallel_mode = 'ulysses', or model.attention = 'flex'",
    ),
    Rule(
        id="angles_of_documents_that_ranks_share",
        keys=("parallelism.context_parallel_degree", "model.flavor"),
        applies=lambda f: f.cp > 1 and f.decoder is not None and f.decoder.angles_depend_on_length,
        reason=(
            "rotary embedding of type {f.decoder.rope.kind!r} depends on how long a document is, "
            "and a rank sees only its part"
        ),
        remedy="set context_parallel_degree = 1",
    ),
    Rule(
        id="rotate_method_that_another_mode_overrules",
        keys=("parallelism.context_parallel_rotate_method", "parallelism.context_parallel_mode"),
        applies=lambda f: (
            f.cp > 1
            and f.config.parallelism.context_parallel_rotate_method == "alltoall"
            and f.config.parallelism.context_parallel_mode != "ring"
        ),
        reason="the mode is what says how keys and values travel",
        remedy="write context_parallel_mode = 'ring', or leave the rotate method out",
    ),
    Rule(
        id="unknown_load_balancer",
        keys=("parallelism.context_parallel_load_balancer",),
        applies=lambda f: (
            f.cp > 1
            and f.config.parallelism.context_parallel_load_balancer not in ("headtail", None)
        ),
        reason="there is no such way of dealing tokens to context-parallel ranks",
        remedy="use 'headtail', or 'None' for contiguous parts",
    ),
)
