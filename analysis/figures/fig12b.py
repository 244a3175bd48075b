"""Time to next token against sequence length, beside every baseline, what arithmetic allows, and the paper's claim."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _latency
from analysis.figures._look import TIMES
from analysis.saved import Results

TITLE = "Time to next token against sequence length (paper, Figure 12b)"
EXPERIMENT = _latency.EXPERIMENT
COMMAND = _latency.COMMAND
CLAIM = _latency.Claim(5.0, 2048, f"paper: 5{TIMES} (LLaMA-7B, V100)")


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """The decode phase."""
    note = "clustering is not part of the time, as in the paper"
    return _latency.draw_latency(results, "decode", "Time to next token", note, CLAIM)
