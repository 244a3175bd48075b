"""DejaVu: per token, only heads that a small network predicts to matter contribute (Liu et al., ICML 2023).

Forward hooks on the projections of a layer do all of it, so any attention implementation and any cache may be used:
what is decided for a token depends on that token's hidden state alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chai.errors import ChaiError
from chai.flops import LayerFlops
from chai.methods.base import Method, Saving
from chai.offline.predictor import Predictor, check_shape, load_predictor, read_record
from chai.patching.devices import layer_devices
from chai.patching.model_info import activation, check_family, find_blocks, num_neurons

ORACLE = "oracle"


@dataclass
class Dejavu(Method):
    """Contextual sparsity of heads, and of the neurons of ReLU models.

    For each token and layer, with ``x`` the input of the layer's attention (after its norm) and ``y_h`` the output of
    head ``h``,

        S = top (1 - sparsity) H heads by s(x),     attention output = W_O [1(h in S) y_h]_h.

    ``s`` is the predictor of the layer (:mod:`chai.offline.predictor`), trained to find the heads of the largest
    ``||y_h||`` (Section 3.1; heads of near uniform attention, which average their values, have small ones). With
    ``predictor="oracle"`` it is the norms themselves: a perfect predictor. Neurons are chosen the same way, by their
    activation.

    The saving is simulated: outputs are masked, everything is computed. A kernel that gathers the chosen heads would
    save their products for one token, but keys and values of all heads stay in the cache, for later tokens may choose
    others.

    Attributes:
        predictor: Folder of a trained predictor, or ``oracle``.
        sparsity: Share of the heads that do not contribute, from 0 to below 1.
        mlp_sparsity: The same for the neurons of the MLP; above 0 only for models with ReLU (OPT).

    Raises:
        ValueError: A value outside its choices.
    """

    predictor: str | None
    sparsity: float = 0.5
    mlp_sparsity: float = 0.0

    saving: ClassVar[Saving] = "simulated"

    def __post_init__(self) -> None:
        for name in ("sparsity", "mlp_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: 0 to below 1")

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply to ``model`` inside a ``with`` block."""
        self.check(model.config)
        predictor = self._load(model)
        neurons = num_kept(num_neurons(model.config), self.mlp_sparsity) if self.mlp_sparsity else None
        return mask_outputs(model, predictor, self.heads_kept(model.config)[0], neurons)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return the heads that contribute to a token."""
        return [num_kept(config.num_attention_heads, self.sparsity)] * config.num_hidden_layers

    def layer_flops(self, config: PreTrainedConfig) -> list[LayerFlops]:
        """Kept heads and neurons, and the predictors that are used; an oracle costs nothing.

        As DejaVu counts: the keys and values of heads that a token does not use itself are not counted, though a later
        token may need them.
        """
        neurons = num_neurons(config)
        kept = num_kept(neurons, self.mlp_sparsity)
        predictor = 0
        if self.predictor is not None and self.predictor != ORACLE:
            sizes, num_heads = read_record(Path(self.predictor)), config.num_attention_heads
            if self.heads_kept(config)[0] < num_heads:
                predictor += sizes["bottleneck"] * (config.hidden_size + num_heads)
            if self.mlp_sparsity:
                predictor += sizes["neuron_bottleneck"] * (config.hidden_size + neurons)
        layers = super().layer_flops(config)
        return [replace(layer, neurons=kept / neurons, predictor=predictor) for layer in layers]

    def note(self, config: PreTrainedConfig) -> str:
        """Return that the saving is simulated."""
        oracle = " by their true norms, as a perfect predictor would" if self.predictor == ORACLE else ""
        return f"dejavu masks heads{oracle}: the saving is simulated"

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that is not supported, a missing or wrong predictor, and neurons without ReLU."""
        check_family(config)
        if self.mlp_sparsity and activation(config) != "relu":
            raise ValueError(f"mlp_sparsity needs a model with ReLU, such as OPT; this one has {activation(config)}")
        if self.predictor == ORACLE:
            return
        if self.predictor is None:
            raise ChaiError(
                f"dejavu has no predictor for this model; valid: the folder of a trained one, or '{ORACLE}'",
                remedy="train_predictor",
            )
        record = check_shape(Path(self.predictor), config)
        if self.mlp_sparsity and record["neurons"] != num_neurons(config):
            raise ChaiError(f"the predictor in {self.predictor} has no neurons", remedy="train_neurons")

    def check_weights(self, model: PreTrainedModel) -> None:
        """Refuse the predictor of another model of the same shape."""
        self._load(model)

    def _load(self, model: PreTrainedModel) -> Predictor | None:
        if self.predictor is None or self.predictor == ORACLE:
            return None
        predictor = load_predictor(Path(self.predictor))
        predictor.check_model(model)
        return predictor.to_layers(layer_devices(model))


def num_kept(count: int, sparsity: float) -> int:
    """Return how many of ``count`` are kept: ``(1 - sparsity) count``, rounded, at least 1."""
    return max(1, int(count * (1 - sparsity) + 0.5))


def head_norms(output: Tensor, num_heads: int) -> Tensor:
    """Compute ``||y_h||`` of each head: ``[..., H * D]`` to ``[..., H]``, in fp32."""
    return output.unflatten(-1, (num_heads, -1)).float().norm(dim=-1)


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Return bool ``[..., N]``: the ``count`` largest scores of each token, ties by lowest index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


@contextmanager
def mask_outputs(
    model: PreTrainedModel, predictor: Predictor | None, heads_kept: int, neurons_kept: int | None
) -> Iterator[PreTrainedModel]:
    """Mask all but the top heads (and neurons; ``None``: none) of each token inside the block.

    Without a predictor, by the true magnitudes (the oracle).
    """
    num_heads = model.config.num_attention_heads
    with ExitStack() as stack:
        for index, block in enumerate(find_blocks(model)):
            if heads_kept < num_heads:
                network = predictor.heads[index] if predictor is not None else None
                _mask_block(stack, block.attention, block.output, network, num_heads, heads_kept)
            if neurons_kept is not None:
                network = predictor.neurons[index] if predictor is not None else None
                _mask_block(stack, block.first, block.last, network, None, neurons_kept)
        yield model


def _mask_block(
    stack: ExitStack, reader: nn.Module, writer: nn.Module, network: nn.Module | None, num_heads: int | None, count: int
) -> None:
    """Mask the input of ``writer``: whole heads, or single neurons if ``num_heads`` is ``None``."""
    scores = threading.local()  # from the hook of `reader` to that of `writer`, in one call of the layer

    def predict(hidden: Tensor) -> None:
        assert network is not None
        scores.value = network(hidden)

    def mask(value: Tensor) -> Tensor:
        if network is not None:
            importance = scores.value
        else:
            importance = value.abs() if num_heads is None else head_norms(value, num_heads)
        kept = top_mask(importance, count).to(value.device)
        if num_heads is None:
            return value * kept
        return (value.unflatten(-1, (num_heads, -1)) * kept[..., None]).flatten(-2)

    if network is not None:
        hook_input(stack, reader, predict)
    hook_input(stack, writer, mask)


@dataclass
class LayerActivity:
    """What one layer read and computed in a call, a row for each token."""

    hidden: Tensor = field(init=False)  # [N, d], input of the attention
    norms: Tensor = field(init=False)  # [N, H], norms of the heads' outputs
    mlp_hidden: Tensor = field(init=False)  # [N, d], input of the MLP
    active: Tensor = field(init=False)  # bool [N, neurons], ReLU neurons with a positive output


@contextmanager
def record_activity(model: PreTrainedModel, *, mlp: bool) -> Iterator[list[LayerActivity]]:
    """Record what the layers read and compute; each call inside the block overwrites the one before."""
    num_heads = model.config.num_attention_heads
    layers = [LayerActivity() for _ in range(model.config.num_hidden_layers)]

    def record(module: nn.Module, layer: LayerActivity, name: str, convert: Callable[[Tensor], Tensor]) -> None:
        def store(value: Tensor) -> None:
            converted = convert(value.detach())
            setattr(layer, name, converted.reshape(-1, converted.shape[-1]))

        hook_input(stack, module, store)

    with ExitStack() as stack:
        for block, layer in zip(find_blocks(model), layers, strict=True):
            record(block.attention, layer, "hidden", lambda value: value)
            record(block.output, layer, "norms", lambda value: head_norms(value, num_heads))
            if mlp:
                record(block.first, layer, "mlp_hidden", lambda value: value)
                record(block.last, layer, "active", lambda value: value > 0)
        yield layers


def hook_input(stack: ExitStack, module: nn.Module, act: Callable[[Tensor], Tensor | None]) -> None:
    """Call ``act`` on the first input of ``module`` before each call; a returned tensor replaces the input."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict] | None:
        changed = act(args[0] if args else kwargs["hidden_states"])
        return None if changed is None else ((changed, *args[1:]), kwargs)

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
