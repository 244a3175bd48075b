"""Training of DejaVu's predictors as its authors train them: one network at a time learns from the layers' activity.

Liu et al. (2023) and their code: AdamW at a constant learning rate on a binary cross-entropy in which a positive label
counts 1 and a negative one the share of the positives; a network stops when its recall on held-out tokens has not
improved for some evaluations, and its best weights are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from chai.methods.dejavu import Part, Receiver, num_kept, observe_layers, top_mask
from chai.offline.predictor import BottleneckNetwork, Predictor
from chai.patching.devices import input_device

#: Added to the weight of inactive neurons: few neurons are active, so their share alone is close to 0.
NEURON_WEIGHT = 0.005
WEIGHT_DECAY = 0.01

Networks = dict[tuple[Part, int], "NetworkTraining"]


@dataclass(frozen=True)
class Recipe:
    """What the networks of one part (heads or neurons) are trained for, and how."""

    part: Part
    sparsities: Sequence[float]
    learning_rate: float
    patience: int  # evaluations without a better recall after which a network stops

    def loss(self, scores: Tensor, importance: Tensor) -> Tensor:
        """Return the loss of predicted scores ``[N, outputs]``, given the true importance of the outputs.

        Heads: the mean over the sparsities of the loss with the top heads as labels. Neurons: a neuron is positive if
        it is active, that is if its activation is above 0.
        """
        if self.part == "neurons":
            return weighted_loss(scores, importance > 0, NEURON_WEIGHT)
        counts = [num_kept(scores.shape[-1], sparsity) for sparsity in self.sparsities]
        return torch.stack([weighted_loss(scores, top_mask(importance, count)) for count in counts]).mean()


def weighted_loss(scores: Tensor, labels: Tensor, extra: float = 0.0) -> Tensor:
    """Return the mean binary cross-entropy of logits; a positive counts 1, a negative the share of positives + extra.

    Args:
        scores: ``[N, outputs]``, logits.
        labels: bool, of the same shape.
        extra: Added to the share of the positives in this batch.
    """
    target = labels.to(scores)
    share = target.mean() + extra
    return functional.binary_cross_entropy_with_logits(scores, target, weight=target + (1 - target) * share)


class RecallCounter:
    """Share of the truly important outputs that are among the predicted ones, over many tokens.

    At a sparsity, both are the top ``(1 - sparsity)`` of a token's outputs, by score and by importance; outputs of
    importance 0 (inactive neurons) are not required.
    """

    def __init__(self, sparsities: Iterable[float]) -> None:
        self.hits = dict.fromkeys(sparsities, 0)
        self.wanted = dict.fromkeys(sparsities, 0)

    def add(self, scores: Tensor, importance: Tensor) -> None:
        """Count N more tokens, both ``[N, outputs]``."""
        for sparsity in self.hits:
            count = num_kept(scores.shape[-1], sparsity)
            wanted = top_mask(importance, count) & (importance > 0)
            self.hits[sparsity] += int((top_mask(scores, count) & wanted).sum())
            self.wanted[sparsity] += int(wanted.sum())

    def recalls(self) -> dict[float, float]:
        """Return the recall at each sparsity (1 if nothing is required)."""
        return {at: self.hits[at] / self.wanted[at] if self.wanted[at] else 1.0 for at in self.hits}

    def mean(self) -> float:
        """Return the mean recall of the sparsities."""
        return sum(self.recalls().values()) / len(self.hits)


@dataclass
class NetworkTraining:
    """A network in training: its optimizer, the recall so far, and the weights of the best recall (fp16, on the CPU).

    What is saved of a predictor is fp16, so nothing is lost, and the best weights take half the memory.
    """

    network: BottleneckNetwork
    recipe: Recipe
    optimizer: torch.optim.Optimizer | None = field(init=False)  # None once the network has stopped
    curve: list[list[float]] = field(default_factory=list)  # [step, recall] of each evaluation
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.recipe.learning_rate, weight_decay=WEIGHT_DECAY
        )

    @property
    def is_finished(self) -> bool:
        """True once the last ``patience`` evaluations were no better than the best before them."""
        recalls = [recall for _, recall in self.curve]
        return len(recalls) - recalls.index(max(recalls)) > self.recipe.patience if recalls else False

    def take_step(self, hidden: Tensor, importance: Tensor) -> Tensor:
        """Train on N tokens; return the loss, detached."""
        assert self.optimizer is not None
        with torch.enable_grad():
            loss = self.recipe.loss(self.network(hidden), importance)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def record(self, step: int, recall: float) -> None:
        """Note the recall of an evaluation, keep the weights if they are the best, and stop if it is time."""
        if recall > max((previous for _, previous in self.curve), default=-1.0):
            self.best = {name: value.detach().half().cpu() for name, value in self.network.state_dict().items()}
        self.curve.append([step, recall])
        if self.is_finished:
            self.optimizer = None

    def restore_best(self) -> None:
        """Load the best weights, as they are saved."""
        self.network.load_state_dict({name: value.float() for name, value in self.best.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint; a network that has stopped needs its best weights only."""
        state: dict[str, Any] = {"curve": self.curve, "best": self.best}
        if self.optimizer is not None:
            state |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint."""
        self.curve, self.best = state["curve"], state["best"]
        if "optimizer" not in state:
            self.optimizer = None
            return
        assert self.optimizer is not None
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_networks(predictor: Predictor, recipes: dict[Part, Recipe]) -> Networks:
    """Return the training of each network of a predictor, by part and layer."""
    parts: tuple[tuple[Part, torch.nn.ModuleDict], ...] = (("heads", predictor.heads), ("neurons", predictor.neurons))
    return {
        (part, int(layer)): NetworkTraining(network, recipes[part])
        for part, networks in parts
        for layer, network in networks.items()
    }


@torch.no_grad()
def observe(model: PreTrainedModel, ids: Tensor, networks: Networks, receive: Receiver) -> None:
    """Run the model on token ids ``[batch_size, length]``, and pass on what the layers of these networks compute."""

    def pass_on(part: Part, layer: int, hidden: Tensor, importance: Tensor) -> None:
        if (part, layer) in networks:
            receive(part, layer, hidden, importance)

    with observe_layers(model, pass_on, mlp=any(part == "neurons" for part, _ in networks)):
        model.get_decoder()(input_ids=ids.to(input_device(model)), use_cache=False)


def train_step(model: PreTrainedModel, ids: Tensor, networks: Networks) -> Tensor:
    """Train all networks on one batch, each as soon as its layer has run; return the mean loss on the CPU."""
    losses: list[Tensor] = []

    def learn(part: Part, layer: int, hidden: Tensor, importance: Tensor) -> None:
        losses.append(networks[part, layer].take_step(hidden, importance))

    observe(model, ids, networks, learn)
    return torch.stack([loss.cpu() for loss in losses]).mean()


def measure_recall(
    model: PreTrainedModel, batches: Callable[[int], Tensor], count: int, networks: Networks
) -> dict[tuple[Part, int], RecallCounter]:
    """Measure the recall of networks on ``count`` batches."""
    counters = {key: RecallCounter(training.recipe.sparsities) for key, training in networks.items()}

    def score(part: Part, layer: int, hidden: Tensor, importance: Tensor) -> None:
        counters[part, layer].add(networks[part, layer].network(hidden), importance)

    for index in range(count):
        observe(model, batches(index), networks, score)
    return counters
