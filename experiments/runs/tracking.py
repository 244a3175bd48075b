"""``logger=wandb``: what a run leaves behind, shown in Weights & Biases as well.

Nothing that happens there is a reason for a run to fail. So it happens at a run's end, in a process of its own (this
module as a program), which reads the run's folder and is ended when it takes too long: a tracker that is missing,
crashes or hangs costs one line. A run is the same one there whenever it is started again, by its run id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from netrc import NetrcParseError, netrc
from pathlib import Path
from socket import create_connection
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from experiments.config.schema import REPOSITORY
from experiments.runs.folder import RunFolder, read_json
from experiments.system.console import say

ROWS = 10_000  # of a table that are shown; the whole file is among the artefacts
LARGEST = 100 << 20  # bytes of a file that still becomes part of the artefact
SHOWN = (".json", ".yaml", ".parquet", ".csv", ".png", ".pdf", ".svg", ".md")  # no weights, no checkpoints
REACH = 3.0  # seconds to find out whether the server can be reached


def track(folder: RunFolder) -> None:
    """Show a run that has just ended, if its configuration says so; one line tells where, or why not."""
    logger = folder.config.logger
    if logger.name != "wandb":
        return
    try:
        told = _in_a_process(folder.path, logger)
    except Exception as error:  # whatever it was, the run itself is over and fine
        told = f"not tracked: {type(error).__name__}: {error}"
    say(f"logger=wandb: {told}")


def _in_a_process(path: Path, logger: DictConfig) -> str:
    """Let this module show a folder; returns the one line about it."""
    settings = json.dumps({**OmegaConf.to_container(logger, resolve=True), "dir": str(path.parents[4].resolve())})  # type: ignore[dict-item]
    command = [sys.executable, "-m", "experiments.runs.tracking", str(path.resolve()), settings]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # whatever it starts in turn ends with it
    )
    try:
        out, errors = process.communicate(timeout=logger.timeout)
    except subprocess.TimeoutExpired:
        return f"not tracked: no answer for {logger.timeout:g} seconds (logger.timeout)"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    lines = [line for line in (out if process.returncode == 0 else errors).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit code {process.returncode}"
    return last if process.returncode == 0 else f"not tracked: {last}"


def choose_mode(asked: str | None) -> str:
    """``online`` or ``offline``: as asked, as ``WANDB_MODE`` says, or by whether there are a key and a server."""
    chosen = asked or os.environ.get("WANDB_MODE")
    if chosen:
        return chosen
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        known = "WANDB_API_KEY" in os.environ or netrc().authenticators(server.hostname or "") is not None
        if not known:
            return "offline"
        create_connection((server.hostname, server.port or 443), timeout=REACH).close()
        return "online"
    except (OSError, NetrcParseError):
        return "offline"


def flatten(value: Any, prefix: str = "") -> dict[str, float]:
    """The numbers in nested dictionaries, by paths: ``savings/kv_bytes``."""
    if isinstance(value, dict):
        parts = (flatten(inner, f"{prefix}/{key}" if prefix else str(key)) for key, inner in value.items())
        return {name: number for part in parts for name, number in part.items()}
    return {prefix: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else {}


def show(path: Path, settings: dict[str, Any]) -> str:
    """Show a run's folder.

    Args:
        path: of the folder.
        settings: ``logger.*`` of its configuration, and ``dir``, under which the tracker keeps its own files.

    Returns:
        one line: where it is shown.
    """
    import pandas as pd

    own = Path(settings["dir"]) / "wandb"
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(own / ".cache"))
    import wandb

    config: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    status, result = read_json(path / "status.json") or {}, read_json(path / "result.json") or {}
    names = {kind: config[kind]["name"] for kind in ("experiment", "method", "model", "task")}
    mode = choose_mode(settings["mode"])
    own.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        job_type=names["experiment"],
        tags=sorted({name[:64] for name in names.values()}),
        id=path.name,
        name=path.name,
        resume="allow",
        mode=mode,
        dir=settings["dir"],
        config=config,
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
    )
    run.summary.update({"state": status.get("state"), "error": status.get("error"), **flatten(result)})
    artefact = wandb.Artifact(f"{names['experiment']}-{path.name}", "run", metadata=names)
    for file in sorted(path.rglob("*")):
        if not file.is_file() or file.suffix not in SHOWN or file.stat().st_size > LARGEST:
            continue
        place = file.relative_to(path)
        artefact.add_file(str(file), str(place))
        if file.suffix == ".png":
            run.log({str(place): wandb.Image(str(file))})
        if file.suffix == ".parquet":
            frame = pd.read_parquet(file).head(ROWS)
            for column in frame.select_dtypes(object):  # lists, which tables don't show
                frame[column] = frame[column].map(str)
            run.log({place.stem: wandb.Table(dataframe=frame)})
    run.log_artifact(artefact)
    where = run.url if mode == "online" else f"offline, `wandb sync {Path(run.dir).parent}` sends it"
    run.finish(exit_code=int(status.get("state") != "done"))
    return str(where)


if __name__ == "__main__":
    try:
        print(show(Path(sys.argv[1]), json.loads(sys.argv[2])))
    except ImportError as error:
        sys.exit(f"{error} (pip install 'chai-lab[wandb]')")
    except Exception as error:  # told to who waits for it, in one line
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
