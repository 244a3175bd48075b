"""Time to first and next token in the engine (:mod:`chai.engine`), with multi-head attention in it as the baseline.

The engine takes no detour through ``generate()``: on a GPU a decode step is one CUDA graph, for all methods alike.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch

from chai.engine import Engine
from chai.engine.support import check_method, check_model
from chai.methods import baseline
from chai.methods.base import Method
from experiments.benchmarks import harness
from experiments.benchmarks.harness import BenchmarkContext, OptionsT, Times
from experiments.config.schema import ConfigError
from experiments.tables.benchmarks import CONTROL, ENGINE

#: Tokens of a prompt before random keys and values.
SHORT = 64


def check_engine(method: Method, length: int, model: torch.nn.Module) -> None:
    """Refuse a method or a model that the engine does not run (ConfigError)."""
    try:
        check_method(method)
        check_model(model, length)
    except ValueError as error:
        raise ConfigError(f"experiment.parts has engine: {error}") from None


def engine_times(context: BenchmarkContext[OptionsT], phase: str, length: int, rounds: int) -> Times:
    """Time a prompt, or a decode step at ``length`` tokens, of the baseline, the method and its control.

    All rows begin with the same warm-up tokens, as requests with a common system prompt do: they share their clusters.
    """
    model, method, rows = context.model, context.method, context.options.rows
    num_heads = model.config.get_text_config().num_attention_heads
    methods = {ENGINE: baseline()}
    if method != baseline():
        methods[context.name] = method
        control = method.with_num_clusters(num_heads)
        if control is not None and set(method.heads_kept(model.config)) != {num_heads}:
            methods[CONTROL] = control
    prompt = harness.random_tokens(model, rows, length if phase == "prefill" else min(length - 1, SHORT)).cpu()
    shared = max(one.warmup_tokens for one in methods.values())
    prompt[:, :shared] = prompt[:1, :shared]
    timers: harness.Timers = {}
    with ExitStack() as stack:
        for name, applied in methods.items():
            engine = stack.enter_context(Engine(model, applied, rows, length))
            if phase == "prefill":
                timers[name] = partial(engine.prefill, prompt)
                engine.prefill(prompt)
            else:
                engine.prefill(prompt)
                timers[name] = engine.repeated_step(length)
        return harness.interleave(timers, rounds, model.device)
