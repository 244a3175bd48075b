"""Training of the embedded model: batches, planted redundancy, optimizers.

Everything is a function of ``(seed, step)``, so that a stopped run resumes exactly at its last checkpoint.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.microworld import world
from experiments.microworld.documents import ANSWER_WEIGHT, CONTEXT_WEIGHT, document
from experiments.microworld.tokenizer import vocabulary

FACTS = 0.625  # share of dimensions and neurons for facts, which take more to learn than days
CONSTANT = 4.0  # value that the embeddings of all words of a topic share
DISTANCES = (1, 2, 3, 1, 2, 3)  # tokens back that groups of the first layer start at
SHARPNESS = 16.0  # scores there


def make_batch(seed: int, step: int, phase: int, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and loss weights ``[batch_size, length]``; each row starts with ``<s>`` and packs documents."""
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
            row_weights.append(CONTEXT_WEIGHT)
        ids.append(row[:length])
        weights.append(row_weights[:length])
    return torch.tensor(ids), torch.tensor(weights)


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean cross-entropy of the next token, and the mean over the answers (detached)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum(), losses.detach()[weights == ANSWER_WEIGHT].mean()


def plant_groups(heads: int, clusters: int, seed: int) -> list[int]:
    """Return the group of each head: larger and smaller groups, their heads shuffled by the seed."""
    # Sizes of four groups of 16 heads: 5, 5, 3 and 3.
    sizes = [heads // clusters + (index < heads % clusters) for index in range(clusters)]
    for index in range(clusters // 2):
        if sizes[-1 - index] > 1:
            sizes[index] += 1
            sizes[-1 - index] -= 1
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    random.Random(f"groups-{seed}").shuffle(groups)
    return groups


def plant_topics(heads: int, counts: list[int], seed: int) -> dict[str, list[list[int]]]:
    """Return the group of each head in each layer, for each topic; the groups of the topics are unrelated."""
    facts, days = (
        [plant_groups(heads, count, seed + start + layer) for layer, count in enumerate(counts)] for start in (0, 1000)
    )
    # In the first layer no head is the first of its group for both topics: look_back needs them apart.
    attempt = 0
    while set(leaders(facts[0])) & set(leaders(days[0])) and attempt < 100_000:  # few heads may not allow it
        attempt += 1
        days[0] = plant_groups(heads, counts[0], seed + 2000 + attempt)
    return {"facts": facts, "days": days}


def leaders(groups: list[int]) -> list[int]:
    """Return the first head of each of the groups that :func:`look_back` starts at a distance."""
    return [groups.index(group) for group in range(min(len(DISTANCES), max(groups) + 1))]


def topic_columns(size: int) -> dict[str, slice]:
    """Return the dimensions of the residual stream that belong to each topic, and to the special tokens."""
    shared = max(size // 32, 1)
    facts = round(FACTS * (size - shared))
    return {"facts": slice(0, facts), "days": slice(facts, size - shared), "special": slice(size - shared, size)}


class TiedHeads(nn.Module):
    """Parametrization of a query or key weight: heads of one group share the same rows, in each topic's columns."""

    def __init__(self, groups: dict[str, list[int]], head_dim: int, columns: dict[str, slice]) -> None:
        super().__init__()
        self.groups, self.head_dim, self.columns = groups, head_dim, columns
        self.clusters = max(map(max, groups.values())) + 1

    def forward(self, shared: Tensor) -> Tensor:
        """Expand ``[k * D, d]`` to ``[H * D, d]``."""
        rows = shared.unflatten(0, (self.clusters, self.head_dim))
        parts = [rows[groups][..., self.columns[topic]] for topic, groups in self.groups.items()]
        return torch.cat(parts, -1).flatten(0, 1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the rows of each group's first head."""
        parts = []
        for topic, groups in self.groups.items():
            rows = weight.unflatten(0, (len(groups), self.head_dim))[..., self.columns[topic]]
            parts.append(rows[[groups.index(min(cluster, max(groups))) for cluster in range(self.clusters)]])
        return torch.cat(parts, -1).flatten(0, 1)


def tie(model: LlamaForCausalLM, groups: dict[str, list[list[int]]]) -> None:
    """Share query and key rows within the groups of each layer (layers whose heads all differ stay as they are)."""
    head_dim, columns = model.config.head_dim, topic_columns(model.config.hidden_size)
    for index, layer in enumerate(model.model.layers):
        by_topic = {topic: layers[index] for topic, layers in groups.items()}
        heads = len(by_topic["facts"])
        if max(by_topic["facts"]) + 1 < heads:
            by_topic["special"] = [0] * heads  # these tokens look alike to all heads
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                tied = TiedHeads(by_topic, head_dim, columns)
                parametrize.register_parametrization(projection, "weight", tied, unsafe=True)


def split_topics(model: LlamaForCausalLM) -> None:
    """Keep the topics apart for good: words, values and neurons of one read and write its dimensions alone."""
    columns, head_dim = topic_columns(model.config.hidden_size), model.config.head_dim
    embedding = model.model.embed_tokens.weight
    topic_of = {word: topic for topic, words in world.topics().items() for word in words}
    mask = torch.zeros_like(embedding)
    ids = vocabulary()
    for word, index in ids.items():
        mask[index, columns[topic_of.get(word, "special")]] = 1
    confine(embedding, mask)
    for word, topic in topic_of.items():  # all words of a topic share a constant (look_back)
        embedding.data[ids[word], columns[topic].start] = CONSTANT
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reading, writing, unit in (
            ((attention.v_proj,), attention.o_proj, head_dim),  # a part of each head's values
            ((mlp.gate_proj, mlp.up_proj), mlp.down_proj, mlp.down_proj.in_features),  # a part of the neurons
        ):
            mask = torch.zeros(writing.in_features // unit, unit, model.config.hidden_size)
            mask[:, : round(FACTS * unit), columns["facts"]] = 1
            mask[:, round(FACTS * unit) :, columns["days"]] = 1
            mask = mask.flatten(0, 1)
            for projection in reading:
                confine(projection.weight, mask)
            confine(writing.weight, mask.t())


def confine(weight: nn.Parameter, mask: Tensor) -> None:
    """Zero a weight where the mask is zero, now and in training; the mean length of its rows is preserved."""
    weight.data.mul_(mask * (mask.numel() / mask.sum()) ** 0.5)
    # Both optimizers preserve zeros without a gradient; Muon does because the mask consists of blocks.
    weight.register_hook(lambda gradient: gradient * mask.to(gradient))


def untie(model: LlamaForCausalLM, noise: float, seed: int) -> None:
    """Give every head its own rows again, apart by ``noise`` times the weight's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for projection in filter(parametrize.is_parametrized, model.modules()):
        parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)
        weight = projection.weight.data
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator).to(weight)
        projection.weight.requires_grad_(True)


def build_model(config: LlamaConfig, groups: dict[str, list[list[int]]], seed: int) -> LlamaForCausalLM:
    """Return a new fp32 model with tied groups, initialized close to a solution that looks words up."""
    # From here looking a word up is learned in some 150 steps; from a plain initialization it was not learned in 900.
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight)
    # Queries match keys of the same content and heads write what they read (Trockman & Kolter, 2023).
    for layer in model.model.layers:
        attention, residual = layer.self_attn, (2 * config.num_hidden_layers) ** -0.5
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            nn.init.orthogonal_(projection.weight)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.t() * residual)
        layer.mlp.down_proj.weight.data.mul_(residual)
    split_topics(model)
    for topic, layers in groups.items():
        look_back(model, layers[0], topic_columns(config.hidden_size)[topic])
    tie(model, groups)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, groups: list[int], columns: slice) -> None:
    """Start groups of the first layer at fixed distances for a topic: group ``i`` attends ``DISTANCES[i]`` tokens back.

    From the constant that all words of the topic share, keys take a vector ``a`` and queries the same vector turned
    back by the distance, so the rotary scores peak there. Heads of one run of distances write alike: a word that was
    one token back for a query is found again where it is two tokens back for a key.
    """
    attention, size = model.model.layers[0].self_attn, model.config.head_dim
    turns = model.model.rotary_emb.inv_freq  # radians a token, for pairs (i, i + size / 2)
    a = torch.zeros(size)
    a[: size // 4] = (SHARPNESS * 4 * size**0.5 / size) ** 0.5
    first_half, second_half = a.chunk(2)
    heads = leaders(groups)
    for place, (head, distance) in enumerate(zip(heads, DISTANCES, strict=False)):
        rows = slice(head * size, (head + 1) * size)
        cos, sin = (turns * distance).cos(), (turns * distance).sin()
        turned = torch.cat([first_half * cos + second_half * sin, second_half * cos - first_half * sin])
        for projection, vector in ((attention.k_proj, a), (attention.q_proj, turned)):
            projection.weight[rows, columns] *= 0.1
            projection.weight[rows, columns.start] = vector / CONSTANT
        nearest = heads[place - distance + 1]  # the head at distance 1 of this run
        first = slice(nearest * size, (nearest + 1) * size)
        attention.v_proj.weight[rows] = attention.v_proj.weight[first]
        attention.o_proj.weight[:, rows] = attention.o_proj.weight[:, first]


def build_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
