"""Attention of the heads in every layer; the paper's is of OPT-66B."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _maps, _profile
from analysis.saved import Results

TITLE = "Attention of all layers (paper, Figure 15)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND_OPT


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """A small map for each layer."""
    return _maps.draw_layers(results, TITLE, _profile.OPT)
