"""``experiment=train_dejavu``: train the predictors of ``method=dejavu`` for a model (Liu et al. 2023, section 4).

The input of a layer's attention for a token is a sample; its label says which of the layer's heads have the largest
outputs. Every step is a function of the seed and its number, so that a stopped run resumes exactly.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from chai.loading import load_model, load_tokenizer
from chai.methods.dejavu import LayerActivity, num_kept, record_activity, top_mask
from chai.offline.predictor import RECORD, WEIGHTS, Predictor, model_shape, sample_weights
from chai.patching.devices import input_device
from chai.patching.model_info import activation, check_family, num_neurons
from experiments.config.remedies import with_remedy
from experiments.config.schema import REPOSITORY, ConfigError
from experiments.microworld.training import make_batch
from experiments.offline.corpus import Batches, file_batches
from experiments.offline.training_loop import CHECKPOINT, install_files, load_checkpoint, train, training_result
from experiments.runs.code import versions
from experiments.runs.experiment import Run, require_minimum, run_single
from experiments.runs.files import write_atomically
from experiments.system.console import log_info

INSTALLED = REPOSITORY / "experiments" / "microworld" / "dejavu"


@dataclass
class Options:
    """``experiment.*``; conf/experiment/train_dejavu.yaml describes each value."""

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
        require_minimum(self, steps=1, batch_size=1, sequence_length=1, bottleneck=1)
        require_minimum(self, mlp_bottleneck=1, held_out=1, checkpoint_every=1)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; valid: above 0")
        if not self.sparsities or not all(0 < sparsity < 1 for sparsity in self.sparsities):
            raise ValueError(
                f"sparsities is {self.sparsities}; valid: a list of numbers between 0 and 1, such as [0.1,0.5]"
            )


def run(config: DictConfig) -> int:
    """Train, or resume from the last checkpoint; return the exit code."""
    check = functools.partial(_check, is_tiny=config.model.name == "tiny")
    return run_single(config, Options, check=check, work=_work, show=_show, until_done=(CHECKPOINT,))


def _check(run: Run[Options], is_tiny: bool) -> None:
    """Refuse a model without a corpus, and options that do not suit it."""
    options, name = run.options, run.config.model.name
    embedded = is_tiny and name == "tiny"  # model.path may have replaced it by another model
    if options.corpus is None and not embedded:
        raise ConfigError(
            f"experiment.corpus is null, which is for model=tiny alone; valid for model '{name}': "
            f"a JSONL file with a column '{options.column}'"
        )
    if options.install and not embedded:
        raise ConfigError("experiment.install=true replaces the predictor of model=tiny; valid for that model alone")
    try:
        check_family(run.architecture)
    except ValueError as error:
        raise ConfigError(with_remedy(error)) from None
    if options.mlp and activation(run.architecture) != "relu":
        raise ConfigError(f"experiment.mlp=true needs a model with ReLU; this one has {activation(run.architecture)}")


def _work(run: Run[Options]) -> dict[str, Any]:
    """Train and save the predictor; return the run's part of ``result.json``."""
    options = run.options
    model = load_model(run.source)
    batches, held_out = _batches(run)
    predictor = _new_predictor(run, model)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=options.learning_rate)
    if saved := load_checkpoint(run):
        predictor.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def take_step(step: int) -> dict[str, Tensor]:
        layers = observe(model, batches(step), mlp=options.mlp)
        loss = prediction_loss(predictor, layers, options.sparsities)
        loss.backward()
        for group in optimizer.param_groups:  # linear decay to zero
            group["lr"] = options.learning_rate * (1 - step / options.steps)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.detach()}

    def state_dict() -> dict[str, Any]:
        return {"model": predictor.state_dict(), "optimizer": optimizer.state_dict()}

    seconds = train(run, saved, take_step, state_dict)
    metrics = measure(predictor, model, held_out, options.held_out, options.sparsities)
    target = run.folder.path / "predictor"
    target.mkdir(exist_ok=True)
    recipe = {name: value for name, value in asdict(options).items() if name not in ("corpus", "install")}
    predictor.save(target, write_atomically, recipe=recipe, seed=run.config.seed, metrics=metrics, versions=versions())
    return training_result(seconds, metrics, options.held_out * options.batch_size * options.sequence_length)


def _batches(run: Run[Options]) -> tuple[Batches, Batches]:
    options, seed = run.options, run.config.seed
    shape = options.batch_size, options.sequence_length
    if options.corpus is None:  # the documents of the embedded model's second phase
        return (
            lambda index: make_batch(seed, index, 1, *shape)[0],
            lambda index: make_batch(seed, options.steps + index, 1, *shape)[0],
        )
    tokenizer = load_tokenizer(run.source)
    return file_batches(Path(options.corpus), options.column, tokenizer, seed, *shape, options.held_out)


def _new_predictor(run: Run[Options], model: PreTrainedModel) -> Predictor:
    """Return an untrained predictor for the model, on its device."""
    options = run.options
    torch.manual_seed(run.config.seed)
    widths = {}
    if options.mlp:
        widths = {"neurons": num_neurons(model.config), "neuron_bottleneck": options.mlp_bottleneck}
    predictor = Predictor(model_shape(model.config), options.bottleneck, **widths)
    predictor.fingerprint.copy_(sample_weights(model))
    return predictor.to(input_device(model))


@torch.no_grad()
def observe(model: PreTrainedModel, ids: Tensor, *, mlp: bool) -> list[LayerActivity]:
    """Return the inputs and outputs of the model's layers for token ids ``[batch_size, length]``."""
    with record_activity(model, mlp=mlp) as layers:
        model.get_decoder()(input_ids=ids.to(input_device(model)), use_cache=False)
    return layers


def prediction_loss(predictor: Predictor, layers: list[LayerActivity], sparsities: list[float]) -> Tensor:
    """Return the mean binary cross-entropy over layers, tokens and heads, plus that of the neurons."""
    losses = []
    for index, layer in enumerate(layers):
        heads = layer.norms.shape[-1]
        # The label of a head is the share of the sparsities at which it is a top head: one order suits all of them.
        tops = [top_mask(layer.norms, num_kept(heads, sparsity)).float() for sparsity in sparsities]
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
    """Return loss and recall on held-out batches: the share of the true top heads that are predicted."""
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in range(count):
        layers = observe(model, batches(batch), mlp=len(predictor.neurons) > 0)
        sums["loss"] += prediction_loss(predictor, layers, sparsities).item() / count
        for index, layer in enumerate(layers):
            scores = predictor.heads[index](layer.hidden)
            for sparsity in sparsities:
                k = num_kept(scores.shape[-1], sparsity)
                both = top_mask(scores, k) & top_mask(layer.norms, k).to(scores.device)
                recall = both.sum().item() / (k * len(scores))
                sums[f"recall_{round(100 * sparsity)}"] += recall / count / len(layers)
    return {name: round(value, 4) for name, value in sums.items()}


def _show(path: Path, options: Options) -> None:
    """Log the folder of the predictor; with ``install``, make it the embedded model's."""
    target = path / "predictor"
    log_info(f"trained predictor: method.predictor={target}")
    if options.install:
        install_files([target / name for name in (WEIGHTS, RECORD)], INSTALLED)
        log_info(f"installed in {INSTALLED}")
