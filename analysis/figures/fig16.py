"""Attention of the heads in every layer; the paper's is of LLaMA-7B."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _maps, _profile
from analysis.saved import Results

TITLE = "Attention of all layers (paper, Figure 16)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """A small map for each layer."""
    return _maps.draw_layers(results, TITLE, _profile.LLAMA)
