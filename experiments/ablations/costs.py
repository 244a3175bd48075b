"""Errors of the output of all pairs of heads over a corpus, of which static maps are made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from chai.clustering.distances import head_costs
from chai.clustering.features import attention_features
from chai.heads import repeat_kv
from chai.patching.apply import AttentionInputs, capture
from chai.patching.devices import input_device
from chai.patching.outputs import HeadOutputs

BATCH = 16


@torch.inference_mode()
def output_costs(
    model: PreTrainedModel,
    rows: Iterator[list[int]],
    counts: list[int],
    progress: Callable[[int], object] = lambda done: None,
) -> dict[int, np.ndarray]:
    """Average the errors of the output (:func:`chai.clustering.distances.output`) over the first n texts.

    Args:
        model: Of a supported family.
        rows: Token ids of texts of the same length.
        counts: Each n; those beyond the number of texts are left out.
        progress: Called with the number of texts seen so far.

    Returns:
        For each n: ``[L, H, H]``, mean over the texts.
    """
    outputs, layers = HeadOutputs(model), model.config.num_hidden_layers
    heads = model.config.num_attention_heads
    sums, seen = np.zeros((layers, heads, heads)), 0
    found: dict[int, np.ndarray] = {}

    def add(inputs: AttentionInputs) -> None:
        key = repeat_kv(inputs.key, heads)
        features = attention_features(inputs.query, key, inputs.scaling, softcap=inputs.softcap)
        weights = features.unflatten(-1, (inputs.query.shape[2], -1))
        cost = head_costs("output", weights, outputs([inputs.layer_idx], inputs.value[None])[0])
        sums[inputs.layer_idx] += cost.sum(0, dtype=torch.float64).cpu().numpy()

    for goal in sorted(counts):
        while seen < goal:
            batch = list(itertools.islice(rows, min(BATCH, goal - seen)))
            if not batch:
                return found
            with capture(model, add):
                model.get_decoder()(torch.tensor(batch, device=input_device(model)), use_cache=False)
            seen += len(batch)
            progress(seen)
        found[goal] = sums / seen
    return found
