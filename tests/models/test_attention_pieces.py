"""Keys attended to piece by piece give what they give at once, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module

from models.attention import (
    AttentionCore,
    AttentionMask,
    AttentionMasks,
    returns_lse,
    supports_softcap,
)
from models.attention import flex as flex_backend

BACKENDS = ("eager", "flex", "sdpa")
FP32_REORDERED_SUM = 1e-5  # fp32 against fp64
BF16_ARITHMETIC = 3e-2
TOLERANCES = {torch.float32: FP32_REORDERED_SUM, torch.bfloat16: BF16_ARITHMETIC}
SCALE = 0.3
ROWS, QUERIES, KEYS, HEADS, CHANNELS = 2, 24, 40, 4, 16

Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def flex_runs_backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch's flex_attention run backward here, where it refuses only for lack of speed."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *args: None)
    monkeypatch.setattr(flex_backend, "unsupported_reason", lambda **kwargs: None)


def random_inputs(
    num_kv_heads: int, *, num_keys: int = KEYS, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of the output, q, k and v in fp64."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, heads: int) -> Tensor:
        shape = (ROWS, length, heads, CHANNELS)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    q, grad = draw(QUERIES, HEADS), draw(QUERIES, HEADS)
    return grad, q, draw(num_keys, num_kv_heads), draw(num_keys, num_kv_heads)


def reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed_BTS: Tensor,
    softcap: float | None = None,
) -> Results:
    """Return outputs and gradients of attention written out in fp64, without any of our code."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    copies = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthc,bshc->bhts", q, k.repeat_interleave(copies, dim=2)) * SCALE
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed_BTS[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    out = torch.einsum("bhts,bshc->bthc", weights, v.repeat_interleave(copies, dim=2))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return {"out": out.detach(), "lse": lse.mT.detach(), "dq": dq, "dk": dk, "dv": dv}


Piece = tuple[slice, list[Tensor], bool]


def by_pieces(
    backend: str,
    pieces: list[Piece],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None = None,
) -> Results:
    """Attend to each piece of the keys (slice, mask, whether causal), and join the results."""
    core = AttentionCore(backend)
    cap = {} if softcap is None else {"softcap": softcap}
    results = []
    for keys, mask, is_causal in pieces:
        options: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "scale": SCALE, **cap}
        results.append(core.attend_with_lse(q, k[:, keys], v[:, keys], **options))
        out, lse = results[-1]
        assert out.dtype == q.dtype
        assert lse.dtype == torch.float32
        assert (lse == float("-inf")).equal((out == 0).all(-1))
    all_lse = torch.stack([lse for _, lse in results])
    lse = all_lse.logsumexp(0)
    weights = torch.exp(all_lse - lse.masked_fill(lse.isinf(), 0.0))[..., None]
    out = (weights * torch.stack([out for out, _ in results]).float()).sum(0).to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for keys, mask, is_causal in pieces:
        options = {"mask": mask, "is_causal": is_causal, "scale": SCALE, **cap}
        found = core.attend_backward(grad, q, k[:, keys], v[:, keys], out, lse, **options)
        for total, part in zip((dq, dk[:, keys], dv[:, keys]), found, strict=True):
            total += part
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def check(found: Results, expected: Results, tolerance: float) -> None:
    for name, values in expected.items():
        seen = values.isfinite()
        assert found[name].isfinite().equal(seen), name
        error = (found[name].double() - values)[seen].abs().max() / values[seen].abs().max()
        assert error <= tolerance, (name, error)


def random_documents() -> tuple[Tensor, Tensor]:
    """Return documents of queries and keys; the last three queries' is that of no key."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(3, (ROWS, QUERIES), generator=generator)
    keys = torch.randint(3, (ROWS, KEYS), generator=generator)
    queries[:, -3:] = 7
    return queries, keys


def made_mask(backend: str, **options: Any) -> tuple[AttentionMask, list[Tensor]]:
    mask = AttentionMasks(backend, head_dim=CHANNELS)(**options)
    return mask, AttentionCore(backend).mask_tensors(mask)


def check_masked_pieces(
    backend: str,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: str = "cpu",
    softcap: float | None = None,
) -> None:
    documents_BT, documents_BS = (x.to(device) for x in random_documents())
    places_BT = torch.arange(8, 8 + QUERIES, device=device).expand(ROWS, -1)
    places_BS = torch.arange(KEYS, device=device).expand(ROWS, -1)
    pieces: list[Piece] = []
    allowed = []
    for keys in (slice(0, 5), slice(5, 30), slice(30, KEYS)):  # no query sees all of the last
        seen = (places_BS[:, keys], documents_BS[:, keys])
        mask, tensors = made_mask(
            backend, positions_BT=places_BT, documents_BT=documents_BT, keys=seen
        )
        pieces.append((keys, tensors, False))
        allowed.append(mask.allowed_BTS())
    inputs = random_inputs(num_kv_heads, device=device)
    allowed_BTS = torch.cat(allowed, dim=-1)
    assert not allowed_BTS[:, -3:].any()
    expected = reference(*inputs, allowed_BTS, softcap)
    assert expected["lse"][:, -3:].isinf().all()
    found = by_pieces(backend, pieces, *(x.to(dtype) for x in inputs), softcap=softcap)
    check(found, expected, TOLERANCES[dtype])


def check_causal_and_whole_piece(
    backend: str, num_kv_heads: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    places_BT = torch.arange(QUERIES, device=device).expand(ROWS, -1)
    _, tensors = made_mask(backend, positions_BT=places_BT)
    own, other = slice(0, QUERIES), slice(QUERIES, KEYS)
    allowed_TS = torch.ones(QUERIES, KEYS, dtype=torch.bool, device=device).tril()
    allowed_TS[:, other] = True
    inputs = random_inputs(num_kv_heads, device=device)
    expected = reference(*inputs, allowed_TS.expand(ROWS, -1, -1))
    pieces: list[Piece] = [(own, tensors, True), (other, [], False)]
    found = by_pieces(backend, pieces, *(x.to(dtype) for x in inputs))
    check(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("num_kv_heads", "dtype"),
    [(4, torch.float32), (1, torch.float32), (2, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_pieces_together_give_the_whole(
    backend: str, num_kv_heads: int, dtype: torch.dtype
) -> None:
    check_masked_pieces(backend, num_kv_heads, dtype)


@pytest.mark.parametrize("backend", ["eager", "flex"])
def test_masked_pieces_of_capped_scores_together_give_the_whole(backend: str) -> None:
    check_masked_pieces(backend, 2, torch.float32, softcap=1.0)


@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_causal_piece_and_one_that_all_see_give_the_whole(
    backend: str, num_kv_heads: int
) -> None:
    check_causal_and_whole_piece(backend, num_kv_heads, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_together_give_the_whole_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for num_kv_heads in (4, 2):
        check_masked_pieces(backend, num_kv_heads, dtype, "cuda")
        check_causal_and_whole_piece(backend, num_kv_heads, dtype, "cuda")
    if supports_softcap(backend):
        check_masked_pieces(backend, 2, dtype, "cuda", softcap=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_piece_gives_what_the_model_computes(backend: str) -> None:
    mask, tensors = made_mask(backend, positions_BT=torch.arange(QUERIES).expand(ROWS, -1))
    _, *qkv = (x.float() for x in random_inputs(2, num_keys=QUERIES))
    core = AttentionCore(backend)
    options = {"mask": tensors, "is_causal": True, "scale": core.scale(CHANNELS)}
    out, _ = core.attend_with_lse(*qkv, **options)
    assert torch.allclose(out, core(*qkv, mask=mask), atol=FP32_REORDERED_SUM)


def test_a_backend_without_these_functions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(returns_lse(backend) for backend in BACKENDS)
    monkeypatch.delattr(flex_backend, "attend_backward")
    assert not returns_lse("flex")
    assert AttentionCore("flex").attend_backward is None
    with pytest.raises(ValueError, match="use one of cudnn, eager, flash, flex, sdpa"):
        returns_lse("sdpaa")
