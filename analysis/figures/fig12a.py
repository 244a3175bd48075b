"""Time to first token against sequence length: every baseline, the theoretical speedup, and the paper's claim."""

from functools import partial

from analysis.plotting.latency import draw_latency
from analysis.results.benchmarks import LATENCY

NAME = "Time to first token"
TITLE = f"{NAME} against sequence length (paper, Figure 12a)"
QUERY = LATENCY
draw = partial(draw_latency, phase="prefill", title=NAME, note="clustering is part of the time", claim="first-token")
