"""What a person sees while a run works: our own lines and progress, without the libraries' chatter.

Of several processes that work together the leading one alone speaks.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from rich.console import Console

from experiments.system.processes import is_main_process

#: A pipe has no width of its own: wide enough for the tables.
console = Console(width=None if sys.stdout.isatty() else 110)


def quiet_libraries() -> None:
    """Errors of the libraries only, unless ``CHAI_VERBOSE=1``. Set before they are imported."""
    if os.environ.get("CHAI_VERBOSE"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    if not is_main_process():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.stderr.isatty():  # in a log file a progress bar is one line every half minute
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("lm-eval", "lm_eval", "datasets", "transformers", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(message: str) -> None:
    """One line about what is going on."""
    if is_main_process():
        console.print(message, highlight=False, markup=False, soft_wrap=True)


#: What this process has complained about; a job's last word where no run's folder can hold it.
complaints: list[str] = []


def complain(message: str) -> None:
    """One line about what went wrong, to standard error."""
    complaints.append(message)
    if is_main_process():
        print(f"error: {message}", file=sys.stderr)
