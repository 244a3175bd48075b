"""Small random models of every supported family, each with a config object of its own."""

from __future__ import annotations

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LAYERS, HEADS, VOCABULARY = 3, 8, 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 4, "head_dim": 8}
OPT = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)),
    "mistral_sliding": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**GROUPED, "num_key_value_heads": 2})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, rotary_pct=0.25)),
}


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in evaluation mode, its weights large enough that heads differ visibly."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(4.0)
    return model.eval()


def make_batch(lengths: list[int], seed: int = 0, side: str = "left") -> dict[str, torch.Tensor]:
    """Random token ids of these lengths with their attention mask, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def clusters_of(cache, layers: int = LAYERS) -> list:
    """Return assignment and representatives of each layer of a cache; ``None`` for a layer without clusters."""
    found = [cache.clusters(layer) for layer in range(layers)]
    return [None if item is None else (item.assignment, item.representatives) for item in found]
