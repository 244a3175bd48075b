"""The course of a request under head clustering: warm-up, cluster, evict, attend.

A request runs with all heads until the warm-up tokens of every row have been seen. Then the heads are clustered, the
redundant keys are evicted, and everything runs on the representatives alone. By causality the result is that of one
pass in which each layer clusters its heads after the warm-up tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chai.attention import mha_attention
from chai.cache import ClusteredCache, ClusteredLayer, PrunedLayer
from chai.cache.clustered import Clustered, WarmUp, WarmupTokens, WholePrompt
from chai.heads import HeadClusters, KVHeadMap, take_heads
from chai.patching.apply import (
    AttentionInputs,
    Decoder,
    DecoderCall,
    ForwardPass,
    adopt_cache,
    current_pass,
    join_outputs,
    patched,
    running,
)
from chai.patching.devices import layer_devices
from chai.patching.model_info import check_family, layer_shape, num_kv_heads, sliding_windows
from chai.patching.outputs import HeadOutputs, replaced_outputs
from chai.patching.projections import sliced_projections
from chai.patching.rotary import part_of_positions, whole_call_frequencies

# A prompt in one pass saves the pass of the warm-up tokens, whose weights are read and operations launched once more.
# Cost of a layer in that pass, in multiply-adds of the same time: a constant, and a factor of the layer's weights.
LAYER_OVERHEAD, WEIGHT_OVERHEAD = 140_000_000, 40
#: The same constant on an accelerator: a layer is launched in about a millisecond, in which an H100 does as much.
LAYER_OVERHEAD_ON_GPU = 400_000_000_000


class ClusteringSteps(ABC):
    """The steps of a clustering method, between which a request is the same for all of them."""

    #: Members use the values of their representative, and their own leave the cache (paper, Table 4).
    shares_values: ClassVar[bool] = False

    @property
    def warmup_tokens(self) -> int:
        """Real tokens of multi-head attention at the start of a request; 0: the clusters do not depend on it."""
        return 0

    @property
    def needs_outputs(self) -> bool:
        """Whether :meth:`cluster_heads` looks at the error of the layer's output."""
        return False

    @property
    def fitted_outputs(self) -> Mapping[int, Tensor]:
        """Output projections ``[d, H * D]`` of layers, for tokens that run on representatives in place of W_O.

        As long as a row of the batch is in its warm-up, all rows have W_O.
        """
        return {}

    def clusters_on(self, device: torch.device, num_heads: int) -> bool:
        """Whether :meth:`cluster_heads` runs on a device without a read of the host."""
        return False

    @abstractmethod
    def cluster_heads(
        self,
        layers: Sequence[int],
        num_clusters: Sequence[int],
        query: Tensor,
        key: Tensor,
        scaling: float,
        softcap: float | None = None,
        outputs: Tensor | None = None,
    ) -> list[HeadClusters]:
        """Cluster the heads of ``L`` layers, each into its number of clusters, by the warm-up tokens of each row.

        Query is ``[L, B, H, warmup_tokens, D]``, key ``[L, B, H_kv, warmup_tokens, D]``; the model's attention among
        them is that of :func:`chai.attention.attention_weights`. If :attr:`needs_outputs`, outputs are ``[L, B, H,
        warmup_tokens, D]``, the values of the heads as :class:`chai.patching.outputs.HeadOutputs` has them.
        """

    @abstractmethod
    def evict(self, layer: ClusteredLayer, clusters: HeadClusters) -> None:
        """Drop from the cache what is no longer read."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_map: KVHeadMap,
        scaling: float,
        mask: Tensor | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute the attention of tokens after the warm-up, ``[B, H, T, D]``.

        Arguments as in :func:`chai.attention.clustered_attention` with a map; if ``shares_values``, ``value`` has the
        stored KV heads alone.
        """


@contextmanager
def clustered(
    model: PreTrainedModel, steps: ClusteringSteps, num_clusters: tuple[int, ...]
) -> Iterator[PreTrainedModel]:
    """Run ``model`` with clustered heads inside the block; restored at its end, also after an exception.

    Raises:
        ValueError: The family is not supported, or a method is applied already.
    """
    check_family(model.config)
    requests = _Requests(steps, num_clusters, model)
    with ExitStack() as stack:
        stack.enter_context(replaced_outputs(model, steps.fitted_outputs, _is_clustered))
        stack.enter_context(patched(model, requests.forward))
        stack.enter_context(sliced_projections(model, _cache_layer))
        stack.enter_context(whole_call_frequencies(model))
        yield model


def new_clustered_cache(
    steps: ClusteringSteps, num_clusters: tuple[int, ...], config: PreTrainedConfig, reserve: int = 0
) -> ClusteredCache:
    """Build an empty cache for a model of this configuration."""
    num_heads, windows = config.num_attention_heads, sliding_windows(config)
    owner = (steps, num_clusters)
    return ClusteredCache.empty(owner, num_clusters, num_heads, num_kv_heads(config), windows, reserve)


class _Requests:
    """The decoder's forward under a clustering method."""

    def __init__(self, steps: ClusteringSteps, num_clusters: tuple[int, ...], model: PreTrainedModel) -> None:
        self.steps, self.num_clusters, self.config = steps, num_clusters, model.config
        self.shape = layer_shape(model, steps.shares_values)
        self.head_outputs = HeadOutputs(model) if steps.needs_outputs else None
        devices = layer_devices(model)
        self.on_cpu = all(device.type == "cpu" for device in devices)
        # With grouped queries, the host reads which KV heads to store.
        self.clusters_on_device = self.shape.num_kv_heads == self.shape.num_heads and all(
            steps.clusters_on(device, self.shape.num_heads) for device in devices
        )

    def forward(self, decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder on a cache of ours, one part of the tokens after the other.

        The caller gets the cache unless ``use_cache`` is false.
        """
        call = decoder.parse(args, kwargs)
        call.kwargs["past_key_values"], cache = adopt_cache(
            call.kwargs.get("past_key_values"),
            ClusteredCache,
            (self.steps, self.num_clusters),
            lambda: new_clustered_cache(self.steps, self.num_clusters, self.config),
            "clustered head attention",
        )
        state, padded = cache.state, call.has_padding
        if state.warmup is None:
            self.begin(cache, call)
        if len(state.warmup.count) != call.batch_size:
            raise ValueError(f"the cache holds {len(state.warmup.count)} sequences, this call has {call.batch_size}")
        with state.attach():
            if not state.is_clustered and not padded and cache.get_seq_length() == 0 and self.in_one_pass(cache, call):
                cache.expect_whole_prompt(self.steps.warmup_tokens)
            if state.is_clustered:
                with running(ClusteredPass(self.steps, self.num_clusters, cache, padded, self.head_outputs)):
                    return call.finish(decoder.forward(**call.kwargs))
            # Split the tokens wherever some row completes its warm-up.
            real, offset, outputs, begin = call.real_tokens(), cache.get_seq_length(), [], 0
            positions = call.positions(offset)
            for end in sorted({*state.warmup.ends(real), call.q_len}):
                done = state.warmup.clustered.nonzero()[:, 0]
                rows = done if len(done) else None
                new = None if state.is_clustered else state.warmup.add(real[:, begin:end], offset + begin)
                forward_pass = ClusteredPass(self.steps, self.num_clusters, cache, padded, self.head_outputs, new, rows)
                with running(forward_pass), part_of_positions(positions, begin, end):
                    outputs.append(decoder.forward(**call.part(begin, end)))
                self.cluster_complete_rows(cache)
                begin = end
        return call.finish(outputs[0] if len(outputs) == 1 else join_outputs(outputs))

    def begin(self, cache: ClusteredCache, call: DecoderCall) -> None:
        """Start a batch of requests; a method without warm-up clusters the heads at once."""
        state, layers = cache.state, cache.clustered_layers
        state.warmup = WarmupTokens.unseen(call.batch_size, self.steps.warmup_tokens, call.device)
        if not layers:
            state.is_clustered = True
        elif self.steps.warmup_tokens == 0:
            num_heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
            query = torch.empty(len(layers), call.batch_size, num_heads, 0, 1, device=call.device)
            key = torch.empty(len(layers), call.batch_size, kv_heads, 0, 1, device=call.device)
            self.cluster_rows(cache, ~state.warmup.clustered, query, key, None, 1.0)

    def in_one_pass(self, cache: ClusteredCache, call: DecoderCall) -> bool:
        """Whether a prompt is faster in one pass, in which each layer clusters its heads as the pass reaches it.

        All heads' Q and K are then projected, but there is no pass of the warm-up tokens alone. On an accelerator only
        if it clusters the heads itself: else every layer would wait for it.
        """
        rest = call.q_len - self.steps.warmup_tokens
        if self.steps.fitted_outputs:  # which are not those of the warm-up tokens
            return False
        if rest <= 0 or not (self.on_cpu or self.clusters_on_device):
            return False
        all_heads = self.shape.weights(self.shape.num_heads)
        saved = sum(all_heads - self.shape.weights(self.num_clusters[index]) for index in cache.clustered_layers)
        overhead = LAYER_OVERHEAD if self.on_cpu else LAYER_OVERHEAD_ON_GPU
        cost = len(cache.layers) * (overhead + WEIGHT_OVERHEAD * all_heads)
        return call.batch_size * rest * saved < cost

    def cluster_complete_rows(self, cache: ClusteredCache) -> None:
        """Cluster the heads of the rows that have just completed their warm-up."""
        state = cache.state
        if state.is_clustered:
            return
        rows = state.warmup.complete & ~state.warmup.clustered
        if bool(rows.any()):
            self.cluster_rows(cache, rows, *cache.warmup_inputs(rows, with_values=self.head_outputs is not None))

    def cluster_rows(
        self,
        cache: ClusteredCache,
        rows: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> None:
        """Cluster the heads of some rows in all layers; evict once all rows have their clusters."""
        layers = cache.clustered_layers
        outputs = None if self.head_outputs is None or value is None else self.head_outputs(list(layers), value)
        clusters = self.steps.cluster_heads(
            list(layers), [self.num_clusters[index] for index in layers], query, key, scaling, softcap, outputs
        )
        state = cache.state
        state.warmup.clustered = state.warmup.clustered | rows
        state.is_clustered, all_at_once = bool(state.warmup.clustered.all()), bool(rows.all())
        for layer, layer_clusters in zip(layers.values(), clusters, strict=True):
            if not all_at_once:
                layer_clusters = layer.set_row_clusters(rows, layer_clusters)
            if state.is_clustered:
                self.steps.evict(layer, layer_clusters)


@dataclass(frozen=True)
class ClusteredPass(ForwardPass):
    """One call of the decoder under a clustering method.

    Attributes:
        new_tokens: During warm-up, the warm-up tokens in this call (:meth:`WarmupTokens.add`).
        clustered_rows: During warm-up, long indices of the rows that have their clusters; ``None``: no row.
    """

    steps: ClusteringSteps
    num_clusters: tuple[int, ...]  # k of each layer
    cache: ClusteredCache  # of the call
    has_padding: bool  # some token may not see all tokens before it
    head_outputs: HeadOutputs | None = None  # if the clusters depend on the outputs of the heads
    new_tokens: tuple[Tensor, Tensor] | None = None
    clustered_rows: Tensor | None = None

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Compute one layer's attention by the phase of the layer, ``[B, T, H, D]``."""
        layer = cast(PrunedLayer, self.cache.layers[inputs.layer_idx])
        query, key, value, scaling, softcap = inputs.query, inputs.key, inputs.value, inputs.scaling, inputs.softcap
        causal = not self.has_padding and (layer.window is None or value.shape[2] <= layer.window)
        mask = None if causal else inputs.mask
        phase = layer.phase if isinstance(layer, ClusteredLayer) else None
        if isinstance(phase, WarmUp):
            assert isinstance(layer, ClusteredLayer)
            return self._warm_up(layer, phase, inputs, mask)
        if isinstance(phase, WholePrompt):
            assert isinstance(layer, ClusteredLayer)
            return self._cluster_and_attend(layer, inputs, mask)
        if query.shape[2] == 1 and query.dtype.itemsize == 2 and query.device.type == "cpu":
            key, value, mask = layer.padded(mask)
        if phase is None:  # k = H
            return mha_attention(query, key, value, scaling, mask, inputs.stock, softcap)
        representatives = phase.head_map.clusters.representatives
        if query.shape[1] != representatives.shape[1]:  # a model whose projections cannot be sliced
            query = take_heads(query, representatives)
        return self.steps.attend(query, key, value, phase.head_map, scaling, mask, softcap).transpose(1, 2)

    def _warm_up(self, layer: ClusteredLayer, phase: WarmUp, inputs: AttentionInputs, mask: Tensor | None) -> Tensor:
        """Attend with all heads, and collect the queries; rows that have their clusters use these already."""
        assert self.new_tokens is not None
        layer.collect_queries(inputs.query, *self.new_tokens, inputs.scaling, inputs.softcap)
        out = inputs.stock()
        if self.clustered_rows is None or phase.head_map is None:
            return out
        rows = self.clustered_rows.to(out.device)
        head_map = phase.head_map.map_tensors(lambda tensor: tensor[rows])
        row_mask = mask[rows] if mask is not None and len(mask) > 1 else mask
        query = take_heads(inputs.query[rows], head_map.clusters.representatives)
        key, value = inputs.key[rows], inputs.value[rows]
        clustered = self.steps.attend(query, key, value, head_map, inputs.scaling, row_mask, inputs.softcap)
        return out.index_copy(0, rows, clustered.transpose(1, 2))

    def _cluster_and_attend(self, layer: ClusteredLayer, inputs: AttentionInputs, mask: Tensor | None) -> Tensor:
        """Run a whole prompt through one layer: warm-up tokens with all heads, the others on the representatives."""
        tokens, scaling, softcap = self.steps.warmup_tokens, inputs.scaling, inputs.softcap
        query, key, value = (tensor[:, :, :tokens].contiguous() for tensor in (inputs.query, inputs.key, inputs.value))
        # Cluster, and evict.
        index = inputs.layer_idx
        counts = [self.num_clusters[index]]
        outputs = None if self.head_outputs is None else self.head_outputs([index], value[None])
        (clusters,) = self.steps.cluster_heads([index], counts, query[None], key[None], scaling, softcap, outputs)
        self.steps.evict(layer, clusters)
        assert isinstance(layer.phase, Clustered) and layer.keys is not None and layer.values is not None
        # Warm-up tokens.
        first_mask = None if mask is None else mask[:, :, :tokens, :tokens]
        warm_up = mha_attention(query, key, value, scaling, first_mask, softcap=softcap)
        # The other tokens.
        head_map = layer.phase.head_map
        query = take_heads(inputs.query[:, :, tokens:], head_map.clusters.representatives)
        rest_mask = None if mask is None else mask[:, :, tokens:]
        rest = self.steps.attend(query, layer.keys, layer.values, head_map, scaling, rest_mask, softcap)
        return torch.cat([warm_up, rest.transpose(1, 2)], 1)


def _cache_layer(index: int) -> PrunedLayer | None:
    forward_pass = current_pass()
    return forward_pass.cache.pruned_layers[index] if isinstance(forward_pass, ClusteredPass) else None


def _is_clustered(index: int) -> bool:
    """Whether all tokens of the running call run on the representatives in a layer."""
    layer = _cache_layer(index)
    return isinstance(layer, ClusteredLayer) and isinstance(layer.phase, Clustered)
