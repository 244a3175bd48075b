"""Sensitivity of the model's output to clustering one layer, measured on texts.

With the next-token distribution ``p`` of the model and ``p_lk`` that of the model whose layer l alone runs with k
clusters, the sensitivity of layer l to k clusters is the mean over tokens of

    KL(p || p_lk) = sum_v p(v) (log p(v) - log p_lk(v))        in nats.

The layers before l are the same for every k: their outputs are computed once for a batch of texts, and a measurement
runs the layers from l on. So a model of L layers costs about L / 2 passes for each k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai.attention import clustered_attention, mha_attention
from chai.heads import HeadClusters, KVHeadMap, take_heads
from chai.patching.apply import AttentionInputs, Decoder, ForwardPass, patched, running
from chai.patching.devices import input_device, replaced_forward
from chai.patching.model_info import check_family, find_layers

#: Shares of the heads that are measured in a layer of more than :data:`ALL_COUNTS` heads.
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
ALL_COUNTS = 12


def measured_counts(num_heads: int) -> list[int]:
    """Return the numbers of clusters to measure: all below H up to 12 heads, else nine of them."""
    if num_heads <= ALL_COUNTS:
        return list(range(1, num_heads))
    return sorted({max(1, round(share * num_heads)) for share in SHARES})


@torch.inference_mode()
def measure_sensitivity(
    model: PreTrainedModel,
    ids: Tensor,
    maps: Sequence[Mapping[int, HeadClusters]],
    exact_tokens: int,
    skip: Callable[[int], bool] = lambda layer: False,
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Measure each layer, and yield its index and, for each k, the mean KL divergence of each text ``[N]`` (fp32).

    Args:
        model: Of a supported family.
        ids: Long ``[N, T]``, texts of the same length.
        maps: For each layer, the clusters of each k (one row, the same for every text).
        exact_tokens: First tokens of a text, which run with all heads, and are left out of the mean.
        skip: Layers that are not measured.

    Raises:
        ValueError: The family is not supported, the texts are too short, or a method is applied already.
    """
    check_family(model.config)
    if ids.shape[1] <= exact_tokens:
        raise ValueError(f"texts have {ids.shape[1]} tokens; valid: more than the {exact_tokens} with all heads")
    ids = ids.to(input_device(model))
    with _restarts(model) as run:
        reference = _log_probabilities(model, ids, exact_tokens)
        for layer, layer_maps in enumerate(maps):
            if skip(layer):
                continue
            found = {}
            for k, clusters in layer_maps.items():
                run(OneLayerClustered(layer, clusters, exact_tokens))
                found[k] = _divergence(reference, _log_probabilities(model, ids, exact_tokens))
            yield layer, found


class OneLayerClustered(ForwardPass):
    """A pass in which one layer runs on its representatives, and the others as they are.

    Attributes:
        layer: Its index; -1: none.
        clusters: Its clusters, of one row.
        exact_tokens: First tokens, which run with all heads.
    """

    def __init__(self, layer: int = -1, clusters: HeadClusters | None = None, exact_tokens: int = 0) -> None:
        self.layer, self.clusters, self.exact_tokens = layer, clusters, exact_tokens

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Compute one layer's attention, ``[B, T, H, D]``."""
        if inputs.layer_idx != self.layer or self.clusters is None:
            return inputs.stock()
        return clustered_layer(inputs, self.clusters, self.exact_tokens)


def clustered_layer(inputs: AttentionInputs, clusters: HeadClusters, exact_tokens: int) -> Tensor:
    """Compute one layer's attention ``[B, T, H, D]`` on the representatives, the first tokens with all heads.

    Clusters are of one row, the same for every text.
    """
    query, key, value, first = inputs.query, inputs.key, inputs.value, exact_tokens
    clusters = clusters.repeat(len(query), query.device)
    head_map = KVHeadMap.only_read(clusters, key.shape[1])
    # The first tokens.
    early_query, early_key, early_value = (tensor[:, :, :first] for tensor in (query, key, value))
    early_mask = None if inputs.mask is None else inputs.mask[:, :, :first, :first]
    exact = mha_attention(early_query, early_key, early_value, inputs.scaling, early_mask, softcap=inputs.softcap)
    # The other tokens.
    query = take_heads(query[:, :, first:], clusters.representatives)
    mask = None if inputs.mask is None else inputs.mask[:, :, first:]
    stored = take_heads(key, head_map.stored)
    rest = clustered_attention(query, stored, value, head_map, inputs.scaling, mask, inputs.softcap)
    return torch.cat([exact, rest.transpose(1, 2)], 1)


@contextmanager
def _restarts(model: PreTrainedModel) -> Iterator[Callable[[OneLayerClustered], None]]:
    """Keep the output of every layer in the first pass, and take those of the layers before the clustered one later.

    The function that is returned sets what the next passes compute.
    """
    outputs: dict[int, Any] = {}
    current = OneLayerClustered()

    def compute(forward_pass: OneLayerClustered) -> None:
        nonlocal current
        current = forward_pass

    def decode(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
        with running(current):
            return decoder.forward(*args, **kwargs)

    def layer_forward(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if index < current.layer:
                return outputs[index]
            output = forward(*args, **kwargs)
            if current.layer < 0:
                outputs[index] = output
            return output

        return run

    with ExitStack() as stack:
        stack.enter_context(patched(model, decode))
        for index, layer in enumerate(find_layers(model)):
            stack.enter_context(replaced_forward(layer, layer_forward(index, layer.forward)))
        yield compute


def _log_probabilities(model: PreTrainedModel, ids: Tensor, exact_tokens: int) -> list[Tensor]:
    """Return the log-probabilities of each text's tokens after the exact ones, fp32 ``[T - exact_tokens, V]``."""
    logits: Tensor = model(ids, use_cache=False).logits
    return [row[exact_tokens:].float().log_softmax(-1) for row in logits]


def _divergence(reference: list[Tensor], changed: list[Tensor]) -> Tensor:
    """Return ``KL(p || q)`` of log-probabilities, mean of the tokens of each text: ``[N]``."""
    pairs = zip(reference, changed, strict=True)
    return torch.stack([(before.exp() * (before - after)).sum(-1).mean() for before, after in pairs]).cpu()
