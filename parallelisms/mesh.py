"""Degrees of parallelism and the device meshes made from them; the one source of world layout."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallelisms.copy_engine import prefer_copy_engines

AXES = ("dp_replicate", "dp_shard", "tp")
ContextMode = Literal["allgather", "ring", "ulysses"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks of a run divide the work."""

    data_parallel_replicate_degree: int = 1
    """Number of groups of ranks that each hold a whole copy of the model (HSDP's outer axis)."""

    data_parallel_shard_degree: int = -1
    """Number of ranks that share one copy of the parameters (FSDP2); -1 takes what is left."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after forward: "default" all but the last unit, which comes next."""

    fsdp_copy_engine: bool = False
    """Gather parameters with the GPUs' copy engines, which leaves the multiprocessors to the model:
    for ranks that share NVLink, with NCCL 2.28 or later."""

    tensor_parallel_degree: int = 1
    """Number of ranks that split each matrix multiplication."""

    sequence_parallel: bool = True
    """Split tokens over the tensor-parallel ranks between matrix multiplications."""

    disable_loss_parallel: bool = False
    """Gather the whole vocabulary's logits for the loss, instead of keeping them split."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel collectives with matrix multiplications; needs CUDA and compile."""

    pipeline_parallel_degree: int = 1
    """Number of pipeline stages; only 1 is there yet."""

    module_fqns_per_model_part: list[list[str]] | None = None
    """Module names of each pipeline stage; no effect at pipeline degree 1."""

    pipeline_parallel_first_stage_less_layers: int = 1
    """Blocks that the first stage has fewer; no effect at pipeline degree 1."""

    pipeline_parallel_last_stage_less_layers: int = 1
    """Blocks that the last stage has fewer; no effect at pipeline degree 1."""

    pipeline_parallel_layers_per_stage: int | None = None
    """Blocks of each stage; no effect at pipeline degree 1."""

    pipeline_parallel_schedule: str = "1F1B"
    """Order of microbatches; no effect at pipeline degree 1."""

    pipeline_parallel_schedule_csv: str | None = ""
    """File with a schedule; no effect at pipeline degree 1."""

    pipeline_parallel_microbatch_size: int = 1
    """Rows of one pipeline microbatch; no effect at pipeline degree 1."""

    pipeline_parallel_expert_parallel_overlap: bool = True
    """Overlap of the pipeline with expert parallelism; no effect at pipeline degree 1."""

    context_parallel_degree: int = 1
    """Number of ranks that share the tokens of a row; they shard parameters too, as FSDP does."""

    context_parallel_mode: ContextMode = "allgather"
    """How attention reaches the other ranks' tokens: "allgather" gathers keys and values on each
    rank, "ring" passes them round, "ulysses" exchanges tokens for attention heads."""

    context_parallel_load_balancer: str | None = "headtail"
    """How tokens are dealt to ranks: "headtail" gives each a part from the head and one from the
    tail of a row, so that causal attention costs all the same; none gives it one part. Mode
    "ulysses" always deals one part, as its ranks split heads."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """torchtitan's word for a mode, of no effect here: its "alltoall" is context_parallel_mode =
    "ring"."""

    expert_parallel_degree: int = 1
    """Number of ranks that share the experts; only 1 is there yet."""

    expert_tensor_parallel_degree: int = 1
    """Number of ranks that split each expert; only 1 is there yet."""

    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """How routed tokens travel; no effect at expert-parallel degree 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not field.name.endswith("_degree"):
                continue
            degree = getattr(self, field.name)
            inferable = field.name == "data_parallel_shard_degree"
            if degree < 1 and not (inferable and degree == -1):
                allowed = "at least 1, or -1 to take what is left" if inferable else "at least 1"
                raise ValueError(f"parallelism.{field.name} = {degree}; it must be {allowed}")
            if degree > 1 and field.name.split("_")[0] in ("pipeline", "expert"):
                raise ValueError(
                    f"parallelism.{field.name} = {degree}: this parallelism is not there yet; "
                    "set it to 1 and use data_parallel_shard_degree or tensor_parallel_degree"
                )

    @property
    def balances_tokens(self) -> bool:
        """Whether tokens are dealt head and tail to context-parallel ranks."""
        return (
            self.context_parallel_degree > 1
            and self.context_parallel_mode != "ulysses"
            and self.context_parallel_load_balancer == "headtail"
        )

    @property
    def token_multiple(self) -> int:
        """Rows must be padded to a multiple of this many tokens, so that ranks share them evenly.

        Two chunks for each context-parallel rank, which sequence parallelism splits again.
        """
        chunks = 2 * self.context_parallel_degree if self.context_parallel_degree > 1 else 1
        return chunks * (self.tensor_parallel_degree if self.sequence_parallel else 1)


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """The degrees of one run, and after `build` its meshes; `of` checks them against the world."""

    dp_replicate: int
    dp_shard: int
    tp: int
    cp: int = 1
    pp: int = 1
    balanced: bool = False
    """Tokens are dealt to context-parallel ranks head and tail."""

    copy_engine: bool = False
    """Parameters are gathered by copy engines."""

    device_type: str = ""
    root: DeviceMesh | None = None
    """What parameters lie on: dp_replicate, what they are sharded over, tp."""

    rows: DeviceMesh | None = None
    """Who reads what: batch, cp, tp."""

    loss: DeviceMesh | None = None

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> "ParallelDims":
        """Infer and check the degrees; raises ValueError unless their product is `world_size`.

        Needs no process group and no model.
        """
        degrees = {
            "data_parallel_replicate_degree": config.data_parallel_replicate_degree,
            "data_parallel_shard_degree": config.data_parallel_shard_degree,
            "context_parallel_degree": config.context_parallel_degree,
            "tensor_parallel_degree": config.tensor_parallel_degree,
        }
        if config.context_parallel_degree == 1:
            del degrees["context_parallel_degree"]
        if config.data_parallel_shard_degree == -1:
            fixed = {name: n for name, n in degrees.items() if n != -1}
            product = math.prod(fixed.values())
            if world_size % product:
                shown = " times ".join(f"parallelism.{name} = {n}" for name, n in fixed.items())
                raise ValueError(
                    f"{shown} is {product}, which does not divide the {world_size} ranks of this "
                    f"run; change a degree, or start a multiple of {product} ranks"
                )
            degrees["data_parallel_shard_degree"] = world_size // product
        product = math.prod(degrees.values())
        if product != world_size:
            shown = " x ".join(f"{name} = {n}" for name, n in degrees.items())
            raise ValueError(
                f"parallelism.{shown} is {product}, but the run has {world_size} ranks; set "
                f"data_parallel_shard_degree = -1 to infer it, or start {product} ranks"
            )
        return cls(
            dp_replicate=config.data_parallel_replicate_degree,
            dp_shard=degrees["data_parallel_shard_degree"],
            tp=config.tensor_parallel_degree,
            cp=config.context_parallel_degree,
            balanced=config.balances_tokens,
            copy_engine=config.fsdp_copy_engine,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def batch_degree(self) -> int:
        """Number of groups of ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def batch_rank(self) -> int:
        """Which share of the rows this rank reads, from 0 to `batch_degree` - 1."""
        return self.mesh("batch").get_local_rank()

    @property
    def fsdp_degree(self) -> int:
        """Number of ranks that share one copy of the parameters: context parallelism adds its."""
        return self.dp_shard * self.cp

    def build(self, device_type: str) -> "ParallelDims":
        """Return the same degrees with meshes; every rank must call it, after the process group."""
        if self.copy_engine and self.fsdp_degree > 1:
            prefer_copy_engines()
        names = AXES if self.cp == 1 else ("dp_replicate", "dp_shard_cp", "tp")
        shape = (self.dp_replicate, self.fsdp_degree, self.tp)
        root = init_device_mesh(device_type, shape, mesh_dim_names=names)
        if self.cp == 1:
            batch = root[names[:2]]._flatten("batch")
            return replace(self, device_type=device_type, root=root, rows=batch, loss=batch)
        # A mesh of its own: parameters know one axis where rows have two, and torch slices no
        # mesh by the name of a flattened axis any more.
        rows = init_device_mesh(
            device_type, (self.batch_degree, self.cp, self.tp), mesh_dim_names=("batch", "cp", "tp")
        )
        loss = rows["batch", "cp"]._flatten("loss")
        return replace(self, device_type=device_type, root=root, rows=rows, loss=loss)

    def mesh(self, axis: str) -> DeviceMesh:
        """Return the mesh of one axis.

        "tp"; "cp": ranks that share the tokens of a row; "batch": ranks that read different rows;
        "loss": ranks whose losses add up, batch x cp; "fsdp": what parameters are sharded over,
        dp_shard x cp, two-dimensional when they are also replicated.
        """
        assert self.root is not None and self.rows is not None, "meshes exist after build()"
        assert self.loss is not None, "build() makes all meshes"
        if axis == "loss":
            return self.loss
        if axis in ("batch", "cp"):
            assert self.cp > 1 or axis == "batch", "without context parallelism nobody shares a row"
            return self.rows[axis] if self.cp > 1 else self.rows
        if axis == "fsdp":
            names = self.root.mesh_dim_names
            assert names is not None, "build() names the axes"
            return self.root[names[:2]] if self.dp_replicate > 1 else self.root[names[1]]
        return self.root[axis]

    def describe(self) -> str:
        """Return the degrees in one line for the log."""
        degrees = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard}
        degrees |= {"cp": self.cp} if self.cp > 1 else {}
        degrees["tp"] = self.tp
        return " x ".join(f"{name} {degree}" for name, degree in degrees.items())
