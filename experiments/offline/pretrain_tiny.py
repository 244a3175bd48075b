"""``experiment=pretrain_tiny``: train the embedded model from the repository's own text generator.

The result is a test bed with a known answer: heads of a layer are tied in groups for most of the training, then untied,
perturbed and trained on, so the true clusters are known. It is no evidence about large models (docs/microworld.md).
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from chai.models import pick_device
from chai.presets import resolve_clusters
from experiments.config.schema import REPOSITORY, ConfigError
from experiments.config.validate import to_dataclass
from experiments.microworld import training
from experiments.microworld.items import write_tasks
from experiments.microworld.tokenizer import build_tokenizer, vocabulary
from experiments.runs.code import versions
from experiments.runs.experiment import Ending, record
from experiments.runs.files import write_atomically, write_json
from experiments.runs.folder import RunError, RunFolder
from experiments.system.console import console, log_info

MODEL_DIR = REPOSITORY / "experiments" / "microworld" / "model"
DATA_DIR = REPOSITORY / "experiments" / "microworld" / "data"
CHECKPOINT = "checkpoint.pt"


@dataclass
class Options:
    """``experiment.*``: the recipe (conf/experiment/pretrain_tiny.yaml says what each value is)."""

    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    weight_decay: float
    warmup: int
    first_phase: int
    untie_at: float
    noise: float
    checkpoint_every: int
    install: bool

    def __post_init__(self) -> None:
        for name, least in {
            "steps": 2,
            "batch_size": 1,
            "sequence_length": 2,
            "warmup": 1,
            "checkpoint_every": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: {least} or more")
        if not 0 < self.untie_at < 1:
            raise ValueError(f"untie_at is {self.untie_at}; valid: above 0, below 1")

    @property
    def untie_step(self) -> int:
        """The first step with untied heads."""
        return min(int(self.steps * self.untie_at), self.steps - 1)

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then a linear decay, so that untied heads hardly drift apart."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * max(0.01, 1 - step / self.steps)


@dataclass
class State:
    """A training in progress: all of it goes into a checkpoint."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    groups: dict[str, list[list[int]]]
    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float, float]] | None = None


def run(config: DictConfig) -> int:
    """Train, or go on from the last checkpoint; returns the exit code."""
    options = to_dataclass(Options, config.experiment, "experiment")
    model = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(model, dict)
    shape: dict[str, Any] = model["architecture"]
    if model["name"] != "tiny":
        raise ConfigError(f"experiment=pretrain_tiny trains model=tiny, not model={model['name']}")
    shape.pop("model_type")
    try:
        clusters = resolve_clusters(model["clusters"], shape["num_hidden_layers"], shape["num_attention_heads"])
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    folder = RunFolder(config)
    if folder.is_done and not config.force:
        log_info(f"done already: {folder.path} (force=true does it again)")
        return _install(folder.path, options)

    def work() -> dict[str, Any]:
        device = pick_device(config.device)
        state = _resume(folder.path, options, shape, clusters, config.seed, device)
        _train(state, folder, options, config.seed, device)
        return _finish(state, folder, options, config)

    ending = record(folder, work, until_done=(CHECKPOINT,))
    return _install(folder.path, options) if ending is Ending.DONE else ending.code


def _resume(path: Path, options: Options, shape: dict[str, Any], clusters: list[int], seed: int, device: str) -> State:
    """The state of the last checkpoint, or a fresh one."""
    ids = vocabulary()
    llama = LlamaConfig(
        **shape,
        vocab_size=len(ids),
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
    )
    groups = training.plant_topics(llama.num_attention_heads, clusters, seed)
    model = training.build_model(llama, groups, seed)
    checkpoint = path / CHECKPOINT
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
    if saved and saved["step"] > options.untie_step:
        training.untie(model, options.noise, seed)
    model.to(device)
    optimizers = training.build_optimizers(model, options.learning_rate, options.weight_decay)
    state = State(model, optimizers, groups, losses=[])
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state.step, state.seconds = saved["step"], saved["seconds"]
        state.losses = [tuple(row) for row in saved["losses"]]
        log_info(f"going on from step {state.step}")
    return state


def _train(state: State, folder: RunFolder, options: Options, seed: int, device: str) -> None:
    """All remaining steps, with a checkpoint every so many."""
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    assert state.losses is not None
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.steps, completed=state.step, shown="")
        while state.step < options.steps:
            began = time.perf_counter()
            if state.step == options.untie_step:
                training.untie(state.model, options.noise, seed)
                state.optimizers = training.build_optimizers(state.model, options.learning_rate, options.weight_decay)
            loss, answers = _step(state, options, seed, device)
            if not torch.isfinite(loss):
                raise RunError(f"the loss is no number at step {state.step}: a lower experiment.learning_rate may do")
            state.step += 1
            state.seconds += time.perf_counter() - began
            folder.progress(state.step, options.steps)
            if state.step % 10 == 0 or state.step == options.steps:
                state.losses.append((state.step, round(loss.item(), 4), round(answers.item(), 4)))
                shown = f"loss {loss.item():.3f}, answers {answers.item():.3f}"
                progress.update(bar, completed=state.step, shown=shown)
            if state.step % 100 == 0 and not console.is_terminal:  # a log file has no bar
                log_info(f"step {state.step} of {options.steps}: loss {loss.item():.3f}, answers {answers.item():.3f}")
            if state.step % options.checkpoint_every == 0 and state.step < options.steps:
                write_atomically(folder.path / CHECKPOINT, lambda temporary: torch.save(_snapshot(state), temporary))


def _step(state: State, options: Options, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    phase = int(state.step >= options.first_phase)
    ids, weights = training.make_batch(seed, state.step, phase, options.batch_size, options.sequence_length)
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        loss, answers = training.weighted_loss(state.model, ids.to(device), weights.to(device))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = options.rate(state.step)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach(), answers


def _snapshot(state: State) -> dict[str, Any]:
    return {
        "model": state.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "step": state.step,
        "seconds": state.seconds,
        "losses": [list(row) for row in state.losses or []],
    }


def _finish(state: State, folder: RunFolder, options: Options, config: DictConfig) -> dict[str, Any]:
    """Write the model in Hugging Face format with its recipe; returns the run's result."""
    assert state.losses is not None
    target = folder.path / "model"
    target.mkdir(exist_ok=True)
    model = state.model.to("cpu", torch.bfloat16)
    model.config.dtype = torch.float32  # what it is to be run in; bf16 only halves the file
    model.config.save_pretrained(target)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer().save_pretrained(target)
    tail = [row for row in state.losses if row[0] > state.step - 200]
    final = {
        "loss": round(sum(row[1] for row in tail) / len(tail), 4),
        "answer_loss": round(sum(row[2] for row in tail) / len(tail), 4),
    }
    recipe = {
        "experiment": asdict(options),
        "seed": config.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "planted_groups": state.groups,
        "final": final,
        "losses": [row for row in state.losses if row[0] % 100 == 0],
        "seconds": round(state.seconds, 1),
        "versions": versions(),
    }
    write_json(target / "recipe.json", recipe)
    return {
        "experiment": config.experiment.name,
        "method": config.method.name,
        "model": config.model.name,
        "task": config.task.name,
        "metrics": final,
        "n": state.step,
        "stderr": {},
        "savings": {"kind": "none", "kv_bytes": 0, "kv_bytes_mha": 0, "heads_kept": []},
        "seconds": round(state.seconds, 3),
        "seed": config.seed,
        "run_id": folder.id,
        "versions": versions(),
    }


def _install(path: Path, options: Options) -> int:
    """Say where the model is; with ``install``, make it the embedded one and write its tasks."""
    log_info(f"trained model: {path / 'model'}")
    if options.install:
        MODEL_DIR.mkdir(parents=True, exist_ok=True)
        for source in (path / "model").iterdir():
            write_atomically(MODEL_DIR / source.name, lambda temporary, file=source: shutil.copyfile(file, temporary))
        write_tasks(DATA_DIR)
        losses = json.loads((MODEL_DIR / "recipe.json").read_text())["final"]
        log_info(f"installed in {MODEL_DIR} (final losses {losses}); its tasks in {DATA_DIR}")
    return 0
