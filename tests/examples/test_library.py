"""The library example as a user runs it: it generates, says what was saved, and leaves a picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SCRIPT = REPOSITORY / "examples" / "library.py"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    own = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=120)


def test_it_generates_counts_bytes_and_draws(tmp_path):
    done = run("--out", "own/picture.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text, saved, path = done.stdout.strip().splitlines()
    assert text.startswith("ben will wash") and len(text.split()) >= len("ben will wash".split()) + 8
    held, full, share = re.fullmatch(r"KV cache: ([\d,]+) bytes instead of ([\d,]+), ([\d.]+)% saved", saved).groups()  # type: ignore[union-attr]
    held, full = (int(number.replace(",", "")) for number in (held, full))
    kept = (8 + 6 + 4 + 4) / 64  # keys; all values stay
    assert held / full == (1 + kept) / 2
    assert float(share) == round(100 * (1 - held / full), 1)
    assert path == "own/picture.png"
    picture = matplotlib.image.imread(tmp_path / path)
    assert picture.shape[1] > picture.shape[0] > 100
    assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3)}) > 10  # not blank


def test_it_uses_the_library_alone():
    """No configuration, no harness, no results: `chai`, transformers and a plot."""
    imported = set(re.findall(r"^(?:from|import) (\w+)", SCRIPT.read_text(), re.MULTILINE))
    assert imported <= {"__future__", "argparse", "pathlib", "matplotlib", "transformers", "chai"}
