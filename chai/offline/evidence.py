"""How much the corpus counts against the first tokens of a request, in choosing the request's clusters.

Of some samples of the offline phase, the errors of the output are kept for their first n tokens and for all of them.
For each layer, the weight p of the corpus (in tokens) is that with which clusters from the first n tokens lose least on
the rest of the samples, each sample left out of the corpus' mean in its turn:

    cost_i(p) = (p E_-i + e_i[:n]) / (p + n),     loss(p) = mean_i sum_h e_i[n:]_h,r(h; p)

An infinite p is the map of the corpus alone. It stays unless another p is better by two standard errors of the mean.
"""

from __future__ import annotations

import numpy as np

from chai.clustering.medoids import medoid_clusters

#: Numbers of first tokens whose errors are kept.
EVIDENCE_TOKENS = (5, 16, 32, 64)
#: Weights of the corpus that are tried, in tokens.
PRIORS = (0.0, 4.0, 16.0, 64.0, 256.0, 1024.0, np.inf)


def choose_prior(
    early: np.ndarray, whole: np.ndarray, lengths: np.ndarray, corpus: np.ndarray, corpus_tokens: float, k: int, n: int
) -> float:
    """Return the weight of the corpus in tokens; infinite where a request's first tokens do not help.

    Args:
        early: ``[N, H, H]``, sums of the errors over the first n tokens of each sample.
        whole: ``[N, H, H]``, over all its tokens.
        lengths: ``[N]``, tokens of the samples.
        corpus: ``[H, H]``, sum over the corpus, these samples included.
        corpus_tokens: Its tokens.
        k: Number of clusters.
        n: Tokens of ``early``.
    """
    longer = lengths > n
    if longer.sum() < 2 or corpus_tokens <= lengths.max():
        return np.inf
    early, whole, lengths = early[longer], whole[longer], lengths[longer]
    others = (corpus - whole) / (corpus_tokens - lengths)[:, None, None]
    rest, heads = whole - early, np.arange(early.shape[1])
    losses = []
    for prior in PRIORS:
        cost = others if np.isinf(prior) else (prior * others + early) / (prior + n)
        labels, representatives = medoid_clusters(cost.astype(np.float32), np.full(len(cost), k))
        chosen = np.take_along_axis(representatives, labels, 1)
        losses.append(rest[np.arange(len(rest))[:, None], heads, chosen].sum(1))
    # The map of the corpus, unless another one is clearly better.
    gains = losses[-1] - np.array(losses[:-1])
    means, errors = gains.mean(1), gains.std(1, ddof=1) / np.sqrt(gains.shape[1])
    best = int(means.argmax())
    return PRIORS[best] if means[best] > 2 * errors[best] else np.inf
