"""Messages and progress for the user. With several processes, only the main one prints."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from rich.console import Console

from experiments.system.processes import is_main_process

#: A pipe has no width of its own; 110 columns are enough for the tables.
console = Console(width=None if sys.stdout.isatty() else 110)

#: Errors of this process; the last one is the reason of a job whose runs have no folder to record it in.
logged_errors: list[str] = []


def log_info(message: str) -> None:
    """Print a line of progress."""
    if is_main_process():
        console.print(message, highlight=False, markup=False, soft_wrap=True)


def log_error(message: str) -> None:
    """Print an error of one line to standard error, and keep it."""
    logged_errors.append(message)
    if is_main_process():
        print(f"error: {message}", file=sys.stderr)


def quiet_libraries() -> None:
    """Limit the libraries to errors, unless ``CHAI_VERBOSE=1``; call before they are imported."""
    if os.environ.get("CHAI_VERBOSE"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    if not is_main_process():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.stderr.isatty():  # a progress bar in a log file gets one line per half minute
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("lm-eval", "lm_eval", "datasets", "transformers", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
