"""Settings of the offline phase: ``profile.*``, see conf/experiment/profile.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chai.clustering.distances import METRICS, Metric
from chai.offline.head_statistics import Features
from experiments.runs.experiment import require_minimum

WARMUP_TOKENS = 5  # after which CHAI clusters (paper, section 3.3)
SENSITIVITY_TEXTS = 8  # on which the sensitivity is measured, unless another number is given
RuleName = Literal["plateau", "knee", "sensitivity"]
Budget = Literal["heads", "kv_bytes", "kl"]
#: Options that are applied to the statistics: changing them needs no other pass over the corpus.
RULE_OPTIONS = (
    "combine", "rule", "tolerance", "saving", "error", "budget", "heads", "kl", "metric", "sensitivity_texts",
    "sensitivity_tokens", "refit_texts",
)  # fmt: skip


@dataclass
class Options:
    """``profile.*``: see conf/experiment/profile.yaml."""

    samples: int
    tokens: int
    features: Features
    combine: Literal["per_sample", "concatenated", "averaged"]
    rule: RuleName
    tolerance: float
    budget: Budget
    heads: float | None
    saving: float
    kl: float
    metrics: list[Metric] | None
    metric: Metric
    sensitivity_texts: int | None
    sensitivity_tokens: int
    refit_texts: int | None
    kept: int
    map_tokens: int
    history: int
    history_samples: int

    def __post_init__(self) -> None:
        require_minimum(self, samples=1, kept=1, map_tokens=2, history_samples=1, history=WARMUP_TOKENS + 1)
        if self.tokens < self.history:
            raise ValueError(f"tokens is {self.tokens}; valid: {self.history} (history) or more")
        for name, maximum in {"tolerance": 1.0, "saving": 0.5}.items():
            if not 0 < getattr(self, name) < maximum:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: between 0 and {maximum:g}")
        if self.kl <= 0:
            raise ValueError(f"kl is {self.kl}; valid: above 0")
        if self.sensitivity_texts is None:
            self.sensitivity_texts = SENSITIVITY_TEXTS if self.rule == "sensitivity" else 0
        if self.rule == "sensitivity":
            require_minimum(self, sensitivity_texts=1)
            if self.budget == "heads" and self.heads is None:
                raise ValueError("budget=heads needs the mean number of heads to compute: profile.heads=N")
        require_minimum(self, sensitivity_texts=0, sensitivity_tokens=WARMUP_TOKENS + 1)
        if self.refit_texts is not None:
            require_minimum(self, refit_texts=1)
        wrong = [name for name in self.metrics or () if name not in METRICS]
        if wrong:
            raise ValueError(f"metrics has '{wrong[0]}'; valid: {', '.join(METRICS)}")
        if self.combine == "averaged" and self.features != "last_row":
            raise ValueError("combine=averaged needs features=last_row: causal matrices are too large to keep")

    @property
    def gathered(self) -> tuple[Metric, ...]:
        """Metrics to gather besides the attention's distances, in a fixed order."""
        needed = self.sensitivity_texts or self.refit_texts
        asked = {*(self.metrics or ()), *([self.metric] if needed else ())}
        return tuple(metric for metric in METRICS if metric in asked and metric != "attention")
