"""Time to first token against sequence length, beside every baseline, what arithmetic allows, and the paper's claim."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _latency
from analysis.figures._look import TIMES
from analysis.saved import Results

TITLE = "Time to first token against sequence length (paper, Figure 12a)"
EXPERIMENT = _latency.EXPERIMENT
COMMAND = _latency.COMMAND
CLAIM = _latency.Claim(1.73, 2048, f"paper: 1.73{TIMES} (LLaMA-7B, V100)")


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """The prefill phase."""
    return _latency.draw_latency(results, "prefill", "Time to first token", "clustering is part of the time", CLAIM)
