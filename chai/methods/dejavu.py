"""DejaVu: per token, only heads that a small network predicts to matter contribute (Liu et al., ICML 2023).

Forward hooks on the projections of a layer do all of it, so any attention implementation and any cache may be used:
what is decided for a token depends on that token's hidden state alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chai.errors import ChaiError
from chai.flops import LayerFlops
from chai.methods.base import Method, Saving
from chai.offline.predictor import Predictor, check_shape, load_predictor, read_record, recall_at
from chai.patching.devices import layer_devices
from chai.patching.model_info import activation, check_family, find_blocks, num_neurons

ORACLE = "oracle"
Part = Literal["heads", "neurons"]


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

    Dense layers use all heads, and all neurons. The authors keep the attention of the first five layers of OPT-66B
    dense, and the MLP of the last ten.

    The saving is simulated: outputs are masked, everything is computed. A kernel that gathers the chosen heads would
    save their products for one token, but keys and values of all heads stay in the cache, for later tokens may choose
    others.

    Attributes:
        predictor: Folder of a trained predictor, or ``oracle``.
        sparsity: Share of the heads that do not contribute, from 0 to below 1.
        mlp_sparsity: The same for the neurons of the MLP; above 0 only for models with ReLU (OPT).
        dense_layers: Layers whose heads all contribute: the first ones as a count, or a list of layers. ``None``: those
            that the predictor was not trained for (``oracle``: none).
        dense_mlp_layers: The same for neurons, but a count is one of the last layers.

    Raises:
        ValueError: A value outside its choices.
    """

    predictor: str | None
    sparsity: float = 0.5
    mlp_sparsity: float = 0.0
    dense_layers: int | list[int] | None = None
    dense_mlp_layers: int | list[int] | None = None

    saving: ClassVar[Saving] = "simulated"

    def __post_init__(self) -> None:
        for name in ("sparsity", "mlp_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: 0 to below 1")

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply to ``model`` inside a ``with`` block."""
        self.check(model.config)
        predictor = self._load(model)
        return mask_outputs(model, predictor, self.heads_kept(model.config), self.neurons_kept(model.config))

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return the heads of each layer that contribute to a token."""
        return self._kept(config, config.num_attention_heads, self.sparsity, self._dense(config, "heads"))

    def neurons_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return the neurons of each layer that contribute to a token."""
        return self._kept(config, num_neurons(config), self.mlp_sparsity, self._dense(config, "neurons"))

    def layer_flops(self, config: PreTrainedConfig) -> list[LayerFlops]:
        """Kept heads and neurons, and the predictors that are used; an oracle costs nothing.

        As DejaVu counts: the keys and values of heads that a token does not use itself are not counted, though a later
        token may need them.
        """
        neurons, num_heads = num_neurons(config), config.num_attention_heads
        sizes = self._record()
        layers = []
        for layer, kept in zip(super().layer_flops(config), self.neurons_kept(config), strict=True):
            entries = 0
            if sizes and layer.scores < num_heads:
                entries += sizes["bottleneck"] * (config.hidden_size + num_heads)
            if sizes and kept < neurons:
                entries += sizes["neuron_bottleneck"] * (config.hidden_size + neurons)
            layers.append(replace(layer, neurons=kept / neurons, predictor=entries))
        return layers

    def note(self, config: PreTrainedConfig) -> str:
        """Return that the saving is simulated, and how good the predictor is on held-out tokens."""
        if self.predictor == ORACLE:
            return "dejavu masks heads by their true norms, as a perfect predictor would: the saving is simulated"
        parts = ["dejavu masks heads: the saving is simulated"]
        names: dict[Part, str] = {"heads": "recall", "neurons": "MLP recall"}
        for part, name in names.items():
            if (quality := self._quality(config, part)) is not None:
                recall = "not measured" if quality["recall"] is None else f"{quality['recall']:.2f}"
                parts.append(f"predictor {name} {recall} at {100 * quality['sparsity']:g} %")
        return "; ".join(parts)

    def result_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the predictor's recall on held-out tokens and its dense layers; nothing for an oracle."""
        if not self._record():
            return {}
        return {"predictor": {"heads": self._quality(config, "heads"), "neurons": self._quality(config, "neurons")}}

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that is not supported, a missing or wrong predictor, and neurons without ReLU."""
        check_family(config)
        self._check_dense(config)
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
        self._check_trained(config, record)

    def check_weights(self, model: PreTrainedModel) -> None:
        """Refuse the predictor of another model of the same shape."""
        self._load(model)

    def _check_dense(self, config: PreTrainedConfig) -> None:
        """Refuse layers that the model does not have, and dense layers that leave nothing to mask."""
        last = config.num_hidden_layers - 1
        for name in ("dense_layers", "dense_mlp_layers"):
            value = getattr(self, name)
            if isinstance(value, int) and not 0 <= value <= last:
                raise ValueError(f"{name} is {value}; valid for this model: a count from 0 to {last}, or a list")
            if isinstance(value, list) and not all(0 <= layer <= last for layer in value):
                raise ValueError(f"{name} is {value}; valid for this model: layers from 0 to {last}, or a count")
            if isinstance(value, list) and len(set(value)) > last:
                raise ValueError(f"{name} is {value}, all layers of this model; valid: at least one layer less")

    def _check_trained(self, config: PreTrainedConfig, record: dict[str, Any]) -> None:
        """Refuse layers that are to be masked without a trained network."""
        parts: tuple[tuple[Part, str, float], ...] = (
            ("heads", "dense_layers", self.sparsity),
            ("neurons", "dense_mlp_layers", self.mlp_sparsity),
        )
        for part, name, sparsity in parts:
            missing = sorted(set(record.get(name, ())) - self._dense(config, part))
            if sparsity and missing:
                raise ChaiError(
                    f"the predictor in {self.predictor} has no network for the {part} of layers {missing}; "
                    f"valid: {name} that include them, or null",
                    remedy="train_predictor",
                )

    def _dense(self, config: PreTrainedConfig, part: Part) -> set[int]:
        """Return the layers whose heads, or neurons, all contribute."""
        name = "dense_layers" if part == "heads" else "dense_mlp_layers"
        value = getattr(self, name)
        if value is None:
            value = self._record().get(name, [])
        return dense_layers(value, config.num_hidden_layers, from_end=part == "neurons")

    @staticmethod
    def _kept(config: PreTrainedConfig, count: int, sparsity: float, dense: set[int]) -> list[int]:
        return [count if layer in dense else num_kept(count, sparsity) for layer in range(config.num_hidden_layers)]

    def _quality(self, config: PreTrainedConfig, part: Part) -> dict[str, Any] | None:
        """Return the mean recall of the layers that are masked at this sparsity, and the dense layers."""
        sparsity, record = self.sparsity if part == "heads" else self.mlp_sparsity, self._record()
        if not sparsity or not record:
            return None
        dense = self._dense(config, part)
        recall = recall_at(record, part, sparsity, set(range(config.num_hidden_layers)) - dense)
        return {
            "sparsity": sparsity,
            "recall": None if recall is None else round(recall, 4),
            "dense_layers": sorted(dense),
        }

    def _record(self) -> dict[str, Any]:
        """Return the record of the predictor; empty for an oracle."""
        return {} if self.predictor in (None, ORACLE) else read_record(Path(str(self.predictor)))

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


def dense_layers(value: int | Sequence[int], num_layers: int, *, from_end: bool) -> set[int]:
    """Return the numbers of the dense layers: a count of the first (``from_end``: the last) layers, or as listed."""
    if isinstance(value, int):
        return set(range(num_layers - value, num_layers) if from_end else range(value))
    return set(value)


@contextmanager
def mask_outputs(
    model: PreTrainedModel, predictor: Predictor | None, heads_kept: Sequence[int], neurons_kept: Sequence[int]
) -> Iterator[PreTrainedModel]:
    """Mask all but the top heads and neurons of each token inside the block; both counts have one entry a layer.

    Without a predictor, by the true magnitudes (the oracle). Layers that keep everything are left as they are.
    """
    num_heads, neurons = model.config.num_attention_heads, num_neurons(model.config)
    with ExitStack() as stack:
        for index, block in enumerate(find_blocks(model)):
            if heads_kept[index] < num_heads:
                network = predictor.heads[str(index)] if predictor is not None else None
                _mask_block(stack, block.attention, block.output, network, num_heads, heads_kept[index])
            if neurons_kept[index] < neurons:
                network = predictor.neurons[str(index)] if predictor is not None else None
                assert block.first is not None and block.last is not None  # neurons need ReLU; no experts have it
                _mask_block(stack, block.first, block.last, network, None, neurons_kept[index])
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


#: Receives the part, the layer, the input ``[N, d]`` and the importance ``[N, H]`` or ``[N, neurons]`` of N tokens.
Receiver = Callable[[Part, int, Tensor, Tensor], None]


@contextmanager
def observe_layers(model: PreTrainedModel, receive: Receiver, *, mlp: bool) -> Iterator[None]:
    """Pass on what each layer reads and computes as soon as it is known, so that one layer is in memory at a time.

    The importance of a head is the norm of its output; that of a neuron is its activation.

    Args:
        model: Of one of the supported families.
        receive: Called in each layer, with detached tensors on the layer's device.
        mlp: Whether neurons are passed on as well as heads.
    """
    num_heads = model.config.num_attention_heads

    def connect(part: Part, layer: int, reader: nn.Module, writer: nn.Module) -> None:
        seen: list[Tensor] = []  # from the hook of `reader` to that of `writer`, in one call of the layer

        def read(hidden: Tensor) -> None:
            seen[:] = [hidden.detach()]

        def compute(value: Tensor) -> None:
            value = value.detach()
            importance = head_norms(value, num_heads) if part == "heads" else value
            receive(part, layer, seen.pop().flatten(0, -2), importance.flatten(0, -2))

        hook_input(stack, reader, read)
        hook_input(stack, writer, compute)

    with ExitStack() as stack:
        for index, block in enumerate(find_blocks(model)):
            connect("heads", index, block.attention, block.output)
            if mlp:
                assert block.first is not None and block.last is not None
                connect("neurons", index, block.first, block.last)
        yield


def hook_input(stack: ExitStack, module: nn.Module, act: Callable[[Tensor], Tensor | None]) -> None:
    """Call ``act`` on the first input of ``module`` before each call; a returned tensor replaces the input."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict] | None:
        changed = act(args[0] if args else kwargs["hidden_states"])
        return None if changed is None else ((changed, *args[1:]), kwargs)

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
