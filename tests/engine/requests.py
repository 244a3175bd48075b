"""What the tests of the engine share: methods, batches and the tokens that transformers generates."""

from __future__ import annotations

import torch

from chai.methods import Chai, ChaiQkv, Mha, Random
from tests.models import HEADS, make_batch

#: k of each layer: one layer without clusters.
COUNTS = [HEADS, 3, 2]
METHODS = {
    "mha": Mha(),
    "chai": Chai(clusters=COUNTS),
    "random": Random(clusters=3),
    "chai_qkv": ChaiQkv(clusters=COUNTS),
    "group_aware": Chai(clusters=COUNTS, group_aware=True),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def same_start(lengths: list[int], tokens: int) -> dict[str, torch.Tensor]:
    """A batch whose rows begin with the same tokens."""
    batch = make_batch(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for row, length in enumerate(lengths):
        begin = ids.shape[1] - length
        ids[row, begin : begin + tokens] = torch.arange(3, 3 + tokens)
    return {"input_ids": ids, "attention_mask": mask}


def expected(model, method, batch, new_tokens=9, **options):
    """The tokens of transformers' generate() under the method."""
    with torch.no_grad(), method(model):
        return model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)
