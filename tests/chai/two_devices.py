"""What the methods compute on a model that is divided between two pretended devices; run as a process of its own.

``python -m tests.chai.two_devices`` prints a JSON list of what went wrong.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from chai.methods import Chai, load_method
from chai.methods.base import Method
from chai.offline.predictor import Predictor, model_shape, sample_weights
from chai.patching.devices import describe_devices
from tests.devices import PRETENDED, divided
from tests.models import LAYERS, make_batch, make_model

PLACES = [0, 1, 1]
ROWS = [9, 3, 12]  # one of them hasn't all its first tokens at the prompt's end


def methods(model: PreTrainedModel, folder: Path) -> Iterator[Method]:
    """One of each kind."""
    predictor = Predictor(model_shape(model.config), 8)
    predictor.fingerprint.copy_(sample_weights(model))
    predictor.save(folder, lambda path, fill: fill(path))
    yield load_method("mha")()
    yield load_method("random")(clusters=[3, 8, 2])
    yield load_method("chai")(clusters=[3, 8, 2])
    yield load_method("chai_qkv")(clusters=[3, 8, 2])
    yield load_method("dejavu")(predictor="oracle")
    yield load_method("dejavu")(predictor=str(folder))
    yield load_method("spatten")()


def run(model: PreTrainedModel, method: Method, device: str) -> tuple[torch.Tensor, list[list[int]], list[str]]:
    """Logits of a padded batch, text generated after it with beams, and where the cache's layers were."""
    batch = {name: tensor.to(device) for name, tensor in make_batch(ROWS).items()}
    with torch.no_grad(), method(model):
        cache = method.new_cache(model)
        logits = model(**batch, past_key_values=cache).logits.to("cpu")
        text = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False).tolist()
    return logits[make_batch(ROWS)["attention_mask"].bool()], text, [str(layer.keys.device) for layer in cache.layers]


def main() -> list[str]:
    """One line for each thing that isn't as it should be."""
    wrong = []
    expected = [f"{PRETENDED}:{place}" for place in PLACES]
    for family in ("llama", "opt", "gpt_neox"):
        model = make_model(family)
        with tempfile.TemporaryDirectory() as folder:
            for method in methods(model, Path(folder)):
                if family != "llama" and not isinstance(method, Chai):
                    continue
                name = f"{family} {type(method).__name__}"
                whole = run(model, method, "cpu")
                try:
                    with divided(model, PLACES):
                        found = run(model, method, expected[0])
                        if describe_devices(model) != ", ".join(dict.fromkeys(expected)):
                            wrong.append(f"{name}: the model says it is on {describe_devices(model)}")
                except RuntimeError as error:
                    wrong.append(f"{name}: {str(error)[:300]}")
                    continue
                if not torch.allclose(found[0], whole[0], atol=1e-4, rtol=1e-4):
                    wrong.append(f"{name}: logits differ by {(found[0] - whole[0]).abs().max()}")
                if found[1] != whole[1]:
                    wrong.append(f"{name}: other text")
                if found[2] != expected or whole[2] != ["cpu"] * LAYERS:
                    wrong.append(f"{name}: caches are on {found[2]}, layers on {expected}")
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main()))
