"""All that a run has measured as one table."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.ablations.observed import OBSERVED, PROPERTIES
from experiments.ablations.questions import EVERY_CORPUS, Choices
from experiments.ablations.saved import Saved
from experiments.ablations.stability import agreements
from experiments.ablations.texts import Text


def measured_rows(asked: dict[str, Choices], texts: list[Text], own: str, saved: Saved) -> pd.DataFrame:
    """Return a row for each question, choice, text and measure.

    Columns: ``question``, ``choice``, ``corpus``, ``text``, ``measure``, ``value``.
    """
    rows: list[tuple[str, str, str, int, str, float]] = []

    def add(question: str, choice: str, text: Text, measures: dict[str, float]) -> None:
        rows.extend((question, choice, text.corpus, text.number, name, value) for name, value in measures.items())

    for question, choices in asked.items():
        for choice, setting in choices.items():
            for text in texts:
                if text.corpus == own or question in EVERY_CORPUS:
                    add(question, choice, text, saved.values[setting.key][text.name])
    seen = [saved.values[OBSERVED][text.name] for text in texts]
    if "inputs" in asked:
        for text, values in zip(texts, seen, strict=True):
            add("inputs", "properties", text, {name: values[name] for name in PROPERTIES})
    if "stability" in asked:
        labels, whole = ([np.array(values[name]) for values in seen] for name in ("labels", "labels_whole"))
        for text, found in zip(texts, agreements(labels, whole, [text.corpus for text in texts]), strict=True):
            for name, value in found.items():
                add("stability", name, text, {"agreement": value})
    columns = ["question", "choice", "corpus", "text", "measure", "value"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys(("question", "choice", "corpus", "measure"), "category"))
