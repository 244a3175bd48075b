"""``experiment=pretrain_tiny``: train the embedded model from the repository's own text generator.

The result is a test bed with a known answer: heads of a layer are tied in groups for most of the training, then untied,
perturbed and trained on, so the true clusters are known. It is not evidence about large models (docs/microworld.md).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from chai.clustering.num_clusters import resolve_clusters
from chai.loading import pick_device
from experiments.config.schema import REPOSITORY, ConfigError
from experiments.microworld import training
from experiments.microworld.items import write_tasks
from experiments.microworld.tokenizer import build_tokenizer, vocabulary
from experiments.offline.training_loop import CHECKPOINT, install_files, load_checkpoint, train, training_result
from experiments.runs.code import versions
from experiments.runs.experiment import Run, require_minimum, run_single
from experiments.runs.files import write_json
from experiments.system.console import log_info

MODEL_DIR = REPOSITORY / "experiments" / "microworld" / "model"
DATA_DIR = REPOSITORY / "experiments" / "microworld" / "data"


@dataclass
class Options:
    """``experiment.*``: the recipe; conf/experiment/pretrain_tiny.yaml describes each value."""

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
        require_minimum(self, steps=2, batch_size=1, sequence_length=2, warmup=1, checkpoint_every=1)
        if not 0 < self.untie_at < 1:
            raise ValueError(f"untie_at is {self.untie_at}; valid: above 0, below 1")

    @property
    def untie_step(self) -> int:
        """First step with untied heads."""
        return min(int(self.steps * self.untie_at), self.steps - 1)


@dataclass
class State:
    """A training in progress; all but the planted groups is part of a checkpoint."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    groups: dict[str, list[list[int]]]
    losses: list[list[float]] = field(default_factory=list)  # step, loss, loss of the answers

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint, but for the position."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": self.losses,
        }


def run(config: DictConfig) -> int:
    """Train, or resume from the last checkpoint; return the exit code."""
    return run_single(config, Options, check=model_shape, work=_work, show=_show, until_done=(CHECKPOINT,))


def model_shape(run: Run[Options]) -> tuple[dict[str, Any], list[int]]:
    """Return the sizes of the model to train, and the number of planted groups in each layer; refuse other models."""
    model: Any = OmegaConf.to_container(run.config.model, resolve=True)
    if model["name"] != "tiny":
        raise ConfigError(f"experiment=pretrain_tiny trains model=tiny, not model={model['name']}")
    shape = {key: value for key, value in model["architecture"].items() if key != "model_type"}
    try:
        return shape, resolve_clusters(model["clusters"], shape["num_hidden_layers"], shape["num_attention_heads"])
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def _work(run: Run[Options]) -> dict[str, Any]:
    """Train and save the model; return the run's part of ``result.json``."""
    options, seed = run.options, run.config.seed
    device = pick_device(run.config.device)
    saved = load_checkpoint(run)
    state = _load_state(run, saved, device)
    seconds = train(run, saved, lambda step: _step(step, state, options, seed, device), state.state_dict)
    # The final losses are means of the last steps.
    tail = [row for row in state.losses if row[0] > options.steps - 200]
    names = enumerate(("loss", "answer_loss"), 1)
    final = {name: round(sum(row[column] for row in tail) / len(tail), 4) for column, name in names}
    _save_model(state, run, {"final": final, "seconds": round(seconds, 1)})
    return training_result(seconds, final, options.steps)


def _load_state(run: Run[Options], saved: dict[str, Any] | None, device: str) -> State:
    """Return the state of a checkpoint, or a fresh one."""
    shape, clusters = model_shape(run)
    options, seed, ids = run.options, run.config.seed, vocabulary()
    special = {"pad_token_id": ids["<pad>"], "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    llama = LlamaConfig(**shape, vocab_size=len(ids), **special)
    groups = training.plant_topics(llama.num_attention_heads, clusters, seed)
    model = training.build_model(llama, groups, seed)
    if saved and saved["step"] > options.untie_step:
        training.untie(model, options.noise, seed)
    model.to(device)
    state = State(model, training.build_optimizers(model, options.learning_rate, options.weight_decay), groups)
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(state.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state.losses = saved["losses"]
    return state


def _step(step: int, state: State, options: Options, seed: int, device: str) -> dict[str, Tensor]:
    """Take one optimizer step; return its loss, and the loss of the answers alone."""
    if step == options.untie_step:
        training.untie(state.model, options.noise, seed)
        state.optimizers = training.build_optimizers(state.model, options.learning_rate, options.weight_decay)
    phase = int(step >= options.first_phase)
    ids, weights = training.make_batch(seed, step, phase, options.batch_size, options.sequence_length)
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        loss, answers = training.weighted_loss(state.model, ids.to(device), weights.to(device))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    # The learning rate: a linear warm-up, then a linear decay, so that untied heads hardly drift apart.
    rate = options.learning_rate * min(1.0, (step + 1) / options.warmup) * max(0.01, 1 - step / options.steps)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    if (step + 1) % 10 == 0 or step + 1 == options.steps:
        state.losses.append([step + 1, round(loss.item(), 4), round(answers.item(), 4)])
    return {"loss": loss.detach(), "answers": answers}


def _save_model(state: State, run: Run[Options], outcome: dict[str, Any]) -> None:
    """Write the model in Hugging Face format with its recipe."""
    target = run.folder.path / "model"
    target.mkdir(exist_ok=True)
    model = state.model.to("cpu", torch.bfloat16)
    model.config.dtype = torch.float32  # the dtype to run it in; bfloat16 only halves the file
    model.config.save_pretrained(target)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer().save_pretrained(target)
    recipe = {
        "experiment": asdict(run.options),
        "seed": run.config.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "planted_groups": state.groups,
        "losses": [row for row in state.losses if row[0] % 100 == 0],
        "versions": versions(),
        **outcome,
    }
    write_json(target / "recipe.json", recipe)


def _show(path: Path, options: Options) -> None:
    """Log the folder of the model; with ``install``, make it the embedded one and write its tasks."""
    log_info(f"trained model: {path / 'model'}")
    if options.install:
        install_files((path / "model").iterdir(), MODEL_DIR)
        write_tasks(DATA_DIR)
        losses = json.loads((MODEL_DIR / "recipe.json").read_text())["final"]
        log_info(f"installed in {MODEL_DIR} (final losses {losses}); its tasks in {DATA_DIR}")
