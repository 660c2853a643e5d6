"""The head scores labels in chunks: values, gradients and memory against the dense computation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from models.layers.head import LMHead, label_logps, log_sum_exp
from tests.models.tiny import gradients, random_tokens, tiny_model, worst_error

FP32_REORDERED_SUM = 1e-5  # the gradient of the weight is added up chunk by chunk
BF16_RELATIVE = 1e-2
ROWS, TOKENS, WIDTH, VOCABULARY = 3, 11, 16, 101


def make_head(**overrides) -> LMHead:
    settings = {"chunk_tokens": 8, "recompute_logits": True, **overrides}
    torch.manual_seed(0)
    return LMHead(WIDTH, VOCABULARY, **settings)


def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator) * 3
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[0, :4] = labels[2, -1] = -100
    return x.requires_grad_(), labels


def dense(x, weight, labels, softcap=None):
    logits = F.linear(x, weight).float().flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=-100)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 11, 32, 33, 4096])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_chunked_log_probabilities_equal_the_dense_ones_in_value_and_gradient(
    chunk_tokens, recompute, softcap
):
    head = make_head(chunk_tokens=chunk_tokens, recompute_logits=recompute, softcap=softcap)
    x, labels = make_inputs()
    upstream = torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(2))
    logps = head(x, labels_BT=labels)
    assert logps.shape == labels.shape
    assert logps.dtype == torch.float32
    found = torch.autograd.grad((logps * upstream).sum(), (x, head.weight))
    reference = dense(x, head.weight, labels, softcap).view_as(labels)
    expected = torch.autograd.grad((reference * upstream).sum(), (x, head.weight))
    assert torch.allclose(logps, reference, atol=FP32_REORDERED_SUM)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= FP32_REORDERED_SUM * theirs.abs().max()


@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_of_pieces_are_those_of_whole_rows_whatever_the_vocabulary(dynamic: bool):
    torch.compiler.reset()
    compiled = torch.compile(log_sum_exp, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (1, 31, 101, 96, 1000, 1024, 3 * 1024):
        logits = torch.randn(4, size) * 30
        logits[1, : size // 2] = -torch.inf  # whole pieces of a vocabulary that is padded
        logits[2] += 300.0  # whose exponentials are no numbers of fp32
        expected = torch.logsumexp(logits.double(), -1).float()
        for function in (log_sum_exp, compiled):
            torch.testing.assert_close(function(logits), expected)


def test_ignored_labels_score_zero_and_pass_no_gradient():
    head = make_head()
    x, labels = make_inputs()
    logps = head(x, labels_BT=labels)
    assert not logps[labels == -100].any()
    (gradient,) = torch.autograd.grad(logps.sum(), x)
    assert not gradient[labels == -100].any()
    assert gradient[labels != -100].any(dim=-1).all()


def test_a_row_without_any_label_gives_finite_zeros():
    head = make_head()
    x, labels = make_inputs()
    logps = head(x, labels_BT=torch.full_like(labels, -100))
    logps.sum().backward()
    assert not logps.any()
    assert x.grad is not None
    assert not x.grad.any()


def test_bfloat16_logits_are_scored_in_fp32():
    head = make_head().bfloat16()
    x, labels = make_inputs()
    logps = head(x.bfloat16(), labels_BT=labels)
    reference = dense(x.bfloat16(), head.weight, labels).view_as(labels)
    assert logps.dtype == torch.float32
    # The logits are the same bf16 numbers, so what differs is fp32 arithmetic alone.
    assert torch.allclose(logps, reference, atol=FP32_REORDERED_SUM)
    found, expected = (
        torch.autograd.grad(value.sum(), head.weight, retain_graph=True)[0].float()
        for value in (logps, reference)
    )
    assert (found - expected).abs().max() <= BF16_RELATIVE * expected.abs().max()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    logps = label_logps(logits, torch.tensor([1, 2]))
    assert torch.allclose(logps, torch.tensor([-2e4, -1.0986]), atol=1e-3)  # fp32 near 1e4
    assert torch.autograd.grad(logps.sum(), logits)[0].isfinite().all()


def test_the_seam_agrees_with_numerical_differentiation():
    logits = torch.randn(5, 7, dtype=torch.float32, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3, 3])
    assert torch.autograd.gradcheck(
        lambda values: label_logps(values, labels), logits, eps=1e-2, atol=1e-3
    )


def saved_bytes(head: LMHead) -> int:
    x, labels = make_inputs()
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = head(x.to(head.weight.dtype), labels_BT=labels)
    assert logps.requires_grad
    return sum(sizes.values())


def test_logits_are_kept_in_their_own_dtype_and_not_at_all_when_recomputed():
    tokens = ROWS * TOKENS
    kept = saved_bytes(make_head(recompute_logits=False).bfloat16())
    recomputed = saved_bytes(make_head(recompute_logits=True).bfloat16())
    assert kept - recomputed >= 2 * tokens * VOCABULARY
    inputs = 2 * (tokens + VOCABULARY) * WIDTH + 8 * tokens
    assert recomputed <= inputs + 64
    assert kept < inputs + 2 * tokens * VOCABULARY + 20 * tokens


def test_without_gradients_nothing_is_recomputed():
    head = make_head()
    x, labels = make_inputs()
    with torch.no_grad():
        assert torch.equal(head(x, labels_BT=labels), head(x, labels_BT=labels))


def test_every_chunk_goes_through_the_one_seam():
    head = make_head(chunk_tokens=8)
    x, labels = make_inputs()
    sizes = []

    def spy(logits, chunk_labels):
        sizes.append(len(chunk_labels))
        return label_logps(logits, chunk_labels)

    head.label_logps = spy
    head(x, labels_BT=labels)
    assert sizes == [8, 8, 8, 8, 1]


@pytest.mark.parametrize(("tied", "softcap"), [(True, None), (False, None), (True, 2.0)])
def test_a_models_head_is_right_whether_tied_to_the_embedding_or_not(tied, softcap):
    results = []
    for chunk_tokens in (5, 4096):
        model = tiny_model(
            tie_word_embeddings=tied, head_chunk_tokens=chunk_tokens, logit_softcap=softcap
        )
        tokens, positions = random_tokens(2, 13), torch.arange(13).expand(2, 13)
        labels = tokens.roll(-1, dims=1)
        model(tokens, positions_BT=positions, labels_BT=labels).sum().backward()
        found = gradients(model)
        assert ("lm_head.weight" in found) is not tied
        model.zero_grad()
        logits = model(tokens, positions_BT=positions)
        logits.log_softmax(-1).gather(-1, labels[..., None]).sum().backward()
        results += [found, gradients(model)]
    for found in results[1:]:
        assert worst_error(found, results[0]) <= FP32_REORDERED_SUM


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_compiled_seam_gives_the_same_values_and_gradients(softcap):
    head, compiled = make_head(softcap=softcap), make_head(softcap=softcap)
    seam = compiled.label_logps
    compiled.label_logps = torch.compile(seam, fullgraph=True, backend="aot_eager")
    x, labels = make_inputs()
    results = []
    for one in (head, compiled):
        logps = one(x, labels_BT=labels)
        results.append((logps, *torch.autograd.grad(logps.sum(), (x, one.weight))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_fields_of_the_config_reach_the_head():
    model = tiny_model(head_chunk_tokens=3, logit_softcap=2.0)
    assert (model.lm_head.chunk_tokens, model.lm_head.softcap) == (3, 2.0)
    with pytest.raises(ValueError, match="head_chunk_tokens = 0"):
        replace(model.config, head_chunk_tokens=0)
