"""The module: transformers' own base model, our head, and the forward that every model here has.

How it is described to the parallelisms is in `describe.py`. The only file that imports models of
transformers; it does so when the first one is built, since that takes seconds.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.head import LMHead
from models.layers.lora import adapted_linears

Finish = Callable[[Tensor], Tensor]
CHUNK_TOKENS = 4096


def read_config(hf: Mapping[str, Any]) -> Any:
    """Return the configuration of a config.json as transformers reads it; never foreign code."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, __version__

    model_type: Any = hf.get("model_type")
    if model_type not in CONFIG_MAPPING:
        needs = "needs code of its own, which is never run, or " if "auto_map" in hf else ""
        raise ValueError(
            f"config.json has model_type = {model_type!r}, which transformers {__version__} does "
            f"not know: it {needs}needs another version; use a type that it knows"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(hf))
    except Exception as error:
        raise ValueError(f"transformers does not take this config.json: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"config.json has model_type = {model_type!r}, for which transformers has no causal "
            "language model; use another type"
        )
    return config


def causal_class(config: Any) -> Any:
    """Return transformers' class with a language-model head for a configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def num_positions(model: nn.Module, embedding: nn.Module, config: Any) -> int | None:
    """Return how many positions have an embedding of their own; None where they need none.

    `embedding` is that of the tokens.
    """
    limit = getattr(config, "max_position_embeddings", None)
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding]
    has_table = limit is not None and any(m.num_embeddings >= limit for m in others)
    return limit if has_table else None


class _Given(nn.Module):
    """Stands where a base model stood, and returns the floating-point tensor that it is called
    with as the last hidden state."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        (given,) = [x for x in tensors if x.is_floating_point()]
        output: Any = BaseModelOutputWithPastAndCrossAttentions
        return output(last_hidden_state=given)


class WrappedHead(LMHead):
    """The model's own last layer, scoring labels in chunks; `finish` is what follows it, if any."""

    def __init__(self, linear: nn.Linear, finish: Finish | None) -> None:
        width, vocab_size = linear.in_features, linear.out_features
        super().__init__(width, vocab_size, chunk_tokens=CHUNK_TOKENS)
        self.weight, self.bias = linear.weight, linear.bias
        self.finish = finish

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_BTD: Tensor, *, labels_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or with labels their fp32 log-probabilities (B, T)."""
        return (
            self._logits(x_BTD)
            if labels_BT is None
            else super().forward(x_BTD, labels_BT=labels_BT)
        )

    def _score(self, x_ND: Tensor, labels_N: Tensor) -> Tensor:
        return self.label_logps(self._logits(x_ND), labels_N)

    def _logits(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight, self.bias)
        return logits if self.finish is None else self.finish(logits)


class WrappedLM(nn.Module):
    """A causal language model of transformers; its parameters carry their names there."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        name = type(causal).__name__
        self.base_name: str = causal.base_model_prefix
        head = causal.get_output_embeddings()
        found = [path for path, module in causal.named_modules() if module is head]
        children = dict(causal.named_children())
        if not isinstance(head, nn.Linear) or set(children) != {self.base_name, *found}:
            raise ValueError(
                f"transformers' {name} is more than a base model and one linear layer behind it: "
                f"it holds {', '.join(children)}; it cannot be wrapped"
            )
        (self.head_name,) = found
        setattr(causal, self.base_name, _Given())
        setattr(causal, self.head_name, nn.Identity())
        wrapped = WrappedHead(head, _finish_of(causal, self.head_name, head.out_features))
        for child_name, child in children.items():
            self.add_module(child_name, wrapped if child is head else child)
        self.initialise: Callable[[nn.Module], None] = causal._init_weights
        """Draws the values of the parameters and computes the buffers that a module itself sets."""
        base_forward = type(self.base).forward
        self.takes_positions = "position_ids" in inspect.signature(base_forward).parameters
        restore_buffers(self)
        self.train()

    @property
    def base(self) -> nn.Module:
        """All but the head."""
        return self.get_submodule(self.base_name)

    @property
    def head(self) -> WrappedHead:
        """The last layer."""
        head = self.get_submodule(self.head_name)
        assert isinstance(head, WrappedHead), "it was put there"
        return head

    def train(self, mode: bool = True) -> "WrappedLM":
        """Set the mode of adapters alone.

        Transformers' modules stay in evaluation mode: their dropout would draw what no layout of
        ranks can repeat.
        """
        super().train(False)
        self.training = mode
        for _, linear in adapted_linears(self):
            linear.training = mode
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor,
        documents_BT: Tensor | None = None,
        document_offsets: Tensor | None = None,
        longest_document_tokens: int | None = None,
        labels_BT: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V), or with labels their fp32 log-probabilities (B, T).

        As `DecoderLM.forward`. Documents are told apart by their positions, which begin anew with
        each; transformers makes the masks from them.
        """
        del document_offsets, longest_document_tokens
        positions: dict[str, Any] = {}
        if documents_BT is not None:
            assert self.takes_positions, "rows of several documents are refused otherwise"
            positions["position_ids"] = positions_BT
        hidden_BTD = self.base(input_ids=tokens_BT, use_cache=False, **positions).last_hidden_state
        return self.head(hidden_BTD, labels_BT=labels_BT)


def build(hf: Mapping[str, Any], attention: str) -> WrappedLM:
    """Build the model on the current default device, with buffers in memory all the same."""
    from transformers import AutoModelForCausalLM

    config = read_config(hf)
    try:
        causal = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    except Exception as error:
        raise ValueError(f"transformers cannot build this config.json: {error}") from error
    return WrappedLM(causal)


def _finish_of(shell: Any, head_name: str, vocab_size: int) -> Finish | None:
    """Return what a model does to logits, None for nothing; `shell` is a model without its parts.

    The model's own forward is run between a stand-in for the base model and one for the head. It
    must give the head exactly the last hidden state, and treat the logits of each token and word
    alone, so that they can be scored in chunks.
    """
    finish = partial(_finish, shell)
    with torch.device("cpu"), torch.no_grad():
        probe_BTV = torch.linspace(-50.0, 50.0, 3 * vocab_size).view(1, 3, vocab_size)
        entered: list[Tensor] = []
        hook = shell.get_submodule(head_name).register_forward_pre_hook(
            lambda module, args: entered.append(args[0])
        )
        try:
            finished = finish(probe_BTV)
            parts = finish(probe_BTV[:, :2]), finish(probe_BTV[..., : vocab_size // 2])
        except Exception as error:
            raise ValueError(
                f"transformers' {type(shell).__name__} calls its base model or its head in its "
                f"own way, which stand-ins do not have ({error}); use another model"
            ) from error
        finally:
            hook.remove()
    is_plain = torch.equal(entered[0], probe_BTV)
    is_plain &= torch.equal(parts[0], finished[:, :2])
    is_plain &= torch.equal(parts[1], finished[..., : vocab_size // 2])
    if not is_plain:
        raise ValueError(
            f"transformers' {type(shell).__name__} changes the hidden state before its head, or "
            "mixes logits behind it; it cannot be wrapped"
        )
    return None if torch.equal(finished, probe_BTV) else finish


def _finish(shell: Any, logits: Tensor) -> Tensor:
    is_flat = logits.dim() == 2
    given = logits.unsqueeze(0) if is_flat else logits
    finished = shell(inputs_embeds=given, use_cache=False).logits
    return finished.squeeze(0) if is_flat else finished


@torch.no_grad()
def restore_buffers(model: WrappedLM) -> None:
    """Compute every buffer on the CPU, by the model's own initialisation.

    Parameters, on the meta device, have no values to change. ValueError for a buffer that is left
    as it was.
    """
    with torch.random.fork_rng(devices=[]):
        for path, module in model.named_modules():
            names = [n for n, b in module._buffers.items() if b is not None]
            loose = [n for n, v in vars(module).items() if isinstance(v, Tensor)]
            if loose or not set(names) <= module._non_persistent_buffers_set:
                raise ValueError(
                    f"{path or 'the model'} holds the tensors {', '.join([*loose, *names])}, which "
                    "are no parameters but belong to its state; it cannot be wrapped"
                )
            found: list[dict[str, Tensor]] = []
            for start in (0, 1) if names else ():
                for name in names:
                    buffer = module._buffers[name]
                    assert buffer is not None, "chosen so"
                    module._buffers[name] = torch.full_like(buffer, start, device="cpu")
                with torch.device("cpu"):
                    model.initialise(module)
                found.append({name: module.get_buffer(name) for name in names})
            for name in names:
                if not torch.equal(found[0][name], found[1][name]):
                    raise ValueError(
                        f"transformers does not say how the buffer {path}.{name} begins; a model "
                        "with it cannot be wrapped"
                    )
