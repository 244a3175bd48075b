"""How alike heads attend, by layer: one sample."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _correlation, _profile
from analysis.saved import Results

TITLE = "Correlation of heads by layer, one sample (paper, Figure 7)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Heat maps of four layers and the mean of every layer."""
    return _correlation.draw_layers(results, TITLE, sample=0)
