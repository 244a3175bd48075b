"""Correlation of heads by layer, mean over samples."""

from functools import partial

from analysis.plotting.correlation import draw_layers
from analysis.results.profiles import PROFILE

TITLE = "Correlation of heads by layer, mean over samples (paper, Figure 6)"
QUERY = PROFILE
draw = partial(draw_layers, title=TITLE, one_sample=False)
