"""Output projections fitted to the clusters of a profile, in closed form: nothing is trained.

With clusters that are fixed offline, the heads of a layer put out ``X = [A_r(1) V_1, ..., A_r(H) V_H]`` instead of
``Y = [A_1 V_1, ..., A_H V_H]``. In part, Y is a linear function of X: the outputs of other heads say something about
what a member would have attended to. Ridge regression over the tokens of some texts,

    P = argmin |X P - Y|^2 + ridge |P - I|^2 = (X^T X + ridge I)^-1 (X^T Y + ridge I),

goes into the output projection: ``X P W_O^T = X W'^T`` with ``W' = W_O P^T``. It has the same shape, so that a request
costs the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor
from transformers import PreTrainedModel

from chai.errors import ChaiError
from chai.heads import HeadClusters
from chai.offline.sensitivity import clustered_layer
from chai.patching.apply import AttentionInputs, Decoder, ForwardPass, patched, running
from chai.patching.devices import input_device
from chai.patching.model_info import check_family
from chai.patching.outputs import output_projections, output_weight

FITTED = "refit.safetensors"
#: Weight of the identity, as a share of the mean of the diagonal of X^T X.
RIDGE = 0.1


@torch.inference_mode()
def fit_outputs(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    clusters: Sequence[HeadClusters],
    exact_tokens: int,
    ridge: float = RIDGE,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[int, Tensor]:
    """Return the fitted output projection ``[d, H * D]`` of each layer with fewer clusters than heads.

    Each layer is fitted to the model's own inputs, apart from the others. Sums over the tokens are kept, ``2 (H D)^2``
    fp32 numbers for each layer, on the layer's device.

    Args:
        model: Of a supported family.
        batches: Long ``[B, T]``, texts without padding.
        clusters: Of each layer, one row.
        exact_tokens: First tokens of a text, which run with all heads.
        ridge: See :data:`RIDGE`.
        progress: Called with the number of texts so far.

    Raises:
        ValueError: The family or its output projection is not supported, or a method is applied already.
    """
    check_family(model.config)
    modules = output_projections(model)
    fitted = [index for index, own in enumerate(clusters) if own.k < own.num_heads]
    sums = _Sums(clusters, exact_tokens)

    def decode(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
        with running(sums):
            return decoder.forward(*args, **kwargs)

    done = 0
    with patched(model, decode):
        for ids in batches:
            model.get_decoder()(ids.to(input_device(model)), use_cache=False)
            progress(done := done + len(ids))
    if fitted and not done:
        raise ValueError("there is no text to fit to")
    return {index: _solve(output_weight(modules[index]), *sums.layers[index], ridge) for index in fitted}


class _Sums(ForwardPass):
    """``X^T X`` and ``X^T Y`` of each clustered layer; the pass itself is the model's own."""

    def __init__(self, clusters: Sequence[HeadClusters], exact_tokens: int) -> None:
        self._clusters, self._exact_tokens = clusters, exact_tokens
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Return the layer's attention ``[B, T, H, D]``, and add to its sums."""
        out, clusters = inputs.stock(), self._clusters[inputs.layer_idx]
        if clusters.k < clusters.num_heads:
            mixed = clustered_layer(inputs, clusters, self._exact_tokens)
            x, y = (part[:, self._exact_tokens :].flatten(2).flatten(0, 1).float() for part in (mixed, out))
            products, cross = x.T @ x, x.T @ y
            if inputs.layer_idx in self.layers:
                products += self.layers[inputs.layer_idx][0]
                cross += self.layers[inputs.layer_idx][1]
            self.layers[inputs.layer_idx] = products, cross
        return out


def _solve(weight: Tensor, products: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return ``W' = W_O P^T`` in the dtype of W_O."""
    products, cross = products.double(), cross.double()
    identity = torch.eye(len(products), dtype=torch.float64, device=products.device)
    shrink = ridge * products.diagonal().mean() * identity
    solution = torch.linalg.solve(products + shrink, cross + shrink)
    return (weight.double() @ solution.T).to(weight.dtype)


def save_fitted(path: Path, weights: Mapping[int, Tensor]) -> str:
    """Write fitted output projections to a safetensors file; return its digest."""
    content = serialize({f"output.{index}": weight.cpu().contiguous() for index, weight in weights.items()})
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_fitted(profile: str | Path, sha256: str) -> dict[int, Tensor]:
    """Read the fitted output projections of a head profile, given as :meth:`HeadProfile.load` takes it.

    Raises:
        ChaiError: The file is missing, or is not that of the profile.
    """
    path = Path(profile)
    path = (path if path.is_dir() else path.parent) / FITTED
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ChaiError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ChaiError(f"{path} is damaged or of another profile: its digest is not that in profile.json")
    return {int(name.removeprefix("output.")): weight for name, weight in parse(content).items()}
