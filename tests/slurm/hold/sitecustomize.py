"""Imported by Python at its start where the tests put this folder on the path: holds runs at a known point.

A run whose name (``method-task``) is a file in ``CHAI_TEST_HOLD`` stops there, just after its status says running, as
long as the file is there, and leaves ``NAME.held`` with its process id. So tests can kill it without a race.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def _hold(event: str, arguments: tuple[object, ...]) -> None:
    if event != "os.rename" or not str(arguments[1]).endswith("/config.yaml"):
        return
    _, _, _, method, task, _, _ = Path(str(arguments[1])).absolute().parts[-7:]
    mark = Path(os.environ["CHAI_TEST_HOLD"], f"{method}-{task}")
    if mark.exists():
        mark.with_suffix(".held").write_text(str(os.getpid()))
    while mark.exists():
        time.sleep(0.05)


if "CHAI_TEST_HOLD" in os.environ:
    sys.addaudithook(_hold)
