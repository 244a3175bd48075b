"""CHAI by the error of the layer's output: a map from the offline phase, which a request's own tokens may correct.

Beyond the paper; docs/findings.md has what it is worth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from chai.clustering.assignment import clusters_by_cost
from chai.clustering.distances import METRICS, Metric, head_costs
from chai.clustering.features import attention_features
from chai.errors import ChaiError
from chai.heads import HeadClusters, repeat_kv
from chai.methods.base import Method
from chai.methods.chai import Chai, ClusteredHeadAttention
from chai.methods.random_heads import Random
from chai.offline.refit import load_fitted
from chai.patching.model_info import num_kv_heads


@dataclass
class ChaiOutput(ClusteredHeadAttention):
    """Heads are grouped by what the layer's output loses: ``e_hr = |(A_r - A_h) V_h W_O,h|^2`` for head h and r.

    Offline, ``E_hr`` is the mean of ``e_hr`` per token over a corpus, and the number of clusters of each layer follows
    from the measured sensitivity of the model's next-token distribution (``profile.rule=sensitivity``). The
    representatives and clusters of a layer are the k-medoids of E; where the profile has the products of the errors,
    heads then join the cluster with which the error of all heads together is least
    (:func:`chai.clustering.medoids.refine_jointly`).

    A request may correct this map. With the sum ``e_hr`` over its n warm-up tokens, the costs are

        (p E_hr + e_hr) / (p + n),

    the mean of p tokens of the corpus and n of the request. The request's errors of different heads count as
    uncorrelated. Without p (``prior=null``) the map is that of the corpus. With ``prior=measured``, each layer has the
    p with which clusters from the first n tokens lost least on the rest of the texts of the offline phase, if any p did
    better than the map (:mod:`chai.offline.evidence`).

    Attributes:
        clusters: k of each layer; by default those of the head profile.
        seed: Not a setting (nothing is random).
        profile: Folder of a head profile with ``profile.metrics=[output]``.
        tokens: Warm-up tokens, which run with all heads.
        prior: p, the number of tokens that the corpus counts as; ``measured``: that of each layer; ``None``: no
            correction.
        metric: Distance between heads of the static map; corrections need ``output``.
        refit: Use the output projections that the profile has fitted to its clusters (:mod:`chai.offline.refit`), a
            copy of W_O of each clustered layer in memory.
        group_aware: Choose representatives that read as few KV heads as k of them can, so that whole KV heads leave the
            cache; ``None``: as the head profile's counts were chosen.

    Raises:
        ChaiError: The head profile is missing, or does not have the metric.
        ValueError: A value outside its choices.
    """

    given_counts_first: ClassVar[bool] = True

    seed: int = field(default=0, init=False)
    tokens: int = 5
    prior: float | Literal["measured"] | None = None
    metric: Metric = "output"
    refit: bool = False
    group_aware: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._profile is None:
            raise ChaiError("a head profile of this model is needed", remedy="make_output_profile")
        if self.metric not in METRICS:
            raise ValueError(f"metric is '{self.metric}'; valid: {', '.join(METRICS)}")
        self._profile.costs(self.metric)
        if self.tokens < 0:
            raise ValueError(f"tokens is {self.tokens}; valid: 0 or more")
        if self.prior not in (None, "measured") and not (isinstance(self.prior, (int, float)) and self.prior >= 0):
            raise ValueError(f"prior is {self.prior}; valid: 0 or more, measured, or null")
        if self.prior is not None and (self.metric != "output" or self.tokens == 0):
            raise ValueError("prior weighs errors of the output of first tokens; valid: metric=output, tokens >= 1")
        if self.refit:
            self._check_refit()
        if self.prior == "measured":
            self._profile.prior(0, 1, self.tokens)

    def _check_refit(self) -> None:
        """Refuse clusters other than those that the output projections are fitted to."""
        assert self._profile is not None and self.profile is not None
        fit = self._profile.about.get("refit")
        if fit is None:
            raise ValueError("refit needs a profile with fitted output projections (profile.refit_texts=N)")
        used = {
            "clusters": self.clusters, "prior": self.prior, "metric": self.metric, "tokens": self.tokens,
            "group_aware": self._is_group_aware,
        }  # fmt: skip
        fitted = {
            "clusters": None, "prior": None, "metric": fit["metric"], "tokens": fit["exact_tokens"],
            "group_aware": fit["group_aware"],
        }  # fmt: skip
        for name, value in used.items():
            if value != fitted[name]:
                valid = "null" if fitted[name] is None else fitted[name]
                raise ValueError(f"{name} is {value}; valid with refit: {valid}, to which the profile is fitted")
        self._fitted = load_fitted(self.profile, fit["sha256"])

    @property
    def fitted_outputs(self) -> Mapping[int, Tensor]:
        """Output projections of the profile, for tokens after the warm-up."""
        return self._fitted if self.refit else {}

    @property
    def warmup_tokens(self) -> int:
        """Tokens that run with all heads."""
        return self.tokens

    @property
    def needs_outputs(self) -> bool:
        """Whether the request's own tokens count."""
        return self.prior is not None

    def with_num_clusters(self, k: int) -> Method:
        """Return a method with as many tokens and heads: a profile covers only the layers of its own model."""
        if self.tokens == 0:
            return Random(clusters=k)
        group_aware, by_output = self._is_group_aware, self.prior is not None
        stand_in = Chai(clusters=k, tokens=self.tokens, group_aware=group_aware)
        return dataclasses.replace(stand_in, metric="output", membership="kmedoids") if by_output else stand_in

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
        """Return the map of the corpus, or its correction by the request's warm-up tokens."""
        assert self._profile is not None
        kv_heads = key.shape[2] if self._is_group_aware else None
        batch_size, num_heads, tokens = query.shape[1:4]
        pairs = list(zip(layers, num_clusters, strict=True))
        found = [
            self._profile.clusters(layer, k, self.metric, kv_heads).repeat(batch_size, query.device)
            for layer, k in pairs
        ]
        # Layers in which the request's own tokens count.
        corrected = [place for place, (layer, k) in enumerate(pairs) if np.isfinite(self._prior(layer, k))]
        if corrected:
            assert outputs is not None
            own_query, own_key = query[corrected], repeat_kv(key[corrected], num_heads, dim=2)
            weights = attention_features(own_query, own_key, scaling, softcap=softcap).unflatten(-1, (tokens, tokens))
            own = head_costs("output", weights, outputs[corrected])  # [L, B, H, H]
            chosen = [pairs[place] for place in corrected]
            cost, joint = self._weigh(chosen, own, tokens), self._joint_products(chosen, own)
            counts = [k for _, k in chosen]
            clusters = clusters_by_cost(cost, counts, "kmedoids", kv_heads=kv_heads, gram=joint)
            for place, own_clusters in zip(corrected, clusters, strict=True):
                found[place] = own_clusters
        return found

    def _weigh(self, pairs: Sequence[tuple[int, int]], own: Tensor, tokens: int) -> Tensor:
        """Return ``(p E + e) / (p + n)`` of some layers, each given with its k; ``own [L, B, H, H]`` is e."""
        assert self._profile is not None
        per_token = self._profile.costs("output")[[layer for layer, _ in pairs]] / self._profile.mean_tokens
        corpus = torch.from_numpy(per_token).to(own.device)[:, None]
        prior = torch.tensor([self._prior(*pair) for pair in pairs], device=own.device)[:, None, None, None]
        return (prior * corpus + own) / (prior + tokens)

    def _joint_products(self, pairs: Sequence[tuple[int, int]], own: Tensor) -> Iterator[np.ndarray | None] | None:
        """Yield ``[H * H, H * H]`` for each layer and row: p tokens of the corpus and the request's errors.

        ``None`` where p is 0: the request's own errors of different heads count as uncorrelated.
        """
        assert self._profile is not None
        gram, priors = self._profile.gram, [self._prior(*pair) for pair in pairs]
        if gram is None:
            return None
        return (
            prior / self._profile.mean_tokens * gram[layer] + np.diag(errors.ravel()) if prior else None
            for (layer, _), prior, rows in zip(pairs, priors, own.cpu().numpy(), strict=True)
            for errors in rows
        )

    def _prior(self, layer: int, k: int) -> float:
        """Return p of a layer; infinite: the map of the corpus."""
        if self.prior is None:
            return np.inf
        assert self._profile is not None
        return self._profile.prior(layer, k, self.tokens) if self.prior == "measured" else float(self.prior)

    @property
    def _is_group_aware(self) -> bool:
        assert self._profile is not None
        if self.group_aware is not None:
            return self.group_aware
        return bool((self._profile.about.get("sensitivity") or {}).get("group_aware"))

    def note(self, config: PreTrainedConfig) -> str:
        """Return whether keys leave the cache of a grouped-query model."""
        if num_kv_heads(config) == config.num_attention_heads or self._is_group_aware:
            return ""
        return "grouped queries: keys stay in the cache while a representative reads them (group_aware=true drops some)"
