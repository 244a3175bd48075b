"""Cache folders of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from chai.folders import cache_folder


@pytest.mark.parametrize(("value", "base"), [("/x/y", "/x/y"), ("", "/own/.cache"), ("here", "/own/.cache")])
def test_the_cache_is_below_xdg_cache_home_if_that_is_absolute(monkeypatch, value, base):
    monkeypatch.setenv("HOME", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder("lm_eval") == Path(base) / "chai-attention" / "lm_eval"
