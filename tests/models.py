"""Small random models of every supported family, each with a config object of its own."""

from __future__ import annotations

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
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
#: Local and global layers; small numbers that are reached: a window of 8 tokens, scores capped at 5.
LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_inner": 96, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
TOKENS = {name: SHAPE[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)),
    "mistral_sliding": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**GROUPED, "num_key_value_heads": 2})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, rotary_pct=0.25)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**{**GROUPED, "num_key_value_heads": 1})),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, **LOCAL, query_pre_attn_scalar=16, attn_logit_softcapping=5.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, **LOCAL, query_pre_attn_scalar=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE, num_key_value_heads=4, sliding_window=None)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**GROUPED, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    ),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SHAPE, num_key_value_heads=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **TOKENS, scale_attn_by_inverse_layer_idx=True)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(**OPT, num_kv_heads=4, new_decoder_architecture=True, ffn_hidden_size=96)
    ),
    "falcon_multi_query": lambda: FalconForCausalLM(FalconConfig(**OPT, ffn_hidden_size=96)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**SHAPE, num_key_value_heads=4, qk_layernorm=True)),
}


def make_nested_model() -> PreTrainedModel:
    """A random model of text and images: its configuration holds that of the text model inside."""
    text = {**GROUPED, **LOCAL, "query_pre_attn_scalar": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **TOKENS)
    ).eval()


def make_latent_model() -> PreTrainedModel:
    """A random model with latent attention (DeepSeek): keys and values of a layer differ in width."""
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    config = DeepseekV3Config(**SHAPE, **sizes, num_key_value_heads=HEADS, first_k_dense_replace=LAYERS)
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).eval()


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in evaluation mode, its weights large enough that heads differ visibly."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped product that is the default has no fp64
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(4.0)
        elif "layernorm.norms" in name:  # of each head (StableLM): all ones, and no mistake of heads would show
            parameter.data.uniform_(0.5, 1.5)
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
