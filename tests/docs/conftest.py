"""What the walks through the pages need before the project is copied."""

from __future__ import annotations

import numpy as np
import pytest

from chai.clustering import kmeans
from chai.clustering.metrics import within_and_between


@pytest.fixture(scope="session")
def _compiled_kmeans():
    """Compile K-means here, unless that is done: each copy, and every other test, then has it compiled."""
    distances = kmeans.pairwise_distances(np.zeros((1, 2, 1), dtype=np.float32))
    kmeans.cluster(distances, np.array([1]), nearest=True)
    _, labels = kmeans.sweep(distances)
    within_and_between(distances, labels)
