"""cuDNN's attention over documents of unequal length, through the package nvidia-cudnn-frontend.

The fastest document-masked kernel measured on Hopper but that of flash-attn 4, a beta; figures in
README.md. Rows of one document take cuDNN's kernel in torch. torch reaches this layout too, but
builds its graph anew at each call, and the gradients are wrong in torch 2.11 (it takes a head's
channels for the longest document).
"""

import threading
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import (
    AttentionMask,
    connect_backward,
    longest_document,
    sdpa,
    whole_row_offsets,
)

NEEDS_WHOLE_ROWS = True
OLDEST_GENERATION = 9  # Hopper; cuDNN has no backward for this layout on earlier ones
LARGEST_INT32 = 2**31 - 1

_of_thread = threading.local()


def prepare(mask: AttentionMask) -> tuple[Tensor, Tensor] | None:
    """Return documents and `longest_document`, or None where causality suffices.

    The first row of documents (2, D + 1) is where each begins, the second its length, then a zero.
    """
    if mask.is_causal:
        return None
    offsets = whole_row_offsets(mask)
    documents = torch.stack((offsets, F.pad(offsets.diff(), (0, 1))))
    torch._dynamo.maybe_mark_dynamic(documents, 1)
    return documents, longest_document(mask)


def attend(
    q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Return the attended values; key/value heads are shared, not repeated."""
    if mask.is_causal:
        return sdpa.attend(q_BTHC, k_BSKC, v_BSKC, mask=mask, scale=scale)
    assert isinstance(mask.prepared, tuple), "the mask was prepared by this file"
    documents, longest = mask.prepared
    joined = [x.flatten(0, 1) for x in (q_BTHC, k_BSKC, v_BSKC)]
    out_NHC, _ = cudnn_attention(*joined, documents, longest.shape[0], scale)
    return out_NHC.view_as(q_BTHC)


@torch.library.custom_op("tessera::cudnn_attention", mutates_args=(), device_types="cuda")
def cudnn_attention(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, documents: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attended values (N, H, C) of joined documents, and the fp32 log-sum-exp (N, H).

    `documents` (2, D + 1) is as `prepare` returns it; none is longer than `longest`.
    """
    q_NHC, k_NKC, v_NKC = (x.contiguous() for x in (q_NHC, k_NKC, v_NKC))
    shape = _Shape.of(q_NHC, k_NKC, documents, longest, scale)
    tensors = {"q": q_NHC, "k": k_NKC, "v": v_NKC}
    results = {"out": torch.empty_like(q_NHC), "lse": _lse_like(q_NHC)}
    _run(_forward_graph, shape, {**tensors, **results}, documents)
    return results["out"], results["lse"]


@cudnn_attention.register_fake
def _(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, documents: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_NHC, memory_format=torch.contiguous_format), _lse_like(q_NHC)


@torch.library.custom_op("tessera::cudnn_attention_backward", mutates_args=(), device_types="cuda")
def cudnn_attention_backward(
    grad_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    out_NHC: Tensor,
    lse_NH: Tensor,
    documents: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    tensors = {"grad": grad_NHC, "q": q_NHC, "k": k_NKC, "v": v_NKC, "out": out_NHC, "lse": lse_NH}
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    gradients = {f"grad_{name}": torch.empty_like(tensors[name]) for name in "qkv"}
    shape = _Shape.of(tensors["q"], tensors["k"], documents, longest, scale)
    _run(_backward_graph, shape, {**tensors, **gradients}, documents)
    return gradients["grad_q"], gradients["grad_k"], gradients["grad_v"]


connect_backward(cudnn_attention, cudnn_attention_backward)


def _lse_like(q_NHC: Tensor) -> Tensor:
    return q_NHC.new_empty(q_NHC.shape[:2], dtype=torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """Everything that a graph is built for."""

    device: torch.device
    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_documents: int
    longest: int
    scale: float
    is_deterministic: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, documents: Tensor, longest: int, scale: float) -> "_Shape":
        return cls(
            device=q.device,
            dtype=q.dtype,
            num_tokens=q.shape[0],
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[2],
            num_documents=documents.shape[1] - 1,
            longest=longest,
            scale=scale,
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    @property
    def offset_dtype(self) -> torch.dtype:
        """Return the type that counts the elements of all queries."""
        num_elements = self.num_tokens * self.num_heads * self.head_dim
        return torch.int32 if num_elements <= LARGEST_INT32 else torch.int64


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """A cuDNN graph, its tensors by name, and the bytes it works in."""

    graph: Any
    tensors: dict[str, Any]
    workspace_bytes: int


class _Builder:
    """Declares the tensors that both graphs have."""

    def __init__(self, shape: _Shape) -> None:
        self.shape = shape
        self.cudnn = cudnn = _frontend()
        formats = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
        self.io = getattr(cudnn.data_type, formats[shape.dtype])
        self.graph = cudnn.pygraph(
            io_data_type=self.io,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=_handle(shape.device),
        )
        self.tensors: dict[str, Any] = {}
        size = "INT32" if shape.offset_dtype == torch.int32 else "INT64"
        for name, length, kind in (
            ("lengths", shape.num_documents, "INT32"),
            *((f"offsets_{of}", shape.num_documents + 1, size) for of in ("q", "k", "lse")),
        ):
            self.tensors[name] = self.graph.tensor(
                name=name,
                dim=[length, 1, 1, 1],
                stride=[1, 1, 1, 1],
                data_type=getattr(cudnn.data_type, kind),
            )

    def options(self) -> dict[str, Any]:
        """Return what forward and backward are both told."""
        return {
            "attn_scale": self.shape.scale,
            "use_causal_mask": True,
            "use_padding_mask": True,
            "seq_len_q": self.tensors["lengths"],
            "seq_len_kv": self.tensors["lengths"],
        }

    def _layout(self, name: str) -> tuple[list[int], list[int], str]:
        """Return sizes and strides of documents x heads x tokens x channels, and its offsets."""
        shape = self.shape
        of = "k" if name.removeprefix("grad_") in ("k", "v") else "lse" if name == "lse" else "q"
        heads = shape.num_kv_heads if of == "k" else shape.num_heads
        channels = 1 if of == "lse" else shape.head_dim
        dim = [shape.num_documents, heads, shape.longest, channels]
        stride = [shape.longest * heads * channels, channels, heads * channels, 1]
        return dim, stride, f"offsets_{of}"

    def given(self, *names: str) -> list[Any]:
        """Declare tensors that the graph reads."""
        for name in names:
            dim, stride, offsets = self._layout(name)
            kind = self.cudnn.data_type.FLOAT if name == "lse" else self.io
            tensor = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=kind)
            tensor.set_ragged_offset(self.tensors[offsets])
            self.tensors[name] = tensor
        return [self.tensors[name] for name in names]

    def results(self, **tensors: Any) -> None:
        """Declare tensors that the graph writes."""
        for name, tensor in tensors.items():
            dim, stride, offsets = self._layout(name)
            tensor.set_output(True).set_dim(dim).set_stride(stride)
            tensor.set_data_type(self.cudnn.data_type.FLOAT if name == "lse" else self.io)
            tensor.set_ragged_offset(self.tensors[offsets])
            self.tensors[name] = tensor

    def build(self) -> _Graph:
        """Choose kernels; an unsupported shape raises cuDNN's own error."""
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A])
        self.graph.check_support()
        self.graph.build_plans()
        workspace_bytes = self.graph.get_workspace_size()
        return _Graph(graph=self.graph, tensors=self.tensors, workspace_bytes=workspace_bytes)


@cache
def _forward_graph(shape: _Shape) -> _Graph:
    builder = _Builder(shape)
    q, k, v = builder.given("q", "k", "v")
    out, lse = builder.graph.sdpa(
        name="attention", q=q, k=k, v=v, generate_stats=True, **builder.options()
    )
    builder.results(out=out, lse=lse)
    return builder.build()


@cache
def _backward_graph(shape: _Shape) -> _Graph:
    builder = _Builder(shape)
    q, k, v, out, grad, lse = builder.given("q", "k", "v", "out", "grad", "lse")
    grad_q, grad_k, grad_v = builder.graph.sdpa_backward(
        name="attention_backward",
        q=q,
        k=k,
        v=v,
        o=out,
        dO=grad,
        stats=lse,
        # Without them the workspace has room for as many longest documents as there are documents.
        max_total_seq_len_q=shape.num_tokens,
        max_total_seq_len_kv=shape.num_tokens,
        use_deterministic_algorithm=shape.is_deterministic,
        **builder.options(),
    )
    builder.results(grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    return builder.build()


def _run(build: Any, shape: _Shape, tensors: dict[str, Tensor], documents: Tensor) -> None:
    """Execute a graph on torch's current stream."""
    graph: _Graph = build(shape)
    offsets_q, offsets_k, offsets_lse = documents[0] * _elements_of_a_token(shape)
    tensors = {
        **tensors,
        "lengths": documents[1],
        "offsets_q": offsets_q,
        "offsets_k": offsets_k,
        "offsets_lse": offsets_lse,
    }
    workspace = torch.empty(graph.workspace_bytes, dtype=torch.uint8, device=shape.device)
    pack = {graph.tensors[name]: x for name, x in tensors.items()}
    graph.graph.execute(pack, workspace, handle=_handle(shape.device))


@cache
def _elements_of_a_token(shape: _Shape) -> Tensor:
    """Return how many elements queries, keys and the log-sum-exp have for each token (3, 1)."""
    counts = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim)
    found = torch.tensor([*counts, shape.num_heads], dtype=shape.offset_dtype)
    return found[:, None].to(shape.device)


def _frontend() -> Any:
    return import_module("cudnn")  # the package, not this file


def _handle(device: torch.device) -> Any:
    """Return this thread's cuDNN handle; autograd runs backwards in a thread of its own."""
    cudnn = _frontend()
    handles: dict[torch.device, Any] = _of_thread.__dict__.setdefault("handles", {})
    if device not in handles:
        handles[device] = cudnn.create_handle()
    stream = torch.cuda.current_stream(device).cuda_stream
    cudnn.set_stream(handle=handles[device], stream=stream)
    return handles[device]


def unsupported_reason(
    *, device_type: str, training: bool, head_dim: int, dtype: torch.dtype | None
) -> str | None:
    """Refuse what cuDNN has no kernel for, and machines without the package."""
    if device_type != "cuda":
        return "cuDNN runs on NVIDIA GPUs; use 'sdpa'"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"cuDNN attends in bfloat16 or float16, not in {dtype}; use 'flex'"
    if head_dim not in sdpa.CUDNN_HEAD_DIMS:
        sizes = sdpa.CUDNN_HEAD_DIMS
        return (
            f"cuDNN needs heads of {sizes.start} to {sizes[-1]} channels, a multiple of "
            f"{sizes.step}, and the model has {head_dim}; use 'flex'"
        )
    if not torch.cuda.is_available():
        return None  # another machine will train
    if find_spec("cudnn") is None:
        return "package nvidia-cudnn-frontend is not installed; install it, or use 'flex'"
    if torch.cuda.get_device_capability()[0] < OLDEST_GENERATION:
        return "cuDNN attends to joined documents on Hopper GPUs and later ones; use 'flex'"
    return None
