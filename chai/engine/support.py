"""What the engine runs: models and methods, and one line for each that it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from chai.methods.base import Method
from chai.methods.chai import ClusteredHeadAttention
from chai.methods.chai_qkv import ChaiQkv
from chai.methods.clustering import ClusteringMethod
from chai.methods.mha import Mha
from chai.patching.apply import ATTENTION
from chai.patching.devices import is_hooked
from chai.patching.model_info import find_layers, num_kv_heads, sliding_windows
from chai.patching.rotary import depends_on_length

#: Families whose decoder layer is: RMS norm, q, k, v and o projections, rotary embedding, gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
METHODS = ("mha", "chai", "chai_static", "static", "random", "chai_qkv", "chai_output")
#: Activation functions of the gated MLP, by the name in a configuration.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """The shape of all layers of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float  # factor of the scores
    eps: float  # of the RMS norms
    activation: str  # silu or gelu_tanh

    @property
    def group(self) -> int:
        """Number of query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads


def check_number(name: str, value: object) -> None:
    """Refuse what is no integer of at least 1 (ValueError)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; valid: an integer, 1 or more")
    if value < 1:
        raise ValueError(f"{name} is {value}; valid: 1 or more")


def check_method(method: Method) -> None:
    """Refuse a method that the engine does not run (ValueError)."""
    if isinstance(method, Mha):
        return
    steps = (ClusteredHeadAttention.attend, ChaiQkv.attend), (ClusteredHeadAttention.evict, ChaiQkv.evict)
    if not (
        isinstance(method, ClusteringMethod) and type(method).attend in steps[0] and type(method).evict in steps[1]
    ):
        raise ValueError(
            f"the engine does not run {type(method).__name__}; valid: {', '.join(METHODS)} "
            "(others: `with method(model): model.generate(...)`)"
        )
    if method.needs_outputs:
        raise ValueError(
            f"the engine does not run {type(method).__name__} with clusters by the output of a request's tokens; "
            "valid: chai with another metric and representative, chai_output with prior=null "
            "(others: `with method(model): model.generate(...)`)"
        )
    if method.fitted_outputs:
        raise ValueError(
            f"the engine does not run {type(method).__name__} with refit=true, whose output projections are not the "
            "model's; valid: refit=false (else: `with method(model): model.generate(...)`)"
        )


def check_model(model: PreTrainedModel, max_length: int) -> None:
    """Refuse a model that the engine would not compute as it is (ValueError)."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(f"the engine does not run the family '{config.model_type}'; valid: {', '.join(FAMILIES)}")
    if config._attn_implementation == ATTENTION:
        raise ValueError("a method is applied to this model already: leave its `with` block first")
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError(f"a {type(model).__name__} has no logits of the next token; valid: a causal language model")
    if model.training:
        raise ValueError("the model is in training mode, and the engine has no gradients; valid: model.eval()")
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"the engine does not run hidden_act '{config.hidden_act}'; valid: {', '.join(ACTIVATIONS)}")
    window = least_window(model)
    if window is not None and window < max_length:
        raise ValueError(
            f"this model has a sliding window of {window} tokens, which the engine does not compute; "
            f"valid: max_length up to {window}"
        )
    rotary = model.get_decoder().rotary_emb
    if depends_on_length(rotary):
        raise ValueError(
            f"rotary frequencies that depend on the length ({rotary.rope_type}) are not supported; "
            "valid: default, linear, llama3, yarn"
        )
    for name, module in model.named_modules():
        _check_module(name, module)
    _check_weights(model)


def least_window(model: PreTrainedModel) -> int | None:
    """Return the shortest sliding window of the layers; ``None`` without one."""
    return min((window for window in sliding_windows(model.config) if window is not None), default=None)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model has an embedding of."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def read_shape(model: PreTrainedModel) -> Shape:
    """Read the shape of a model that :func:`check_model` accepts."""
    config = model.config
    attention = cast(Any, find_layers(model)[0].self_attn)
    return Shape(
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        eps=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
    )


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse what would be left out: replaced forwards, hooks, adapters, quantized products."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # transformers leaves hooks behind that collect hidden states if they are asked for.
    own = [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
    if is_hooked(module) or own or "forward" in module.__dict__:
        raise ValueError(
            f"the forward of '{name or 'the model'}' is hooked or replaced (offloaded weights, another library), which "
            "the engine would leave out; valid: a plain model on one device"
        )
    if name.endswith("_proj") and type(module) is not nn.Linear:
        raise ValueError(f"'{name}' is a {type(module).__name__} (quantized, or an adapter); valid: nn.Linear")


def _check_weights(model: PreTrainedModel) -> None:
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise ValueError(f"the weights are on {', '.join(sorted(devices))}; valid: all on one device")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        found, valid = (
            ", ".join(sorted(str(item).removeprefix("torch.") for item in kind)) for kind in (dtypes, DTYPES)
        )
        raise ValueError(f"the weights are {found}; valid: one dtype of {valid}")
