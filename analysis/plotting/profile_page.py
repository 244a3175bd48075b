"""The page of a figure of one or several profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import page
from analysis.plotting.style import label, plural
from analysis.results.profiles import Profile
from analysis.results.runs import base_name

LLAMA, OPT = "llama7b", "opt66b"  # the models of the paper's figures
COUNTED = "Layers and heads are counted from 0."


def finish(figure: Figure, profiles: Sequence[Profile], notes: str, paper: Sequence[str] = (LLAMA,)) -> None:
    """Add the footer: notes, the models of the paper's figure if others are drawn, the source of each profile."""
    words = page.wrap(f"{notes} {other_model(profiles, paper)}".strip())
    page.footer(figure, [*words, *map(provenance, profiles)])


def other_model(profiles: Sequence[Profile], paper: Sequence[str]) -> str:
    """Return a sentence that names the models of the paper's figure; empty if they were drawn."""
    models = {base_name(profile.run.model) for profile in profiles}
    return "" if models >= set(paper) else f"The paper's figure is of {' and '.join(map(label, paper))}."


def provenance(profile: Profile) -> str:
    """Return device, dtype, corpus and run."""
    corpus, samples = profile.about["corpus"], plural(profile.samples, "sample")
    return page.provenance(profile.run, f"{corpus['name']}, {samples} of up to {corpus['longest']:,} tokens")


def rows(profile: Profile, **columns: Any) -> pd.DataFrame:
    """Return plotted data with model and run; scalars are repeated in every row."""
    frame = pd.DataFrame(columns)
    return frame.assign(model=profile.run.model, run=profile.run.result["run_id"])
