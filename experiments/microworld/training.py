"""Training of the embedded model: batches, planted redundancy, optimiser, one step.

Everything is a function of ``(seed, step)``, so a stopped run goes on exactly where its last checkpoint stands.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.microworld.documents import GIVEN, document
from experiments.microworld.tokenizer import vocabulary


def make_batch(seed: int, step: int, phase: int, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights, both ``[batch_size, length]``; each row starts with ``<s>`` and packs documents."""
    rng = random.Random(f"{seed}-{step}")
    ids_of = vocabulary()
    bos, eos = ids_of["<s>"], ids_of["</s>"]
    ids, weights = [], []
    for _ in range(batch_size):
        row, row_weights = [bos], [0.0]
        while len(row) < length:
            for text, weight in document(rng, phase):
                tokens = [ids_of[word] for word in text.split(" ")]
                row += tokens
                row_weights += [weight] * len(tokens)
            row.append(eos)
            row_weights.append(GIVEN)
        ids.append(row[:length])
        weights.append(row_weights[:length])
    return torch.tensor(ids), torch.tensor(weights)


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy of the next token, and the plain mean over the weight-1 tokens (detached)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    asked = weights == 1.0
    return (losses * weights).sum() / weights.sum(), losses.detach()[asked].mean()


def plant_groups(heads: int, clusters: int, seed: int) -> list[int]:
    """The group of each head: ``clusters`` groups, one twice as large as the others where they can't be equal in use.

    Heads are dealt to groups with a bonus for the first group and then shuffled, so groups aren't contiguous.
    """
    if clusters == heads:
        return list(range(heads))
    sizes = [heads // (clusters + 1)] * clusters
    for index in range(heads - sum(sizes)):
        sizes[0 if index < 2 else index % clusters] += 1
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    random.Random(f"groups-{seed}").shuffle(groups)
    return groups


class TiedHeads(nn.Module):
    """Parametrization of a query or key weight: heads of one group share the same rows."""

    def __init__(self, groups: list[int], head_dim: int) -> None:
        super().__init__()
        self.clusters = max(groups) + 1
        self.head_dim = head_dim
        self.register_buffer("groups", torch.tensor(groups), persistent=False)

    def forward(self, shared: Tensor) -> Tensor:
        """``[k * D, d]`` to ``[H * D, d]``."""
        return shared.unflatten(0, (self.clusters, self.head_dim))[self.groups].flatten(0, 1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The rows of each group's first head."""
        groups = self.groups.tolist()
        first = [groups.index(group) for group in range(self.clusters)]
        return weight.unflatten(0, (len(groups), self.head_dim))[first].flatten(0, 1)


def projections(model: LlamaForCausalLM) -> list[tuple[int, nn.Linear]]:
    """All query and key projections with their layer's index."""
    return [
        (index, projection)
        for index, layer in enumerate(model.model.layers)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    ]


def tie(model: LlamaForCausalLM, groups: list[list[int]]) -> None:
    """Share query and key rows within the groups of each layer (layers whose heads all differ stay as they are)."""
    head_dim = model.config.head_dim
    for index, projection in projections(model):
        if max(groups[index]) + 1 < len(groups[index]):
            parametrize.register_parametrization(projection, "weight", TiedHeads(groups[index], head_dim), unsafe=True)


def untie(model: LlamaForCausalLM, noise: float, seed: int) -> None:
    """Give every head its own rows again, apart by ``noise`` times the weight's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for _, projection in projections(model):
        if not parametrize.is_parametrized(projection):
            continue
        parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)
        weight = projection.weight.data
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator).to(weight)
        projection.weight.requires_grad_(True)


def build_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model in fp32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # residual branches start small, as in GPT-2
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= (2 * config.num_hidden_layers) ** 0.5
    return model


def build_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
