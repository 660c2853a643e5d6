"""Degrees of parallelism and the device meshes made from them; the one source of world layout."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks of a run divide the work."""

    data_parallel_replicate_degree: int = 1
    """Number of groups of ranks that each hold a whole copy of the model (HSDP's outer axis)."""

    data_parallel_shard_degree: int = -1
    """Number of ranks that share one copy of the parameters (FSDP2); -1 takes what is left."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after forward: "default" all but the last unit, which comes next."""

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
    """Number of ranks that share the tokens of a row; only 1 is there yet."""

    context_parallel_load_balancer: str | None = "headtail"
    """How tokens are dealt to ranks; no effect at context-parallel degree 1."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values travel; no effect at context-parallel degree 1."""

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
            if degree > 1 and field.name.split("_")[0] in ("pipeline", "context", "expert"):
                raise ValueError(
                    f"parallelism.{field.name} = {degree}: this parallelism is not there yet; "
                    "set it to 1 and use data_parallel_shard_degree or tensor_parallel_degree"
                )


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """The degrees of one run, and after `build` its meshes; `of` checks them against the world."""

    dp_replicate: int
    dp_shard: int
    tp: int
    cp: int = 1
    pp: int = 1
    device_type: str = ""
    root: DeviceMesh | None = None
    batch: DeviceMesh | None = None

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> "ParallelDims":
        """Infer and check the degrees; raises ValueError unless their product is `world_size`.

        Needs no process group and no model.
        """
        replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
        tp = config.tensor_parallel_degree
        if shard == -1:
            if world_size % (replicate * tp):
                raise ValueError(
                    f"parallelism.data_parallel_replicate_degree = {replicate} times "
                    f"parallelism.tensor_parallel_degree = {tp} is {replicate * tp}, which does "
                    f"not divide the {world_size} ranks of this run; change a degree, or start "
                    f"a multiple of {replicate * tp} ranks"
                )
            shard = world_size // (replicate * tp)
        if replicate * shard * tp != world_size:
            raise ValueError(
                f"parallelism.data_parallel_replicate_degree = {replicate} x "
                f"data_parallel_shard_degree = {shard} x tensor_parallel_degree = {tp} is "
                f"{replicate * shard * tp}, but the run has {world_size} ranks; set "
                f"data_parallel_shard_degree = -1 to infer it, or start "
                f"{replicate * shard * tp} ranks"
            )
        return cls(dp_replicate=replicate, dp_shard=shard, tp=tp)

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

    def build(self, device_type: str) -> "ParallelDims":
        """Return the same degrees with meshes; every rank must call it, after the process group."""
        root = init_device_mesh(
            device_type, (self.dp_replicate, self.dp_shard, self.tp), mesh_dim_names=AXES
        )
        batch = root["dp_replicate", "dp_shard"]._flatten("batch")
        return replace(self, device_type=device_type, root=root, batch=batch)

    def mesh(self, axis: str) -> DeviceMesh:
        """Return the mesh of one axis.

        "tp"; "batch": ranks that read different rows; "loss": ranks whose losses add up; "fsdp":
        what parameters are sharded over, two-dimensional when they are also replicated.
        """
        assert self.root is not None and self.batch is not None, "meshes exist after build()"
        if axis in ("batch", "loss"):  # the same as long as no axis splits the tokens of a row
            return self.batch
        if axis == "fsdp":
            replicated = self.dp_replicate > 1
            return self.root["dp_replicate", "dp_shard"] if replicated else self.root["dp_shard"]
        return self.root[axis]

    def describe(self) -> str:
        """Return the degrees in one line for the log."""
        degrees = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "tp": self.tp}
        return " x ".join(f"{name} {degree}" for name, degree in degrees.items())
