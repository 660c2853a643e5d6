"""Documents in a row never see each other, under every backend, and none is replaced in silence."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module

from models.attention import backend_names, unsupported_reason
from models.attention import flex as flex_backend
from models.decoder import DecoderLM
from tests.models.tiny import gradients, packed, random_tokens, tiny_model, worst_error

BACKENDS = ("eager", "flex", "sdpa")
FP32_REORDERED_SUM = 1e-5  # another order of the same sums only
LENGTHS = [5, 1, 17, 9]


@pytest.fixture
def flex_trains_on_cpu(monkeypatch):
    """Lets torch's flex_attention run backward here, where it refuses only for lack of speed."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *args: None)
    monkeypatch.setattr(flex_backend, "unsupported_reason", lambda **kwargs: None)


def score(model: DecoderLM, tokens: Tensor, positions: Tensor, documents: Tensor | None):
    """Return log-probabilities of the next token of the same document, and their labels."""
    labels = tokens.roll(-1, dims=1)
    if documents is None:
        labels[:, -1] = -100
    else:
        is_last = documents != documents.roll(-1, dims=1)
        is_last[:, -1] = True
        labels[is_last | (documents == 0)] = -100
    logps = model(tokens, positions_BT=positions, documents_BT=documents, labels_BT=labels)
    return logps, labels


def test_the_backends_are_the_files_of_the_package():
    assert backend_names() == tuple(sorted((*BACKENDS, "cudnn", "flash", "varlen")))


def score_separately(model: DecoderLM, row: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logits of each document alone, joined, and the loss; equal lengths in a batch."""
    documents, loss = list(row.split(lengths)), torch.zeros(())
    logits: list[Tensor] = [row] * len(lengths)
    for length in set(lengths):
        chosen = [index for index, n in enumerate(lengths) if n == length]
        tokens = torch.stack([documents[index] for index in chosen])
        positions = torch.arange(length).expand_as(tokens)
        loss = loss - score(model, tokens, positions, None)[0].sum()
        outputs = model(tokens, positions_BT=positions)
        for index, own in zip(chosen, outputs, strict=True):
            logits[index] = own
    return torch.cat(logits), loss


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, [32], [1] * 63 + [6]], ids=["mixed", "one", "single_tokens"]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("flex_trains_on_cpu")
def test_packed_documents_equal_separate_rows_in_loss_logits_and_gradients(
    backend, lengths, padding
):
    model = tiny_model(attention=backend)
    positions, documents = packed(lengths, padding=padding)
    tokens = random_tokens(1, positions.shape[1])
    logits = model(tokens, positions_BT=positions, documents_BT=documents)
    logps, _ = score(model, tokens, positions, documents)
    (logits[documents != 0].square().mean() - logps.sum()).backward()
    found = gradients(model)

    model.zero_grad()
    separate, loss = score_separately(model, tokens[0, : sum(lengths)], lengths)
    (separate.square().mean() + loss).backward()
    assert torch.allclose(logits[0, : sum(lengths)], separate, atol=FP32_REORDERED_SUM)
    assert -logps.sum().item() == pytest.approx(loss.item(), rel=FP32_REORDERED_SUM)
    assert worst_error(found, gradients(model)) <= FP32_REORDERED_SUM


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("flex_trains_on_cpu")
def test_replacing_one_document_leaves_the_others_bit_equal(backend, padding):
    model = tiny_model(attention=backend)
    positions, documents = packed(LENGTHS, padding=padding)
    tokens = random_tokens(1, positions.shape[1])
    for replaced in range(1, len(LENGTHS) + 1):
        is_replaced = documents == replaced
        other = torch.where(is_replaced, random_tokens(1, tokens.shape[1], seed=replaced), tokens)
        assert not torch.equal(other, tokens)
        before = model(tokens, positions_BT=positions, documents_BT=documents)
        after = model(other, positions_BT=positions, documents_BT=documents)
        assert torch.equal(before[~is_replaced], after[~is_replaced])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("flex_trains_on_cpu")
def test_a_documents_loss_reaches_its_own_embeddings_alone_and_bit_equal(backend):
    model = tiny_model(attention=backend)
    positions, documents = packed(LENGTHS)
    tokens = random_tokens(1, positions.shape[1])
    is_scored = documents == 3

    def input_gradient(tokens: Tensor) -> Tensor:
        inputs = []
        hook = model.model.embed_tokens.register_forward_hook(
            lambda module, args, out: inputs.append(out) or out.retain_grad()
        )
        logps, _ = score(model, tokens, positions, documents)
        logps[is_scored].sum().backward()
        hook.remove()
        return inputs[0].grad

    found = input_gradient(tokens)
    replaced = torch.where(is_scored, tokens, random_tokens(1, tokens.shape[1], seed=5))
    assert torch.equal(found[is_scored], input_gradient(replaced)[is_scored])
    assert found[is_scored].any()
    assert not found[~is_scored].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("flex_trains_on_cpu")
def test_unequal_rows_without_padding_score_like_padded_rows(backend):
    model = tiny_model(attention=backend, hidden_size=16, num_heads=2, num_kv_heads=1)
    lengths = [64, 3, 1, 30]  # rows longer than the model is wide
    rows = [random_tokens(1, n, seed=n) for n in lengths]
    positions, documents = packed(lengths)
    joined, labels = score(model, torch.cat(rows, dim=1), positions, documents)

    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    padded_labels = torch.full_like(padded, -100)
    for index, row in enumerate(rows):
        padded[index, : row.shape[1]] = row
        padded_labels[index, : row.shape[1] - 1] = row[0, 1:]
    positions = torch.arange(max(lengths)).expand_as(padded)
    causal = model(padded, positions_BT=positions, labels_BT=padded_labels)
    assert joined.sum().item() == pytest.approx(causal.sum().item(), rel=1e-6)
    ends = torch.tensor(lengths).cumsum(0) - 1
    assert (labels[0, ends] == -100).all()
    assert not joined[0, ends].any()


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "causal"])
@pytest.mark.usefixtures("flex_trains_on_cpu")
def test_every_backend_equals_the_written_out_one(backend, is_packed):
    positions, documents = packed(LENGTHS) if is_packed else (torch.arange(32)[None], None)
    tokens = random_tokens(3, positions.shape[1])
    positions = positions.expand(3, -1)
    documents = None if documents is None else documents.expand(3, -1)
    results = []
    for name in ("eager", backend):
        model = tiny_model(attention=name)
        logps, _ = score(model, tokens, positions, documents)
        logps.sum().backward()
        results.append({"logps": logps.detach(), **gradients(model)})
    assert worst_error(results[1], results[0]) <= FP32_REORDERED_SUM


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_backends_agree_in_bfloat16(backend):
    positions, documents = packed(LENGTHS)
    tokens = random_tokens(1, positions.shape[1])
    with torch.no_grad():
        expected, found = (
            tiny_model(attention=name)
            .bfloat16()(tokens, positions_BT=positions, documents_BT=documents)
            .float()
            for name in ("eager", backend)
        )
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_training_with_flex_on_a_cpu_is_refused_with_the_reason():
    model = tiny_model(attention="flex")
    tokens, positions = random_tokens(1, 8), torch.arange(8)[None]
    with pytest.raises(ValueError, match=r"model\.attention = 'flex'.*no backward on CPU.*'sdpa'"):
        model(tokens, positions_BT=positions)
    with torch.no_grad():
        assert model(tokens, positions_BT=positions).isfinite().all()


def test_a_backend_says_where_it_cannot_run():
    assert unsupported_reason("sdpa", device_type="cpu", training=True, head_dim=8) is None
    assert unsupported_reason("eager", device_type="cuda", training=True, head_dim=8) is None
    assert unsupported_reason("flex", device_type="cuda", training=True, head_dim=64) is None
    assert "16" in str(unsupported_reason("flex", device_type="cuda", training=True, head_dim=8))
    with pytest.raises(ValueError, match="cudnn, eager, flash, flex, sdpa, varlen"):
        unsupported_reason("flash9", device_type="cuda", training=True, head_dim=64)


def test_an_unknown_backend_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="cudnn, eager, flash, flex, sdpa, varlen"):
        tiny_model(attention="sdpaa")


def test_rotary_angles_and_masks_are_shared_by_all_blocks():
    model = tiny_model()
    seen = []
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["mask"], kwargs["rotary"])),
            with_kwargs=True,
        )
    model(random_tokens(1, 8), positions_BT=torch.arange(8)[None])
    assert seen[0][0] is seen[1][0]
    assert seen[0][1] is seen[1][1]
