"""Time to next token against sequence length: every baseline, the theoretical speedup, and the paper's claim."""

from functools import partial

from analysis.plotting.latency import draw_latency
from analysis.results.benchmarks import LATENCY

NAME = "Time to next token"
TITLE = f"{NAME} against sequence length (paper, Figure 12b)"
QUERY = LATENCY
draw = partial(
    draw_latency,
    phase="decode",
    title=NAME,
    note="clustering is not part of the time, as in the paper",
    claim="next-token",
)
