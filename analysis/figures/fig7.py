"""Correlation of heads by layer, one sample."""

from functools import partial

from analysis.plotting.correlation import draw_layers
from analysis.results.profiles import PROFILE

TITLE = "Correlation of heads by layer, one sample (paper, Figure 7)"
QUERY = PROFILE
draw = partial(draw_layers, title=TITLE, one_sample=True)
