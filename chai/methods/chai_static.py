"""CHAI-static: counts and membership both from the offline phase (paper, section 3.3 and the tables' CHAI-static)."""

from __future__ import annotations

from dataclasses import dataclass, field

from chai.methods.static import Static


@dataclass
class ChaiStatic(Static):
    """CHAI without its online step: what it loses is what finding the membership for each request is worth.

    Layer by layer the number of clusters is the one that the elbow of the clustering error gives (section 3.2), and
    the membership is the clustering of all the corpus's samples (:class:`chai.methods.static.Static`).

    Attributes:
        clusters: not a setting: the profile's counts.
        profile: folder of the profile.

    Raises:
        ValueError: no profile, or none of a model of the same shape.
    """

    clusters: None = field(default=None, init=False)
