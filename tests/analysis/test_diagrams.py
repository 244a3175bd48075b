"""The diagrams: no word of the method's leaves the picture or overlaps another; both are written where asked."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import pytest

from analysis import diagrams


@pytest.fixture
def boxes():
    """Extents of all texts, in pixels, and of the figure."""
    figure = diagrams.method()
    figure.canvas.draw()
    drawn = [
        (text.get_text(), text.get_window_extent()) for axes in figure.axes for text in axes.texts if text.get_text()
    ]
    yield drawn, figure.bbox
    plt.close(figure)


def test_no_word_leaves_the_picture_or_meets_another(boxes):
    drawn, whole = boxes
    assert len(drawn) > 50
    for text, box in drawn:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
    for (one, first), (two, second) in itertools.combinations(drawn, 2):
        assert not first.overlaps(second), (one, two)


def test_it_is_written_the_same_each_time(tmp_path):
    written = []
    for name in ("a.svg", "b.svg"):
        diagrams.main(["method", "--out", str(tmp_path / name)])
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert b"<text" not in written[0]  # outlines: no font of the reader's can make them wider
