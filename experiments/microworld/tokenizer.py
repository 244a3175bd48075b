"""A word-level tokenizer for the embedded model, built from the world's word list."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiments.microworld import world

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "\n")


def vocabulary() -> dict[str, int]:
    """Return the id of each token."""
    return {token: index for index, token in enumerate((*SPECIAL_TOKENS, *world.words()))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of lower-case words and punctuation, with ``<s>`` before every text.

    A newline is a token. So is a colon that ends a question's opening; others are part of their word (``morning:``).
    """
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[ \t]+"), "removed"),
            pre_tokenizers.Split(Regex(r"[\n.,?]|(?<=question|answer|^):"), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
