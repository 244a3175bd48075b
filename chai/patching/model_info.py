"""Read the shape and the parts of a transformers model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chai.flops import LayerShape
from chai.patching.devices import decoder_layers

#: Families whose attention calls the registered function as we rely on; each is covered by a test.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox")


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a model whose attention is not known to call our function (ValueError)."""
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"model family '{family}' is not supported; supported: {', '.join(FAMILIES)}")


def num_kv_heads(config: PreTrainedConfig) -> int:
    """Return the number of KV heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer, ``None`` without one."""
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return windows or [None] * config.num_hidden_layers


def activation(config: PreTrainedConfig) -> str:
    """Return the name of the MLP's activation function."""
    return str(getattr(config, "activation_function", None) or config.hidden_act)


def num_neurons(config: PreTrainedConfig) -> int:
    """Return the width of the MLP."""
    return getattr(config, "ffn_dim", None) or config.intermediate_size


@dataclass(frozen=True)
class Block:
    """The modules of a decoder layer that hooks are registered on."""

    attention: nn.Module  # reads the hidden states
    output: nn.Module  # W_O; reads the outputs of the heads, [B, T, H * D]
    first: nn.Module  # the first projection of the MLP; reads the hidden states (any, if several do)
    last: nn.Module  # the last projection of the MLP; reads the neurons


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """Find the blocks of a model of one of :data:`FAMILIES`."""
    blocks = []
    for layer in decoder_layers(model):
        attention = _first_of(layer, "self_attn", "attention")
        mlp = getattr(layer, "mlp", layer)
        blocks.append(
            Block(
                attention,
                _first_of(attention, "o_proj", "out_proj", "dense"),
                _first_of(mlp, "gate_proj", "fc1", "dense_h_to_4h"),
                _first_of(mlp, "down_proj", "fc2", "dense_4h_to_h"),
            )
        )
    return blocks


def layer_shape(model: PreTrainedModel, shares_values: bool = False) -> LayerShape:
    """Return the shape of a model's decoder layers, which are assumed to be alike.

    Where the parts of a layer have names of their own (a family that only multi-head attention runs on), all its
    matrices count as one that cannot be sliced, which is all that multi-head attention needs.
    """
    config = model.config
    num_heads = config.num_attention_heads
    layer = decoder_layers(model)[0]

    def entries(part: nn.Module) -> int:
        matrices = (module.weight for module in part.modules() if isinstance(module, (nn.Linear, Conv1D)))
        return sum(matrix.numel() for matrix in matrices)

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    attention = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
    if attention is None:
        return LayerShape(num_heads, num_kv_heads(config), head_dim, 0, 0, entries(layer), 0, 0, 0, shares_values)

    def weights(*names: str) -> int:
        modules = (getattr(attention, name, None) for name in names)
        return sum(entries(module) for module in modules if isinstance(module, nn.Linear))

    total, query_weights, key_weights = entries(layer), weights("q_proj"), weights("k_proj")
    return LayerShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=head_dim,
        query_weights=query_weights,
        key_weights=key_weights,
        other_weights=total - query_weights - key_weights,
        value_weights=weights("v_proj"),
        output_weights=weights("o_proj", "out_proj", "dense"),
        mlp_weights=total - entries(attention),
        shares_values=shares_values,
    )


def logit_weights(model: PreTrainedModel) -> int:
    """Count the entries of the matrix that turns hidden states into logits."""
    output = model.get_output_embeddings()
    return output.weight.numel() if isinstance(output, nn.Linear) else 0


def _first_of(parent: nn.Module, *names: str) -> nn.Module:
    return next(getattr(parent, name) for name in names if hasattr(parent, name))
