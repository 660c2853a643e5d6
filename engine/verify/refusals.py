"""Whether a plan may be run: the engine's own rules about the configuration it stands for."""

from dataclasses import dataclass, field

from engine.combinations import refusals
from engine.config import JobConfig
from engine.model import ModelConfig
from engine.rules import Facts, missing_extras, usable_gpus
from engine.step import TrainingConfig
from engine.verify.case import Case
from engine.verify.parity import NOISE_ALPHA, checkpoint_config, compile_config, parallel_config
from engine.verify.subject import Subject
from parallelisms.apply import check
from parallelisms.mesh import ParallelDims


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The table of rules with what this machine has, found once."""

    subject: Subject
    device_type: str
    num_gpus: int
    missing: frozenset[str]
    num_local_ranks: int
    known: dict[Case, str | None] = field(default_factory=dict[Case, str | None])

    @classmethod
    def of(cls, subject: Subject, device_type: str, num_local_ranks: int) -> "Rules":
        """Look at this machine."""
        return cls(
            subject=subject,
            device_type=device_type,
            num_gpus=usable_gpus(),
            missing=missing_extras(),
            num_local_ranks=num_local_ranks,
        )

    def refusal(self, case: Case) -> str | None:
        """Return why a run with this configuration would be refused; None where it would not."""
        if case not in self.known:
            self.known[case] = self._look_up(case)
        return self.known[case]

    def _look_up(self, case: Case) -> str | None:
        try:
            config = job_config(case, self.subject)
            dims = ParallelDims.of(config.parallelism, case.world_size)
            check(config.parallelism, config.activation_checkpoint, config.compile, dims)
        except ValueError as error:
            return str(error)
        facts = Facts(
            config=config,
            world_size=case.world_size,
            device_type=self.device_type,
            decoder=self.subject.sizes(case),
            attention=self.subject.attention(case),
            num_gpus=self.num_gpus,
            num_local_ranks=self.num_local_ranks,
            missing=self.missing,
        )
        return "; ".join(refusals(facts)) or None


def job_config(case: Case, subject: Subject) -> JobConfig:
    """Return the configuration of a run that does what a case does."""
    rows = subject.num_rows // (case.replicate * case.shard * case.accumulate)
    return JobConfig(
        model=ModelConfig(
            name=subject.family_name,
            attention=subject.attention(case),  # pyright: ignore[reportArgumentType]
            kernels=case.kernels,
        ),
        training=TrainingConfig(
            seq_len=subject.num_tokens,
            local_batch_size=max(rows, 1),
            enable_cpu_offload=case.offload,
            mixed_precision_param="bfloat16" if case.bfloat16 else "float32",
            neftune_noise_alpha=NOISE_ALPHA if case.neftune else 0.0,
        ),
        parallelism=parallel_config(case),
        activation_checkpoint=checkpoint_config(case.checkpointing),
        compile=compile_config(case),
    )
