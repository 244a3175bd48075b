"""``experiment=train_dejavu``: train the predictors of ``method=dejavu`` for a model (Liu et al. 2023, section 4).

The input of a layer's attention for a token is a sample; its label says which of the layer's heads have the largest
outputs. Each network stops by itself, when its recall on held-out text is flat. Every step is a function of the seed
and its number, so that a stopped run resumes exactly.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chai.loading import load_model, load_tokenizer
from chai.methods.dejavu import Dejavu, Part, dense_layers
from chai.offline.predictor import LOW_RANK, RECORD, WEIGHTS, Predictor, model_shape, read_record, sample_weights
from chai.patching.devices import layer_devices
from chai.patching.model_info import activation, check_family, num_neurons
from experiments.config.remedies import with_remedy
from experiments.config.schema import REPOSITORY, ConfigError
from experiments.microworld.training import make_batch
from experiments.offline.corpus import Batches, file_batches
from experiments.offline.predictor_training import Networks, Recipe, measure_recall, train_networks, train_step
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
    bottleneck: int | None
    mlp: bool
    mlp_bottleneck: int | None
    sparsities: list[float]
    mlp_sparsities: list[float]
    dense_layers: int | list[int]
    dense_mlp_layers: int | list[int]
    learning_rate: float
    mlp_learning_rate: float
    evaluate_every: int
    patience: int
    validation: int
    held_out: int
    checkpoint_every: int
    install: bool

    def __post_init__(self) -> None:
        require_minimum(self, steps=1, batch_size=1, sequence_length=1, evaluate_every=1, patience=1)
        require_minimum(self, validation=1, held_out=1, checkpoint_every=1)
        for name in ("bottleneck", "mlp_bottleneck"):
            if getattr(self, name) is not None:
                require_minimum(self, **{name: 1})
        for name in ("learning_rate", "mlp_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: above 0")
        for name in ("sparsities", "mlp_sparsities"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or not all(0 < sparsity < 1 for sparsity in values):
                raise ValueError(
                    f"{name} is {values}; valid: a list of different numbers between 0 and 1, such as [0.1,0.5]"
                )

    def dense(self, config: PreTrainedConfig) -> dict[str, set[int]]:
        """Return the layers that get no network, as arguments of :class:`Predictor`."""
        layers = config.num_hidden_layers
        return {
            "dense_layers": dense_layers(self.dense_layers, layers, from_end=False),
            "dense_mlp_layers": dense_layers(self.dense_mlp_layers, layers, from_end=True),
        }


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
        dense = {"dense_layers": options.dense_layers, "dense_mlp_layers": options.dense_mlp_layers}
        Dejavu("oracle", **dense).check(run.architecture)
    except ValueError as error:
        raise ConfigError(f"experiment: {with_remedy(error)}") from None
    if options.mlp and activation(run.architecture) != "relu":
        raise ConfigError(f"experiment.mlp=true needs a model with ReLU; this one has {activation(run.architecture)}")


def _work(run: Run[Options]) -> dict[str, Any]:
    """Train and save the predictor; return the run's part of ``result.json``."""
    options = run.options
    model = load_model(run.source)
    training, validation, held_out = _batches(run)
    predictor = _new_predictor(run, model)
    networks = train_networks(predictor, _recipes(options))
    if saved := load_checkpoint(run):
        for key, network in networks.items():
            network.load_state_dict(saved["networks"][_name(key)])

    def unfinished() -> Networks:
        return {key: network for key, network in networks.items() if not network.is_finished}

    def take_step(step: int) -> dict[str, Tensor]:
        loss = train_step(model, training(step), unfinished())
        if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
            for key, counter in measure_recall(model, validation, options.validation, unfinished()).items():
                networks[key].record(step + 1, round(counter.mean(), 4))
        return {"loss": loss}

    def state_dict() -> dict[str, Any]:
        return {"networks": {_name(key): network.state_dict() for key, network in networks.items()}}

    seconds = train(run, saved, take_step, state_dict, is_finished=lambda: not unfinished())
    for network in networks.values():
        network.restore_best()
    stopped = len(networks) - len(unfinished())
    log_info(f"{stopped} of {len(networks)} networks stopped before step {options.steps}, their recall flat")
    outcome = _measure(run, model, networks, held_out)
    target = run.folder.path / "predictor"
    target.mkdir(exist_ok=True)
    recipe = {name: value for name, value in asdict(options).items() if name not in ("corpus", "install")}
    predictor.save(target, write_atomically, recipe=recipe, seed=run.config.seed, **outcome, versions=versions())
    tokens = options.held_out * options.batch_size * options.sequence_length
    return training_result(seconds, outcome["metrics"], tokens) | outcome


def _batches(run: Run[Options]) -> tuple[Batches, Batches, Batches]:
    """Return the batches to train on, to stop by, and to measure on; the three have no text in common."""
    options, seed = run.options, run.config.seed
    shape = options.batch_size, options.sequence_length
    if options.corpus is None:  # the documents of the embedded model's second phase
        validation, held_out = options.steps, options.steps + options.validation
        return (
            lambda index: make_batch(seed, index, 1, *shape)[0],
            lambda index: make_batch(seed, validation + index, 1, *shape)[0],
            lambda index: make_batch(seed, held_out + index, 1, *shape)[0],
        )
    aside = options.validation + options.held_out
    tokenizer = load_tokenizer(run.source)
    training, rest = file_batches(Path(options.corpus), options.column, tokenizer, seed, *shape, aside)
    return training, rest, lambda index: rest(options.validation + index)


def _new_predictor(run: Run[Options], model: PreTrainedModel) -> Predictor:
    """Return an untrained predictor for the model, the networks of each layer on its device."""
    options, config = run.options, model.config
    torch.manual_seed(run.config.seed)
    low_rank = min(LOW_RANK, config.hidden_size)
    neurons = {}
    if options.mlp:
        neurons = {"neurons": num_neurons(config), "neuron_bottleneck": options.mlp_bottleneck or low_rank}
    predictor = Predictor(model_shape(config), options.bottleneck or low_rank, **neurons, **options.dense(config))
    predictor.fingerprint.copy_(sample_weights(model))
    return predictor.to_layers(layer_devices(model))


def _recipes(options: Options) -> dict[Part, Recipe]:
    return {
        "heads": Recipe("heads", options.sparsities, options.learning_rate, options.patience),
        "neurons": Recipe("neurons", options.mlp_sparsities, options.mlp_learning_rate, options.patience),
    }


def _measure(run: Run[Options], model: PreTrainedModel, networks: Networks, held_out: Batches) -> dict[str, Any]:
    """Return the recall on held-out text, and how it developed on the text for validation.

    ``metrics``: means over the layers. ``recall``: by part and sparsity, a list with one entry a layer (``None``: it is
    dense). ``curves``: by part and layer, a list of steps and recalls.
    """
    metrics: dict[str, float] = {}
    recall: dict[str, dict[str, list[float | None]]] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    counters = measure_recall(model, held_out, run.options.held_out, networks)
    for (part, layer), counter in counters.items():
        curves.setdefault(part, {})[str(layer)] = networks[part, layer].curve
        for sparsity, value in counter.recalls().items():
            missing: list[float | None] = [None] * model.config.num_hidden_layers
            recall.setdefault(part, {}).setdefault(str(sparsity), missing)[layer] = round(value, 4)
    for part, by_sparsity in recall.items():
        for sparsity, by_layer in by_sparsity.items():
            values = [value for value in by_layer if value is not None]
            name = f"{'mlp_' if part == 'neurons' else ''}recall_{round(100 * float(sparsity))}"
            metrics[name] = round(sum(values) / len(values), 4)
    return {"metrics": metrics, "recall": recall, "curves": curves}


def _name(key: tuple[Part, int]) -> str:
    """Return the name of a network in a checkpoint."""
    return f"{key[0]}.{key[1]}"


def _show(path: Path, options: Options) -> None:
    """Log the folder of the predictor; with ``install``, make it the embedded model's."""
    target = path / "predictor"
    record = read_record(target)
    recalls = ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
    log_info(f"trained predictor: method.predictor={target} ({recalls})")
    if options.install:
        install_files([target / name for name in (WEIGHTS, RECORD)], INSTALLED)
        log_info(f"installed in {INSTALLED}")
