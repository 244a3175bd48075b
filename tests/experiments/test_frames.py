"""The way from the command line to the model's forward pass is short enough to be read."""

from __future__ import annotations

import traceback
from pathlib import Path

from transformers import LlamaForCausalLM

from experiments.cli import main
from experiments.config.schema import REPOSITORY

#: From the experiment's ``run`` to ``_model_call``; the command line comes before (``main``, and one that executes).
FRAMES = 8


def test_frames_between_the_command_line_and_the_forward_pass(tmp_path, monkeypatch):
    forward, stacks = LlamaForCausalLM.forward, []

    def recording(self, *args, **kwargs):
        stacks.append(traceback.extract_stack())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", recording)
    settings = ["method=chai", "model=tiny", "task=micro_piqa", "limit=4", "device=cpu"]
    assert main([*settings, f"results_dir={tmp_path}"]) == 0
    package = REPOSITORY / "experiments"
    for stack in stacks:
        frames = [
            (Path(frame.filename).relative_to(package).as_posix(), frame.name)
            for frame in stack
            if Path(frame.filename).is_relative_to(package)
        ]
        assert frames[-1] == ("evaluation/lm.py", "_model_call")
        assert len(frames) - frames.index(("evaluation/accuracy.py", "run")) <= FRAMES
    assert stacks
