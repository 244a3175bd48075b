"""``run.py`` as a launcher starts it, but the second process fails at its first batch."""

from __future__ import annotations

import os
import sys

import torch

from experiments.cli import main
from experiments.evaluation.lm import MethodLM

torch.set_num_threads(1)
answer, failed = MethodLM._model_call, []


def fail_once(self: MethodLM, *args: object, **kwargs: object) -> torch.Tensor:
    if os.environ["RANK"] == "1" and not failed:
        failed.append(True)
        raise RuntimeError("the device is lost")
    return answer(self, *args, **kwargs)


MethodLM._model_call = fail_once
sys.exit(main(sys.argv[1:]))
