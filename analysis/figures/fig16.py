"""Attention of the heads in every layer; the paper's is of LLaMA-7B."""

from functools import partial

from analysis.plotting.maps import draw_layers
from analysis.plotting.page import LLAMA
from analysis.results.profiles import PROFILE

TITLE = "Attention of all layers (paper, Figure 16)"
QUERY = PROFILE
draw = partial(draw_layers, title=TITLE, model=LLAMA)
