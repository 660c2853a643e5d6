"""What a case of the table of combinations is; cases of budgets, models' limits, copy engines,
preferences."""

from dataclasses import dataclass, field, fields
from typing import Any

from models.decoder_config import DecoderConfig
from models.registry import load_family
from models.sizes import Feature


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration that one rule refuses, and a neighbour that nothing refuses.

    The model is the debugmodel: 4 blocks, 8 query and 4 key/value heads, 4096 tokens.
    """

    refused: str
    """Options; `--section.key` is written `section.key`, further values of a list stand alone."""

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


@dataclass(frozen=True, kw_only=True)
class LimitedSizes(DecoderConfig):
    """The debugmodel, if it could not do one thing."""

    lacks: Feature | None = None
    attention_backends: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    longest_row: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]

    def refusal(self, feature: Feature) -> str | None:
        return "it was not made for this" if feature == self.lacks else None


def limited(**limits: Any) -> dict[str, Any]:
    sizes = load_family("llama3").flavor("debugmodel")
    known = {f.name: getattr(sizes, f.name) for f in fields(sizes)}
    return {"decoder": LimitedSizes(**known, **limits)}


TP2 = "parallelism.tensor_parallel_degree=2"
MODEL_CASES = {
    "tensor_parallel_of_a_model_without_it": Case(
        refused=TP2, allowed=TP2, world_size=2, facts=limited(lacks="tensor_parallel")
    ),
    "sequence_parallel_of_a_model_without_it": Case(
        refused=TP2,
        allowed=f"{TP2} parallelism.no_sequence_parallel",
        world_size=2,
        facts=limited(lacks="sequence_parallel"),
        allowed_facts=limited(lacks="sequence_parallel"),
    ),
    "context_parallel_of_a_model_without_it": Case(
        refused="parallelism.context_parallel_degree=2",
        allowed="parallelism.context_parallel_degree=2",
        world_size=2,
        facts=limited(lacks="context_parallel"),
    ),
    "packed_documents_of_a_model_without_it": Case(
        refused="",
        allowed="data.packing=none",
        facts=limited(lacks="packed_documents"),
        allowed_facts=limited(lacks="packed_documents"),
    ),
    "embedding_noise_of_a_model_without_it": Case(
        refused="training.neftune_noise_alpha=5.0",
        allowed="training.neftune_noise_alpha=5.0",
        facts=limited(lacks="embedding_noise"),
    ),
    "adapter_dropout_of_a_model_without_it": Case(
        refused="adapter.kind=lora adapter.dropout=0.1",
        allowed="adapter.kind=lora",
        facts=limited(lacks="adapter_dropout"),
        allowed_facts=limited(lacks="adapter_dropout"),
    ),
    "liger_kernels_of_a_model_without_it": Case(
        refused="model.kernels=liger",
        allowed="model.kernels=torch",
        facts=limited(lacks="liger_kernels") | {"device_type": "cuda", "num_gpus": 8},
        allowed_facts=limited(lacks="liger_kernels") | {"device_type": "cuda", "num_gpus": 8},
    ),
    "attention_backend_that_the_model_does_not_have": Case(
        refused="model.attention=eager",
        allowed="model.attention=sdpa",
        facts=limited(attention_backends=("sdpa",)),
        allowed_facts=limited(attention_backends=("sdpa",)),
    ),
    "rows_longer_than_the_model_has_positions": Case(
        refused="training.seq_len=2049",
        allowed="training.seq_len=2041",
        facts=limited(longest_row=2048),
        allowed_facts=limited(longest_row=2048),
    ),
}
"""By rule."""

ANOTHER = "scripts/bench/llama_1b_untied"
UNCUT = "data.packing=best_fit data.long_document=drop"
PAIRS = f"data.format=preference {UNCUT}"

UNPAIRED = f"data.format=unpaired_preference {UNCUT}"

NAME_CASES = {
    "objective_that_is_not_there": Case(
        refused="objective.name=dpoo", allowed="objective.name=tests.engine.own_parts"
    ),
    "format_that_is_not_there": Case(
        refused="data.format=chats", allowed="data.format=chats training.dataset=dummy"
    ),
    "chat_template_that_is_not_there": Case(
        refused="data.format=chat data.chat_template=chatlm",
        allowed="data.format=chat data.chat_template=at_work.jinja",
        allowed_facts={"is_here": False},
    ),
}
"""By rule."""

PREFERENCE_CASES = {
    "pairs_wanted_and_not_read": Case(
        refused=f"objective.name=dpo {UNPAIRED}",
        allowed=f"objective.name=dpo {PAIRS}",
    ),
    "labelled_answers_wanted_and_not_read": Case(
        refused=f"objective.name=kto {PAIRS}",
        allowed=f"objective.name=kto {UNPAIRED}",
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
        allowed=f"objective.name=orpo {PAIRS}",
    ),
    "adapters_off_without_adapters": Case(
        refused=f"objective.name=dpo {PAIRS} objective.reference=adapters_off",
        allowed=f"objective.name=dpo {PAIRS} objective.reference=adapters_off adapter.kind=lora",
    ),
    "reference_of_another_model": Case(
        refused=f"objective.name=dpo {PAIRS} objective.reference_path={ANOTHER}",
        allowed=f"objective.name=orpo {PAIRS}",
    ),
}
"""By rule."""

FLOAT8 = "model.converters=float8 quantize.linear.float8.emulate"
GATHER = "quantize.linear.float8.enable_fsdp_float8_all_gather"
FROZEN = "model.freeze=blocks:bottom:2"
FOUR_BITS = f"model.converters=nf4 {FROZEN}"

LOW_PRECISION_CASES = {
    "converters_that_are_not_there": Case(
        refused="model.converters=mx", allowed="quantize.linear.mx.recipe_name=mxfp8_emulated"
    ),
    "float8_and_four_bits": Case(
        refused=f"model.converters float8 nf4 quantize.linear.float8.emulate {FROZEN}",
        allowed=FOUR_BITS,
    ),
    "float8_on_a_device_without_it": Case(refused="model.converters=float8", allowed=FLOAT8),
    "float8_beside_adapters": Case(refused=f"{FLOAT8} adapter.kind=lora", allowed=FLOAT8),
    "float8_without_its_package": Case(
        refused=FLOAT8, allowed=FLOAT8, facts={"missing": frozenset({"torchao"})}
    ),
    "float8_gathering_of_scaled_rows": Case(
        refused=f"{FLOAT8} {GATHER} quantize.linear.float8.recipe_name=rowwise",
        allowed=f"{FLOAT8} {GATHER} quantize.linear.float8.recipe_name=tensorwise",
    ),
    "eight_bit_state_without_its_package": Case(
        refused="optimizer.name=AdamW8bit",
        allowed="optimizer.name=AdamW8bit",
        facts={"missing": frozenset({"torchao"})},
    ),
    "four_bits_where_nothing_is_frozen": Case(
        refused="model.converters=nf4 validation.only checkpoint.enable",
        allowed=f"{FOUR_BITS} validation.only checkpoint.enable",
    ),
    "four_bits_with_tensor_parallelism": Case(
        refused=f"{FOUR_BITS} parallelism.tensor_parallel_degree=2",
        allowed=f"{FOUR_BITS} parallelism.data_parallel_shard_degree=2",
        world_size=2,
    ),
    "four_bits_in_host_memory": Case(
        refused=f"{FOUR_BITS} training.enable_cpu_offload", allowed="training.enable_cpu_offload"
    ),
    "four_bits_that_stay_gathered": Case(
        refused=f"{FOUR_BITS} parallelism.fsdp_reshard_after_forward=never",
        allowed=f"{FOUR_BITS} parallelism.fsdp_reshard_after_forward=always",
    ),
    "four_bits_beside_a_whole_reference": Case(
        refused=f"{FOUR_BITS} {PAIRS} objective.name=dpo",
        allowed=f"model.converters=nf4 adapter.kind=lora {PAIRS} objective.name=dpo",
    ),
}
"""By rule."""

DROPPED = "adapter.kind=lora adapter.dropout=0.1"
CHOSEN = "activation_checkpoint.mode=memory_budget compile.enable compile.backend=aot_eager"
ADAPTER_CASES = {
    "training_state_of_a_run_without_the_adapters": Case(
        refused="checkpoint.enable checkpoint.no_initial_load_model_only adapter.kind=lora",
        allowed="checkpoint.enable checkpoint.no_initial_load_model_only",
    ),
    "dropout_that_recomputation_draws_anew": Case(
        refused=f"{DROPPED} activation_checkpoint.no_preserve_rng_state",
        allowed=f"{DROPPED} activation_checkpoint.no_preserve_rng_state "
        "activation_checkpoint.mode=none",
    ),
    "dropout_that_the_compiler_draws_anew": Case(
        refused=f"{DROPPED} {CHOSEN}", allowed=f"adapter.kind=lora {CHOSEN}"
    ),
}
"""By rule."""

COPY_ENGINE_ON_4 = (
    "parallelism.fsdp_copy_engine parallelism.enable_async_tensor_parallel compile.enable "
    "parallelism.tensor_parallel_degree=2"
)

COPY_ENGINES = {
    "copy_engines_without_cuda": Case(
        refused="parallelism.fsdp_copy_engine",
        allowed="parallelism.fsdp_copy_engine",
        world_size=2,
        allowed_facts={"device_type": "cuda"},
    ),
    "copy_engines_with_async_tensor_parallelism": Case(
        refused=COPY_ENGINE_ON_4,
        allowed=f"{COPY_ENGINE_ON_4} parallelism.data_parallel_replicate_degree=2",
        world_size=4,
        facts={"device_type": "cuda"},
        allowed_facts={"device_type": "cuda"},
    ),
}

OTHER_CASES = {
    **BUDGET_CASES,
    **COPY_ENGINES,
    **MODEL_CASES,
    **NAME_CASES,
    **PREFERENCE_CASES,
    **ADAPTER_CASES,
    **LOW_PRECISION_CASES,
}
