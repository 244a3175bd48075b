"""CHAI-static: counts and clusters both from the offline phase (paper, Section 3.3 and the tables' CHAI-static)."""

from __future__ import annotations

from dataclasses import dataclass, field

from chai.methods.static import Static


@dataclass
class ChaiStatic(Static):
    """CHAI without its online step: the difference to CHAI is what clustering per request is worth.

    The number of clusters of each layer is the elbow of the clustering error (Section 3.2), and the clusters are those
    of all samples of the corpus (:class:`chai.methods.static.Static`).

    Attributes:
        clusters: Not a setting: the counts of the head profile.
        profile: Folder of the head profile.

    Raises:
        ValueError: The head profile is missing, or of a model of another shape.
    """

    clusters: None = field(default=None, init=False)
