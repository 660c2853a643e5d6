"""Time kernels alone on one GPU: `python -m scripts.bench.kernels --out FILE.json`.

Attention by every backend at the shape of Llama 8B, over rows cut into documents in several ways;
and the head that scores labels, against plain cross entropy and Liger's fused one. Values and
gradients are compared with fp32 before anything is timed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.batch import document_offsets, longest_document_tokens
from engine.logging import machine_report
from models.attention import AttentionCore, AttentionMasks, backend_names, unsupported_reason
from models.layers import liger as liger_kernels
from models.layers.head import LMHead, label_logps

ROWS, TOKENS, HEADS, KV_HEADS, CHANNELS = 2, 8192, 32, 8, 128
DOCUMENTS = {
    "1 x 8192": [8192],
    "2 x 4096": [4096] * 2,
    "16 x 512": [512] * 16,
    "13 of 5 to 1800": [1800, 90, 1400, 260, 33, 700, 1210, 5, 512, 902, 64, 1000, 216],
}
BF16_ARITHMETIC = 1e-2  # norm of the difference over the norm, of the result and each gradient
HEAD_TOKENS, HEAD_WIDTH, HEAD_VOCABULARY = 16384, 4096, 151936
CHUNK_TOKENS = 4096
REPEATS = 20
HEAD_START_CYCLES = 10_000_000  # about 5 ms


def milliseconds(work: Callable[[], object], prepare: Callable[[], object] | None = None) -> float:
    """Return the median time of `work` on the device, after warm-up."""
    times = []
    for number in range(5 + REPEATS):
        if prepare is not None:
            prepare()
        torch.cuda._sleep(HEAD_START_CYCLES)  # the host queues all of it meanwhile
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if number >= 5:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Return the norm of each difference over the norm of what is expected."""
    pairs = zip(found, expected, strict=True)
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]


def random_inputs() -> tuple[list[Tensor], Tensor]:
    """Return queries, keys, values and the result's gradient, the same at each call."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(ROWS, TOKENS, heads, CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    made = [torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes]
    return [x.requires_grad_() for x in made[:3]], made[3]


def attention_of(backend: str, lengths: list[int]) -> Callable[..., Tensor]:
    """Return attention of rows cut into documents, as a compiled block calls it."""
    numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    documents_BT = numbers.expand(ROWS, -1).contiguous()
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    positions_BT = positions_T.expand(ROWS, -1).contiguous().cuda()
    masks, core = AttentionMasks(backend, head_dim=CHANNELS), AttentionCore(backend)
    packed: dict[str, Any] = {}
    if len(lengths) > 1:
        offsets = document_offsets(documents_BT)
        packed = {
            "documents_BT": documents_BT.cuda(),
            "document_offsets": offsets.cuda(),
            "longest_document_tokens": longest_document_tokens(offsets),
        }
    mask = masks(positions_BT, **packed)
    return torch.compile(lambda q, k, v: core(q, k, v, mask=mask), fullgraph=True)


def reference_attention(lengths: list[int]) -> list[Tensor]:
    """Return value and gradients of attention written out in fp32, each document alone."""
    inputs, grad = random_inputs()
    pieces: list[list[Tensor]] = []
    cuts = zip(*(x.detach().split(lengths, dim=1) for x in (*inputs, grad)), strict=True)
    for document in cuts:
        rows = [[x[row : row + 1].float() for x in document] for row in range(ROWS)]
        found = [_reference_of_one(*row) for row in rows]
        pieces.append([torch.cat(x) for x in zip(*found, strict=True)])
    return [torch.cat(x, dim=1) for x in zip(*pieces, strict=True)]


def _reference_of_one(*tensors: Tensor) -> list[Tensor]:
    q, k, v = leaves = [x.requires_grad_() for x in tensors[:3]]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, k) * CHANNELS**-0.5
    scores = scores.masked_fill(torch.ones_like(scores[0, 0]).bool().triu(1), float("-inf"))
    out = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def time_attention() -> list[dict[str, Any]]:
    """Return forward and backward times of every backend that runs here, for each cut of a row."""
    rows: list[dict[str, Any]] = []
    for name, lengths in DOCUMENTS.items():
        expected = reference_attention(lengths)
        for backend in backend_names():
            facts: dict[str, Any] = {"device_type": "cuda", "training": True}
            reason = unsupported_reason(backend, **facts, head_dim=CHANNELS, dtype=torch.bfloat16)
            row: dict[str, Any] = {"backend": backend, "documents": name}
            if backend == "eager":
                continue  # what the others are compared with
            torch._dynamo.reset()
            try:
                row |= {"refused": reason} if reason else one(backend, lengths, expected)
            except Exception as error:  # a broken package must not cost the other figures
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    return rows


def one(backend: str, lengths: list[int], expected: list[Tensor]) -> dict[str, Any]:
    """Return the times and errors of one backend on one cut."""
    attend = attention_of(backend, lengths)
    leaves, grad = random_inputs()
    made: list[Tensor] = [attend(*leaves)]
    forward = milliseconds(lambda: attend(*leaves))

    def prepare() -> None:
        made[0] = attend(*leaves)

    backward = milliseconds(lambda: torch.autograd.grad(made[0], leaves, grad), prepare)
    out = attend(*leaves)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    errors = relative_errors(found, expected)
    return {
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "total_ms": round(forward + backward, 3),
        "error": max(errors),
    }


def heads() -> dict[str, Callable[[Tensor, nn.Parameter, Tensor], Tensor]]:
    """Return ways from hidden states, weight and labels to the summed loss."""
    with torch.device("meta"):
        head = LMHead(HEAD_WIDTH, HEAD_VOCABULARY, chunk_tokens=CHUNK_TOKENS)

    def ours(seam: Callable[..., Tensor], recompute: bool) -> Callable[..., Tensor]:
        def loss(x: Tensor, weight: nn.Parameter, labels: Tensor) -> Tensor:
            head.label_logps, head.recompute_logits, head.weight = seam, recompute, weight
            return -head(x[None], labels_BT=labels[None]).sum()

        return loss

    def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    compiled = torch.compile(label_logps, fullgraph=True)
    found = {
        "plain cross entropy": plain,
        "chunks, eager": ours(label_logps, True),
        "chunks, compiled": ours(compiled, True),
        "chunks, compiled, logits kept": ours(compiled, False),
    }
    try:  # models/layers/liger.py says why the engine leaves it out
        fused = import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return found

    def liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        out = fused.apply(x, weight, labels, None, None, -100, 0.0, 0.0, "sum")
        return out[0] if isinstance(out, tuple) else out

    return {
        **found,
        "chunks, liger scores": ours(liger_kernels.label_logps, True),
        "liger fused linear cross entropy": liger,
    }


def time_heads() -> list[dict[str, Any]]:
    """Return time and memory of forward and backward of each head."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> nn.Parameter:
        drawn = torch.randn(shape, generator=generator, device="cuda")
        return nn.Parameter((drawn * HEAD_WIDTH**-0.5).to(torch.bfloat16))

    x, weight = draw(HEAD_TOKENS, HEAD_WIDTH), draw(HEAD_VOCABULARY, HEAD_WIDTH)
    labels = torch.randint(HEAD_VOCABULARY, (HEAD_TOKENS,), generator=generator, device="cuda")
    labels[::7] = -100
    rows: list[dict[str, Any]] = []
    expected: list[Tensor] = []
    for name, head in heads().items():

        def step(head: Callable[..., Tensor] = head) -> list[Tensor]:
            loss = head(x, weight, labels)
            return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]

        found = step()
        expected = expected or found
        errors = relative_errors(found, expected)
        del found
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time = milliseconds(step)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        rows.append(
            {
                "head": name,
                "total_ms": round(time, 2),
                "peak_gib": round(peak, 2),
                "difference_from_plain": max(errors),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    """Time everything; exit 1 where a kernel's result is wrong."""
    parser = argparse.ArgumentParser(prog="scripts.bench.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="record to write")
    out = parser.parse_args().out
    record: dict[str, Any] = {"suite": "kernels", "machine": machine_report()}
    shapes = {
        "attention": f"{ROWS} rows, {HEADS}/{KV_HEADS} heads of {CHANNELS}, {TOKENS} tokens, bf16",
        "head": f"{HEAD_TOKENS} tokens, {HEAD_WIDTH} x {HEAD_VOCABULARY}, bf16",
    }
    for name, rows in (("attention", time_attention), ("head", time_heads)):
        record[name] = {"shape": shapes[name], "rows": rows()}
        out.write_text(json.dumps(record, indent=1) + "\n")
    attention = record["attention"]["rows"]
    return 0 if all(row.get("error", 0.0) <= BF16_ARITHMETIC for row in attention) else 1


if __name__ == "__main__":
    sys.exit(main())
