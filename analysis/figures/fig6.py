"""How alike heads attend, by layer: mean over samples."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _correlation, _profile
from analysis.saved import Results

TITLE = "Correlation of heads by layer, mean over samples (paper, Figure 6)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Heat maps of four layers and the mean of every layer."""
    return _correlation.draw_layers(results, TITLE, sample=None)
