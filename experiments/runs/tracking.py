"""Upload of finished runs to Weights & Biases (``logger=wandb``); a resumed run has the same id there.

A tracker that is missing, crashes or hangs never fails a run: the upload is a process of its own (this module as a
program), which reads the run's folder and is killed when it takes too long.
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
from experiments.runs.files import read_json
from experiments.runs.folder import RunFolder
from experiments.system.console import log_info

ROWS = 10_000  # uploaded rows of a table; the artifact has the whole file
LARGEST = 100 << 20  # bytes of a file that still becomes part of the artifact
UPLOADED = (".json", ".yaml", ".parquet", ".csv", ".png", ".pdf", ".svg", ".md")  # no weights, no checkpoints
REACH = 3.0  # seconds to find out whether the server can be reached


def track(folder: RunFolder) -> None:
    """Upload a run that has just ended, if its configuration says so, and log where it is or why it is not."""
    logger = folder.config.logger
    if logger.name != "wandb":
        return
    try:
        message = _upload_in_process(folder.path, logger)
    except Exception as error:  # the run itself is over and fine, whatever happens here
        message = f"not tracked: {type(error).__name__}: {error}"
    log_info(f"logger=wandb: {message}")


def _upload_in_process(path: Path, logger: DictConfig) -> str:
    """Run this module on a folder; return its message of one line."""
    settings = json.dumps({**OmegaConf.to_container(logger, resolve=True), "dir": str(path.parents[4].resolve())})
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.runs.tracking", str(path.resolve()), settings],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its own children can be killed with it
    )
    try:
        out, errors = process.communicate(timeout=logger.timeout)
    except subprocess.TimeoutExpired:
        return f"not tracked: no answer for {logger.timeout:g} seconds (logger.timeout)"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    text = (out if process.returncode == 0 else errors).strip() or f"exit code {process.returncode}"
    last = text.splitlines()[-1]
    return last if process.returncode == 0 else f"not tracked: {last}"


def choose_mode(requested: str | None) -> str:
    """Return ``online`` or ``offline``: as requested, else ``WANDB_MODE``, else online with an API key and a server."""
    mode = requested or os.environ.get("WANDB_MODE")
    if mode:
        return mode
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        if "WANDB_API_KEY" not in os.environ and netrc().authenticators(server.hostname or "") is None:
            return "offline"
        create_connection((server.hostname, server.port or 443), timeout=REACH).close()
        return "online"
    except (OSError, NetrcParseError):
        return "offline"


def flatten(value: Any, prefix: str = "") -> dict[str, float]:
    """Return the numbers in nested dictionaries by their paths: ``savings/kv_bytes``."""
    if isinstance(value, dict):
        parts = (flatten(inner, f"{prefix}/{key}" if prefix else str(key)) for key, inner in value.items())
        return {name: number for part in parts for name, number in part.items()}
    return {prefix: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else {}


def upload_run(path: Path, settings: dict[str, Any]) -> str:
    """Upload a run's folder; return where the run is, in one line.

    ``settings`` are ``logger.*`` of its configuration, and ``dir``, below which the tracker keeps its own files.
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
    artifact = wandb.Artifact(f"{names['experiment']}-{path.name}", "run", metadata=names)
    for file in sorted(path.rglob("*")):
        if not file.is_file() or file.suffix not in UPLOADED or file.stat().st_size > LARGEST:
            continue
        name = file.relative_to(path)
        artifact.add_file(str(file), str(name))
        # Pictures and tables are shown in the run as well.
        if file.suffix == ".png":
            run.log({str(name): wandb.Image(str(file))})
        if file.suffix == ".parquet":
            frame = pd.read_parquet(file).head(ROWS)
            for column in frame.select_dtypes(object):  # tables do not show lists
                frame[column] = frame[column].map(str)
            run.log({name.stem: wandb.Table(dataframe=frame)})
    run.log_artifact(artifact)
    place = run.url if mode == "online" else f"offline, `wandb sync {Path(run.dir).parent}` uploads it"
    run.finish(exit_code=int(status.get("state") != "done"))
    return str(place)


if __name__ == "__main__":
    try:
        print(upload_run(Path(sys.argv[1]), json.loads(sys.argv[2])))
    except ImportError as error:
        sys.exit(f"{error} (pip install 'chai-attention[wandb]')")
    except Exception as error:  # the parent process logs its last line
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
