"""Contextual sparsity: per token, only the heads (and ReLU neurons) that matter contribute; the others are masked.

Forward hooks on a layer's projections do all of it, so any attention implementation and any cache may run below: what
is decided for a token depends on that token's hidden state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chai.predictor import Predictor

#: Scores of the token positions that the attention, or the MLP, of the running call has just read.
_HEAD_SCORES: ContextVar[Tensor] = ContextVar("head_scores")
_NEURON_SCORES: ContextVar[Tensor] = ContextVar("neuron_scores")


@dataclass(frozen=True)
class Block:
    """The modules of a decoder layer that are listened to.

    Attributes:
        attention: reads the hidden states.
        output: W_O; reads the heads' outputs, ``[B, T, H * D]``.
        first: the MLP's first projection; reads the hidden states (of several that do, any).
        last: the MLP's last projection; reads the neurons.
    """

    attention: nn.Module
    output: nn.Module
    first: nn.Module
    last: nn.Module


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The blocks of a model of one of :data:`chai.runtime.FAMILIES`."""
    blocks = []
    for layer in model.get_decoder().layers:
        attention = _first(layer, "self_attn", "attention")
        mlp = getattr(layer, "mlp", layer)
        blocks.append(
            Block(
                attention,
                _first(attention, "o_proj", "out_proj", "dense"),
                _first(mlp, "gate_proj", "fc1", "dense_h_to_4h"),
                _first(mlp, "down_proj", "fc2", "dense_4h_to_h"),
            )
        )
    return blocks


def activation(config: PreTrainedConfig) -> str:
    """The name of the MLP's activation function."""
    return str(getattr(config, "activation_function", None) or config.hidden_act)


def kept_of(count: int, sparsity: float) -> int:
    """How many of ``count`` are kept: ``(1 - sparsity) count``, rounded, at least one."""
    return max(1, int(count * (1 - sparsity) + 0.5))


def head_norms(output: Tensor, heads: int) -> Tensor:
    """``||y_h||`` of each head: ``[..., H * D]`` to ``[..., H]``, in fp32."""
    return output.unflatten(-1, (heads, -1)).float().norm(dim=-1)


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """Bool like ``scores`` (``[..., N]``): the ``keep`` largest of each token; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :keep], True)


@contextmanager
def contextually_sparse(
    model: PreTrainedModel, predictor: Predictor | None, heads_kept: int, neurons_kept: int | None
) -> Iterator[PreTrainedModel]:
    """Mask all but the top heads (and neurons) of each token inside the block.

    Args:
        model: of a supported family.
        predictor: scores from hidden states; ``None``: the true magnitudes (the oracle).
        heads_kept: of each layer.
        neurons_kept: of each layer; ``None``: all.
    """
    heads = model.config.num_attention_heads
    with ExitStack() as stack:
        for index, block in enumerate(find_blocks(model)):
            if heads_kept < heads:
                network = predictor.heads[index] if predictor is not None else None
                _mask(stack, block.attention, block.output, network, _HEAD_SCORES, heads, heads_kept)
            if neurons_kept is not None:
                network = predictor.neurons[index] if predictor is not None else None
                _mask(stack, block.first, block.last, network, _NEURON_SCORES, None, neurons_kept)
        yield model


def _mask(
    stack: ExitStack,
    reader: nn.Module,
    writer: nn.Module,
    network: nn.Module | None,
    scores: ContextVar[Tensor],
    heads: int | None,
    keep: int,
) -> None:
    """Let ``writer`` see only what counts: whole heads, or (``heads`` is ``None``) single neurons."""

    def predict(hidden: Tensor) -> None:
        assert network is not None
        scores.set(network(hidden))

    def mask(value: Tensor) -> Tensor:
        if network is not None:
            found = scores.get()
        else:
            found = value.abs() if heads is None else head_norms(value, heads)
        kept = top_mask(found, keep).to(value.device)
        if heads is None:
            return value * kept
        return (value.unflatten(-1, (heads, -1)) * kept[..., None]).flatten(-2)

    if network is not None:
        listen(stack, reader, predict)
    listen(stack, writer, mask)


@dataclass
class Observed:
    """What one layer read and computed in a call, a row for each token.

    Attributes:
        hidden: ``[N, d]``, what the attention read.
        norms: ``[N, H]``, the norms of the heads' outputs.
        mlp_hidden: ``[N, d]``, what the MLP read.
        active: bool ``[N, neurons]``: the ReLU neurons that let something through.
    """

    hidden: Tensor = field(init=False)
    norms: Tensor = field(init=False)
    mlp_hidden: Tensor = field(init=False)
    active: Tensor = field(init=False)


@contextmanager
def observed(model: PreTrainedModel, *, mlp: bool) -> Iterator[list[Observed]]:
    """Note what the layers of ``model`` read and compute; each call inside the block overwrites the one before."""
    heads = model.config.num_attention_heads
    found = [Observed() for _ in range(model.config.num_hidden_layers)]

    def note(stack: ExitStack, module: nn.Module, layer: Observed, name: str, take: Callable[[Tensor], Tensor]) -> None:
        def keep(value: Tensor) -> None:
            taken = take(value.detach())
            setattr(layer, name, taken.reshape(-1, taken.shape[-1]))

        listen(stack, module, keep)

    with ExitStack() as stack:
        for block, layer in zip(find_blocks(model), found, strict=True):
            note(stack, block.attention, layer, "hidden", lambda value: value)
            note(stack, block.output, layer, "norms", lambda value: head_norms(value, heads))
            if mlp:
                note(stack, block.first, layer, "mlp_hidden", lambda value: value)
                note(stack, block.last, layer, "active", lambda value: value > 0)
        yield found


def listen(stack: ExitStack, module: nn.Module, act: Callable[[Tensor], Tensor | None]) -> None:
    """Show ``act`` the first input of ``module`` before each call; what it returns, if anything, takes its place."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict] | None:
        changed = act(args[0] if args else kwargs["hidden_states"])
        return None if changed is None else ((changed, *args[1:]), kwargs)

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _first(parent: nn.Module, *names: str) -> nn.Module:
    return next(getattr(parent, name) for name in names if hasattr(parent, name))
