"""DejaVu: per token, only the heads that a small network predicts to matter contribute (Liu et al., ICML 2023)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from transformers import Cache, PreTrainedConfig, PreTrainedModel

from chai.contextual import activation, contextually_sparse, kept_of
from chai.devices import layer_devices
from chai.flops import LayerWork
from chai.methods.base import Method, Saving, plain_cache
from chai.predictor import Predictor, check_shape, load_predictor, read_record
from chai.runtime import check_family

ORACLE = "oracle"
TRAIN = "train one: python run.py experiment=train_dejavu model=NAME, then method.predictor=FOLDER"


@dataclass
class Dejavu(Method):
    """Contextual sparsity of heads, and of the neurons of ReLU models.

    For each token and layer, with ``x`` what the layer's attention reads (after its norm) and ``y_h`` head ``h``'s
    output,

        S = top (1 - sparsity) H heads by s(x),     attention output = W_O [1(h in S) y_h]_h.

    ``s`` is the layer's predictor (:mod:`chai.predictor`), trained to find the heads of the largest ``||y_h||``
    (section 3.1 of the paper; heads of near uniform attention, which average their values, have small ones), or with
    ``predictor="oracle"`` the norms themselves: what a perfect predictor would do. Neurons likewise, by their
    activation.

    The saving is simulated: outputs are masked, everything is computed. A kernel that gathers the chosen heads saves
    their products for one token, but keys and values of all heads stay in the cache, as later tokens may choose others.

    Attributes:
        predictor: folder of a trained predictor, or ``oracle``.
        sparsity: share of the heads that don't contribute, from 0 to below 1.
        mlp_sparsity: the same for the MLP's neurons; above 0 only for models with ReLU (OPT).

    Raises:
        ValueError: a value outside its choices.
    """

    predictor: str | None
    sparsity: float = 0.5
    mlp_sparsity: float = 0.0

    saving: ClassVar[Saving] = "simulated"

    def __post_init__(self) -> None:
        for name in ("sparsity", "mlp_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: 0 to below 1")

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply; see :func:`chai.contextual.contextually_sparse`."""
        self.check(model.config)
        predictor = self._load(model)
        neurons = kept_of(_neurons(model.config), self.mlp_sparsity) if self.mlp_sparsity else None
        return contextually_sparse(model, predictor, self.heads_kept(model.config)[0], neurons)

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """A stock ``DynamicCache``, which reserves nothing."""
        return plain_cache(model)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Heads that contribute to a token."""
        return [kept_of(config.num_attention_heads, self.sparsity)] * config.num_hidden_layers

    def work(self, config: PreTrainedConfig) -> list[LayerWork]:
        """Kept heads and neurons, and the predictors that are asked; an oracle costs nothing.

        As DejaVu counts: a token's keys and values of the heads that it doesn't use itself are nobody's work, though a
        later token may need them.
        """
        neurons = _neurons(config)
        kept = kept_of(neurons, self.mlp_sparsity)
        predictor = 0
        if self.predictor is not None and self.predictor != ORACLE:
            sizes, heads = read_record(Path(self.predictor)), config.num_attention_heads
            if self.heads_kept(config)[0] < heads:
                predictor += sizes["bottleneck"] * (config.hidden_size + heads)
            if self.mlp_sparsity:
                predictor += sizes["neuron_bottleneck"] * (config.hidden_size + neurons)
        return [replace(one, neurons=kept / neurons, predictor=predictor) for one in super().work(config)]

    def note(self, config: PreTrainedConfig) -> str:
        """That nothing is saved."""
        oracle = " by their true norms, as a perfect predictor would" if self.predictor == ORACLE else ""
        return f"dejavu masks heads{oracle}: the saving is simulated"

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that isn't supported, a missing predictor or another model's, and neurons without ReLU."""
        check_family(config)
        if self.mlp_sparsity and activation(config) != "relu":
            raise ValueError(f"mlp_sparsity needs a model with ReLU, such as OPT; this one has {activation(config)}")
        if self.predictor == ORACLE:
            return
        if self.predictor is None:
            raise ValueError(f"dejavu has no predictor for this model; {TRAIN}, or method.predictor={ORACLE}")
        try:
            record = check_shape(Path(self.predictor), config)
        except ValueError as error:
            raise ValueError(f"{error}; {TRAIN}") from None
        if self.mlp_sparsity and record["neurons"] != _neurons(config):
            raise ValueError(f"the predictor in {self.predictor} has no neurons: train it with experiment.mlp=true")

    def check_weights(self, model: PreTrainedModel) -> None:
        """Refuse the predictor of another model of the same shape."""
        self._load(model)

    def _load(self, model: PreTrainedModel) -> Predictor | None:
        if self.predictor is None or self.predictor == ORACLE:
            return None
        predictor = load_predictor(Path(self.predictor))
        try:
            predictor.check_model(model)
        except ValueError as error:
            raise ValueError(f"{error} ({self.predictor}); {TRAIN}") from None
        return predictor.to_layers(layer_devices(model))


def _neurons(config: PreTrainedConfig) -> int:
    return getattr(config, "ffn_dim", None) or config.intermediate_size
