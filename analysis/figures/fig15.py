"""Attention of the heads in every layer; the paper's is of OPT-66B."""

from dataclasses import replace
from functools import partial

from analysis.plotting.maps import draw_layers
from analysis.plotting.page import OPT
from analysis.results.profiles import PROFILE

TITLE = "Attention of all layers (paper, Figure 15)"
QUERY = replace(PROFILE, command=f"python run.py experiment=profile model={OPT} corpus=c4")
draw = partial(draw_layers, title=TITLE, model=OPT)
