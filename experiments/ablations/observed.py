"""What is seen of a text under multi-head attention: properties that may explain a loss, and clusters of its heads."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chai.attention import attention_weights
from chai.clustering.assignment import feature_distances
from chai.clustering.distances import squared_distances
from chai.clustering.features import attention_features
from chai.clustering.kmeans import cluster
from chai.heads import repeat_kv
from chai.patching.apply import AttentionInputs, ForwardPass
from experiments.ablations.settings import PAPER_TOKENS

#: Key under which this is saved.
OBSERVED = "observed"
#: Evenly spread query tokens whose attention is looked at.
ROWS = 64
#: Properties of a text, by name: what they are.
PROPERTIES = {
    "first_token": "attention on the first token",
    "entropy": "entropy of the attention",
    "loss_mha": "loss under MHA",
    "digits": "share of digits",
    "punctuation": "share of punctuation",
    "distinct": "share of distinct tokens",
}


class ObservedPass(ForwardPass):
    """Multi-head attention, whose maps are summarized layer by layer.

    Attributes:
        first_token: Of each layer, the share of the attention on the first token, ``[B]``.
        entropy: The same of the entropy, relative to that of uniform attention.
        labels: Clusters by the paper's features (first tokens), ``[B, H]`` of each layer.
        labels_whole: Clusters by the attention of :data:`ROWS` tokens of the whole text.
    """

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self.first_token: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.labels: list[np.ndarray] = []
        self.labels_whole: list[np.ndarray] = []

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Compute one layer's attention, ``[B, T, H, D]``."""
        num_heads, q_len = inputs.query.shape[1], inputs.query.shape[2]
        query, key = inputs.query.float(), repeat_kv(inputs.key.float(), num_heads)
        rows = torch.linspace(1, q_len - 1, min(ROWS, q_len - 1)).long().to(query.device)
        mask = rows[:, None] >= torch.arange(q_len, device=query.device)
        mask = mask[None, None] if inputs.mask is None else inputs.mask[:, :, rows]
        weights = attention_weights(query[:, :, rows], key, inputs.scaling, mask, inputs.softcap)
        self.first_token.append(weights[..., 0].mean((1, 2)))
        self.entropy.append((torch.special.entr(weights).sum(-1) / (rows + 1).log()).mean((1, 2)))
        first = slice(0, PAPER_TOKENS)
        features = attention_features(query[:, :, first], key[:, :, first], inputs.scaling, softcap=inputs.softcap)
        for distances, labels in (
            (feature_distances(features[None])[0], self.labels),
            (squared_distances(weights.flatten(2)), self.labels_whole),
        ):
            counts = np.full(len(distances), self.clusters)
            labels.append(cluster(distances.cpu().numpy(), counts, nearest=True)[0])
        return inputs.stock()

    def summary(self, losses: Tensor, texts: list[str], ids: Tensor) -> list[dict[str, Any]]:
        """Return, of each text, the values of :data:`PROPERTIES` and the clusters of all layers."""
        first_token, entropy = (torch.stack(values).mean(0).tolist() for values in (self.first_token, self.entropy))
        return [
            {
                "first_token": first_token[row],
                "entropy": entropy[row],
                "loss_mha": float(losses[row].mean()),
                "digits": _share(text, string.digits),
                "punctuation": _share(text, string.punctuation),
                "distinct": len(ids[row].unique()) / ids.shape[1],
                "labels": [layer[row].tolist() for layer in self.labels],
                "labels_whole": [layer[row].tolist() for layer in self.labels_whole],
            }
            for row, text in enumerate(texts)
        ]


def _share(text: str, characters: str) -> float:
    return sum(character in characters for character in text) / max(1, len(text))
