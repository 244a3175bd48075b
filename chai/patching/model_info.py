"""Read the shape and the parts of a transformers model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from chai.flops import LayerShape

#: Families whose attention calls the registered function as we rely on; each is covered by a test.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "opt",
    "gpt_neox",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "olmo2",
    "gpt2",
    "falcon",
    "stablelm",
)
#: Settings of these families that change the attention in a way that is not supported.
UNSUPPORTED_SETTINGS = ("alibi", "add_cross_attention", "use_bidirectional_attention")

# The names of a layer's parts in the families of transformers.
LAYERS = ("layers", "h", "blocks", "block")
ATTENTION = ("self_attn", "attention", "attn", "self_attention")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
MLP = ("mlp", "block_sparse_moe", "feed_forward")
FIRST = ("gate_proj", "gate_up_proj", "fc1", "dense_h_to_4h", "c_fc")
LAST = ("down_proj", "fc2", "dense_4h_to_h", "c_proj")


class UncountedError(ValueError):
    """Raised where operations and bytes of a model cannot be counted, for its layers are not known well enough."""


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a model whose attention is not known to call our function (ValueError)."""
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"model family '{family}' is not supported; supported: {', '.join(FAMILIES)}")
    if settings := [name for name in UNSUPPORTED_SETTINGS if getattr(config, name, False)]:
        raise ValueError(f"this {family} model has {settings[0]}=true, which is not supported; valid: false")


def num_kv_heads(config: PreTrainedConfig) -> int:
    """Return the number of KV heads that the stock cache stores."""
    if config.model_type == "falcon":  # either one for all, or each KV head once for every query head that reads it
        return 1 if config.multi_query and not config.new_decoder_architecture else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config: PreTrainedConfig) -> int:
    """Return the width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def is_latent(config: PreTrainedConfig) -> bool:
    """Whether keys and values are projected from a latent vector (DeepSeek), each to a width of its own."""
    return bool(getattr(config, "kv_lora_rank", None))


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer, ``None`` without one."""
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return windows or [None] * config.num_hidden_layers


def activation(config: PreTrainedConfig) -> str:
    """Return the name of the MLP's activation function."""
    names = ("activation_function", "hidden_activation", "activation", "hidden_act")
    return str(next(getattr(config, name) for name in names if getattr(config, name, None)))


def num_neurons(config: PreTrainedConfig) -> int:
    """Return the width of the MLP."""
    names = ("ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), 4 * config.hidden_size)


@dataclass(frozen=True)
class Block:
    """The modules of a decoder layer that hooks are registered on."""

    attention: nn.Module  # reads the hidden states
    output: nn.Module  # W_O; reads the outputs of the heads, [B, T, H * D]
    first: nn.Module | None  # the first projection of the MLP; reads the hidden states (any, if several do)
    last: nn.Module | None  # the last projection of the MLP; reads the neurons; None: there are experts instead


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers (UncountedError: they are not where transformers' models have them)."""
    return list_layers(model.get_decoder())


def list_layers(decoder: nn.Module) -> nn.ModuleList:
    """Return the layers of a decoder (UncountedError: they are not where those of transformers are)."""
    lists = [decoder.get_submodule(name) for name in LAYERS if hasattr(decoder, name)] + list(decoder.children())
    layers = next((part for part in lists if isinstance(part, nn.ModuleList) and len(part)), None)
    if layers is None:
        raise UncountedError(f"the layers of a {type(decoder).__name__} were not found")
    return layers


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """Find the blocks of a model of one of :data:`FAMILIES`."""
    blocks = []
    for layer in find_layers(model):
        attention, mlp = _first_of(layer, *ATTENTION), _first_of(layer, *MLP) or layer
        output = None if attention is None else _first_of(attention, *OUTPUT)
        assert attention is not None and output is not None
        blocks.append(Block(attention, output, _first_of(mlp, *FIRST), _first_of(mlp, *LAST)))
    return blocks


def norms_all_heads(attention: nn.Module) -> bool:
    """Whether queries and keys are normalised over all heads together (OLMo-2): then no head can be left out."""
    norm = getattr(attention, "q_norm", None)
    weight = getattr(norm, "weight", None)
    return weight is not None and weight.numel() != getattr(attention, "head_dim", None)


def layer_shape(model: PreTrainedModel, shares_values: bool = False) -> LayerShape:
    """Return the shape of a model's decoder layers: the mean, should their MLPs differ.

    Entries are those that a token is multiplied with: of a mixture of experts, as many experts as a token uses.

    Raises:
        UncountedError: The layers are not known well enough.
    """
    config = model.config.get_text_config()
    if is_latent(config):
        raise UncountedError("latent attention (kv_lora_rank) has no keys and values of each head to count")
    layers = find_layers(model)
    attention = _first_of(layers[0], *ATTENTION)
    if attention is None:
        raise UncountedError(f"the attention of a {type(model).__name__} was not found; tried: {', '.join(ATTENTION)}")

    def weights(*names: str) -> int:
        return sum(matrix_entries(part, config) for name in names if (part := _first_of(attention, name)) is not None)

    sliceable = not norms_all_heads(attention)
    query_weights, key_weights = (weights(name) if sliceable else 0 for name in ("q_proj", "k_proj"))
    total = sum(matrix_entries(layer, config) for layer in layers) // len(layers)
    return LayerShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=head_dim(config),
        query_weights=query_weights,
        key_weights=key_weights,
        other_weights=total - query_weights - key_weights,
        value_weights=weights("v_proj"),
        output_weights=weights(*OUTPUT),
        mlp_weights=total - matrix_entries(attention, config),
        shares_values=shares_values,
    )


def matrix_entries(part: nn.Module, config: PreTrainedConfig) -> int:
    """Count the entries of the matrices that a token is multiplied with in a part of a layer.

    Stacked experts (``[E, n, m]``) count as often as a token uses them.
    """
    experts = next((n for name in ("num_local_experts", "num_experts") if (n := getattr(config, name, None))), 0)
    total = 0
    for module in part.modules():
        if isinstance(module, nn.Linear):
            total += module.in_features * module.out_features  # a quantized weight has another shape
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and len(parameter) == experts:
                total += parameter.numel() // experts * config.num_experts_per_tok
            elif parameter.ndim == 2 and not isinstance(module, nn.Embedding):
                total += parameter.numel()
    return total


def logit_weights(model: PreTrainedModel) -> int:
    """Count the entries of the matrix that turns hidden states into logits."""
    output = model.get_output_embeddings()
    return output.weight.numel() if isinstance(output, nn.Linear) else 0


def _first_of(parent: nn.Module, *names: str) -> nn.Module | None:
    """Return the first child of one of these names that a module has."""
    parts = (getattr(parent, name, None) for name in names)
    return next((part for part in parts if isinstance(part, nn.Module)), None)
