"""Runs of the memory and latency experiments."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.results.runs import Results, Run, RunQuery

#: Interleaved rounds that a spread needs.
ENOUGH_ROUNDS = 9
#: Columns of the speedup's spread.
QUARTILES = ("speedup_p25", "speedup_p75")
FIELDS = ("heads_kept", "heads", "dtype", "batch_size", "versions")
MEMORY = RunQuery(
    "memory",
    columns=("method", "length", "cache_bytes", "formula_bytes"),
    fields=FIELDS,
    command="python run.py experiment=memory method=chai model=llama7b model.random_init=true",
)
LATENCY = RunQuery(
    "latency",
    columns=(
        "part", "phase", "length", "k", "implementation", "baseline", "ms", "ms_p25", "ms_p75", "rounds",
        "speedup", "best_baseline", "limit",
    ),
    fields=FIELDS,
    command="python run.py experiment=latency method=chai model=llama7b model.random_init=true",
)  # fmt: skip


def chai_memory(results: Results, query: RunQuery = MEMORY, dtypes: Sequence[str] = ()) -> Run:
    """Return the newest memory run of CHAI that measured MHA as well; in one of the dtypes, if any are given.

    Raises:
        MissingRun: there is no such run.
    """

    def usable(run: Run) -> bool:
        both = run.method == "chai" and {"mha", "chai"} <= set(run.table.method)
        return both and (not dtypes or run.result["dtype"] in dtypes)

    return results.newest(query, usable)


def times(run: Run, phase: str, part: str = "model", *, control: bool = False) -> pd.DataFrame:
    """Return a latency run's rows of ``prefill`` or ``decode``, of the whole model or of its ``attention`` alone.

    Rows of the control, the method with as many clusters as heads, only if ``control``. Runs of earlier versions have
    no control and no quartiles of the speedup, which are then empty.
    """
    table = run.table.assign(**{name: None for name in QUARTILES if name not in run.table})
    if "role" not in table:
        table = table.assign(role=table.baseline.map({True: "baseline", False: "method"}))
    return table[(table.part == part) & (table.phase == phase) & (control | (table.role != "control"))]


def describe_rounds(rounds: int) -> str:
    """Return e.g. ``9 rounds``; too few are marked."""
    return f"{rounds} round{'s' if rounds != 1 else ''}" + (" (too few)" if rounds < ENOUGH_ROUNDS else "")
