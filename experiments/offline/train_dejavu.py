"""``experiment=train_dejavu``: train the predictors of ``method=dejavu`` for a model (Liu et al. 2023, section 4).

The model runs over text, unchanged. What each layer's attention reads of a token is a sample, which of its heads have
the largest outputs is the label. Every step is a function of the seed and its number, so a stopped run goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from chai.contextual import Observed, activation, kept_of, observed, top_mask
from chai.devices import input_device
from chai.models import ModelError, load_config, load_model, load_tokenizer
from chai.predictor import RECORD, WEIGHTS, Predictor, model_shape, sample_weights
from chai.runtime import check_family
from experiments.config.schema import REPOSITORY, ConfigError
from experiments.config.validate import to_dataclass
from experiments.evaluation.accuracy import model_source
from experiments.offline.batches import Batches, file_batches, world_batches
from experiments.runs.code import versions
from experiments.runs.experiment import Ending, record
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.resolve import resolve_runs
from experiments.system.console import console, log_info

INSTALLED = REPOSITORY / "experiments" / "microworld" / "dejavu"
CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Options:
    """``experiment.*``: conf/experiment/train_dejavu.yaml says what each value is."""

    corpus: str | None
    column: str
    steps: int
    batch_size: int
    sequence_length: int
    bottleneck: int
    mlp: bool
    mlp_bottleneck: int
    sparsities: list[float]
    learning_rate: float
    held_out: int
    checkpoint_every: int
    install: bool

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "sequence_length", "bottleneck", "mlp_bottleneck", "held_out", "checkpoint_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: 1 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; valid: above 0")
        values = self.sparsities
        if not isinstance(values, list) or not values or not all(type(v) in (int, float) and 0 < v < 1 for v in values):
            raise ValueError(f"sparsities is {values}; valid: a list of numbers between 0 and 1, such as [0.1,0.5]")


@dataclass
class State:
    """A training in progress."""

    predictor: Predictor
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def run(config: DictConfig) -> int:
    """Train, or go on from the last checkpoint; returns the exit code.

    Raises:
        ConfigError: options, or a model, that can't be trained for. Nothing is written then.
    """
    options = to_dataclass(Options, config.experiment, "experiment")
    embedded = config.model.name == "tiny"
    (config,) = resolve_runs(config)
    embedded = embedded and config.model.name == "tiny"
    if options.corpus is None and not embedded:
        raise ConfigError(
            f"experiment.corpus is null, which is for model=tiny alone; valid for model '{config.model.name}': "
            f"a JSONL file with a column '{options.column}'"
        )
    if options.install and not embedded:
        raise ConfigError("experiment.install=true replaces the predictor of model=tiny; valid for that model alone")
    folder = RunFolder(config)
    if folder.is_done and not config.force:
        log_info(f"done already: {folder.path} (force=true does it again)")
        return _tell(folder.path, options)
    source = model_source(config)
    try:
        architecture = load_config(source)
        check_family(architecture)
    except (ModelError, ValueError) as error:
        raise ConfigError(str(error)) from None
    if options.mlp and activation(architecture) != "relu":
        raise ConfigError(f"experiment.mlp=true needs a model with ReLU; this one has {activation(architecture)}")

    def work() -> dict[str, Any]:
        model = load_model(source)
        train, held_out = _batches(config, options)
        state = _resume(folder.path, options, model, config.seed)
        _train(state, folder, options, model, train)
        return _finish(state, folder, options, model, held_out, config)

    ending = record(folder, work, until_done=(CHECKPOINT,))
    return _tell(folder.path, options) if ending is Ending.DONE else ending.code


def _batches(config: DictConfig, options: Options) -> tuple[Batches, Batches]:
    shape = options.batch_size, options.sequence_length
    if options.corpus is None:
        train = world_batches(config.seed, *shape)
        return train, lambda index: train(options.steps + index)
    tokenizer = load_tokenizer(model_source(config))
    return file_batches(Path(options.corpus), options.column, tokenizer, config.seed, *shape, options.held_out)


def _resume(path: Path, options: Options, model: PreTrainedModel, seed: int) -> State:
    """The state of the last checkpoint, or a fresh one."""
    torch.manual_seed(seed)
    config, widths = model.config, {}
    if options.mlp:
        neurons = getattr(config, "ffn_dim", None) or config.intermediate_size
        widths = {"neurons": neurons, "neuron_bottleneck": options.mlp_bottleneck}
    predictor = Predictor(model_shape(config), options.bottleneck, **widths)
    predictor.fingerprint.copy_(sample_weights(model))
    predictor.to(input_device(model))
    state = State(predictor, torch.optim.AdamW(predictor.parameters(), lr=options.learning_rate))
    checkpoint = path / CHECKPOINT
    if not checkpoint.exists():
        return state
    with safe_open(checkpoint, "pt") as saved:
        counted = json.loads(saved.metadata()["state"])
        tensors: dict[str, dict[str, Tensor]] = {"weights": {}}
        for name in saved.keys():  # noqa: SIM118 - safe_open is no dictionary
            group, _, rest = name.partition("/")
            tensors.setdefault(group, {})[rest] = saved.get_tensor(name)
    predictor.load_state_dict(tensors.pop("weights"))
    whole = state.optimizer.state_dict()
    state.optimizer.load_state_dict({**whole, "state": {int(index): values for index, values in tensors.items()}})
    state.step, state.seconds = counted["step"], counted["seconds"]
    log_info(f"going on from step {state.step}")
    return state


def _snapshot(state: State, path: Path) -> None:
    """Write all of a state: weights, the optimiser's moments, and where it stands."""
    tensors = {f"weights/{name}": value.contiguous() for name, value in state.predictor.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"{index}/{name}": value.contiguous() for name, value in values.items()}
    counted = json.dumps({"step": state.step, "seconds": state.seconds})
    write_atomically(path / CHECKPOINT, lambda temporary: save_file(tensors, temporary, {"state": counted}))


def _train(state: State, folder: RunFolder, options: Options, model: PreTrainedModel, batches: Batches) -> None:
    """All remaining steps, with a checkpoint every so many."""
    columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[shown]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=options.steps, completed=state.step, shown="")
        while state.step < options.steps:
            began = time.perf_counter()
            layers = observe(model, batches(state.step), mlp=options.mlp)
            loss = prediction_loss(state.predictor, layers, options.sparsities)
            loss.backward()
            for group in state.optimizer.param_groups:  # to zero in a line
                group["lr"] = options.learning_rate * (1 - state.step / options.steps)
            state.optimizer.step()
            state.optimizer.zero_grad()
            if not torch.isfinite(loss):
                raise RunError(f"the loss is no number at step {state.step}: a lower experiment.learning_rate may do")
            state.step += 1
            state.seconds += time.perf_counter() - began
            progress.update(bar, completed=state.step, shown=f"loss {loss.item():.4f}")
            folder.progress(state.step, options.steps)
            if state.step % options.checkpoint_every == 0 and state.step < options.steps:
                _snapshot(state, folder.path)


@torch.no_grad()
def observe(model: PreTrainedModel, ids: Tensor, *, mlp: bool) -> list[Observed]:
    """What the layers read and compute of these sequences."""
    with observed(model, mlp=mlp) as layers:
        model.get_decoder()(input_ids=ids.to(input_device(model)), use_cache=False)
    return layers


def prediction_loss(predictor: Predictor, layers: list[Observed], sparsities: list[float]) -> Tensor:
    """Mean binary cross-entropy, over layers, tokens and heads; that of the neurons is added.

    A head's label is the share of the sparsities at which it is among the token's top heads, so that one predictor
    orders the heads for all of them; a neuron's label is whether it is active.
    """
    losses = []
    for index, layer in enumerate(layers):
        heads = layer.norms.shape[-1]
        tops = [top_mask(layer.norms, kept_of(heads, sparsity)).float() for sparsity in sparsities]
        labels = torch.stack(tops).mean(0)
        scores = predictor.heads[index](layer.hidden)
        losses.append(functional.binary_cross_entropy_with_logits(scores, labels.to(scores.device)))
        if len(predictor.neurons):
            scores = predictor.neurons[index](layer.mlp_hidden)
            losses.append(functional.binary_cross_entropy_with_logits(scores, layer.active.to(scores)))
    return torch.stack(losses).sum() / len(layers)


@torch.no_grad()
def measure(
    predictor: Predictor, model: PreTrainedModel, batches: Batches, count: int, sparsities: list[float]
) -> dict[str, float]:
    """Mean over held-out tokens and layers of the share of the true top heads that are predicted, and the loss."""
    sums = dict.fromkeys(["loss", *(f"recall_{round(100 * sparsity)}" for sparsity in sparsities)], 0.0)
    for batch in range(count):
        layers = observe(model, batches(batch), mlp=len(predictor.neurons) > 0)
        sums["loss"] += prediction_loss(predictor, layers, sparsities).item() / count
        for index, layer in enumerate(layers):
            scores = predictor.heads[index](layer.hidden)
            for sparsity in sparsities:
                keep = kept_of(scores.shape[-1], sparsity)
                both = top_mask(scores, keep) & top_mask(layer.norms, keep).to(scores.device)
                share = both.sum().item() / (keep * len(scores))
                sums[f"recall_{round(100 * sparsity)}"] += share / count / len(layers)
    return {name: round(value, 4) for name, value in sums.items()}


def _finish(
    state: State, folder: RunFolder, options: Options, model: PreTrainedModel, held_out: Batches, config: DictConfig
) -> dict[str, Any]:
    """Save the predictor; returns the run's result."""
    metrics = measure(state.predictor, model, held_out, options.held_out, options.sparsities)
    target = folder.path / "predictor"
    target.mkdir(exist_ok=True)
    recipe = {name: value for name, value in asdict(options).items() if name not in ("corpus", "install")}
    state.predictor.save(
        target, write_atomically, recipe=recipe, seed=config.seed, metrics=metrics, versions=versions()
    )
    return {
        "experiment": config.experiment.name,
        "method": config.method.name,
        "model": config.model.name,
        "task": config.task.name,
        "metrics": metrics,
        "n": options.held_out * options.batch_size * options.sequence_length,
        "stderr": {},
        "savings": {"kind": "none", "kv_bytes": 0, "kv_bytes_mha": 0, "heads_kept": []},
        "seconds": round(state.seconds, 3),
        "seed": config.seed,
        "run_id": folder.id,
        "versions": versions(),
    }


def _tell(path: Path, options: Options) -> int:
    """Say where the predictor is; with ``install``, make it the embedded model's."""
    target = path / "predictor"
    log_info(f"trained predictor: method.predictor={target}")
    if options.install:
        INSTALLED.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, RECORD):
            write_atomically(INSTALLED / name, lambda temporary, name=name: shutil.copyfile(target / name, temporary))
        log_info(f"installed in {INSTALLED}")
    return 0
