"""Attention document by document on the CPU: a loop that stands for the kernels of GPUs.

So what lies around these kernels is proved here, and they themselves where there is a GPU.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.data.batch import document_offsets, longest_document_tokens
from models.attention import cudnn as cudnn_backend
from models.attention import eager, flash
from models.decoder import DecoderLM
from tests.models.tiny import gradients, packed

FP32_REORDERED_SUM = 1e-5
LENGTHS = [5, 1, 17, 9]


def loop_over_documents(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Return causal attention within each document of joined rows (N, H, C)."""
    parts = []
    for begin, end in pairwise(offsets.tolist()):
        own: list[Any] = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                *own, is_causal=True, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(parts)


def cpu_varlen(q: Any, k: Any, v: Any, offsets: Any, keys: Any, *lengths: int, **options: Any):
    assert offsets is keys and lengths[0] == lengths[1]
    assert options.get("window_size", (-1, 0)) == (-1, 0) and options.get("causal", True)
    scale = options["scale"] if "scale" in options else options["softmax_scale"]
    return loop_over_documents(q, k, v, offsets, scale)


@cudnn_backend.cudnn_attention.register_kernel("cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    offsets, lengths = documents
    assert torch.equal(offsets.diff(), lengths[:-1]) and lengths.max() <= longest
    return loop_over_documents(q, k, v, offsets, scale).contiguous(), q.new_zeros(q.shape[:2])


@cudnn_backend.cudnn_attention_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    *rest,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_by_document(grad, q, k, v, out, documents[0], rest[-1])


def gradients_by_document(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for begin, end in pairwise(offsets.tolist()):
        if begin < end:
            own: list[Any] = [x[None, begin:end] for x in (grad, q, k, v, out)]
            seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
            options: dict[str, Any] = {"mask": [seen], "is_causal": True, "scale": scale}
            _, own_lse = eager.attend_with_lse(*own[1:4], **options)
            parts.append(eager.attend_backward(*own, own_lse, **options))  # pyright: ignore[reportCallIssue]
    grad_q, grad_k, grad_v = (torch.cat(x, dim=1)[0] for x in zip(*parts, strict=True))
    return grad_q, grad_k, grad_v


class Version4:
    """The functions of FA4 that are called, as its interface has them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, None]:
        assert options["causal"] and options["return_lse"]
        assert all(x.is_contiguous() for x in (q, k, v))
        joined: list[Any] = Version4.joined(q, k, v, **options)
        out = loop_over_documents(*joined, options["softmax_scale"]).view_as(q)  # pyright: ignore[reportCallIssue]
        lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        return out, q.new_zeros(lse_shape), None  # newer releases return more than two

    @staticmethod
    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        assert options["causal"] and lse.shape[-2:] == (q.shape[-2], q.shape[-3])
        assert all(x.is_contiguous() for x in (q, k, v, out, grad, lse))
        joined: list[Any] = Version4.joined(grad, q, k, v, out, **options)
        found = gradients_by_document(*joined, options["softmax_scale"])  # pyright: ignore[reportCallIssue]
        return tuple(x.view_as(y) for x, y in zip(found, (q, k, v), strict=True))

    @staticmethod
    def joined(*tensors: Tensor, **options: Any) -> list[Tensor]:
        if tensors[0].ndim == 3:
            offsets = options["cu_seqlens_q"]
            assert options["cu_seqlens_k"] is offsets
            assert options["max_seqlen_q"] == options["max_seqlen_k"] >= offsets.diff().max()
            return [*tensors, offsets]
        assert "cu_seqlens_q" not in options
        rows, length = tensors[0].shape[:2]
        return [*(x.flatten(0, 1) for x in tensors), torch.arange(rows + 1) * length]


for operator in (flash.flash_attention_4, flash.flash_attention_4_backward):
    operator.register_kernel("cpu")(operator._init_fn)


def rows_of(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return positions and documents of rows of documents of these lengths; the rest is padding."""
    size = max(map(sum, rows))
    made = [packed(lengths, padding=size - sum(lengths)) for lengths in rows]
    return torch.cat([p for p, _ in made]), torch.cat([d for _, d in made])


def loss_and_gradients(
    model: DecoderLM, tokens: Tensor, positions: Tensor, documents: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Score the tokens; without documents each row is one."""
    model.zero_grad()
    packing: dict[str, Any] = {}
    if documents is not None:
        offsets = document_offsets(documents.cpu()).to(documents.device)
        packing = {
            "documents_BT": documents,
            "document_offsets": offsets,
            "longest_document_tokens": longest_document_tokens(offsets),
        }
    logits = model(tokens, positions_BT=positions, **packing)
    logits = logits.flatten(0, 1) if documents is None else logits[documents != 0]
    loss = logits.float().logsumexp(-1).square().mean()
    loss.backward()
    return loss.item(), gradients(model)
