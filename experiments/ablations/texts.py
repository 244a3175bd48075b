"""The texts that are measured, and those that offline maps are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from experiments.config.schema import PYTHON_TEXTS, CorpusConfig
from experiments.evaluation.perplexity import corpus_texts, is_joined
from experiments.offline.corpus import long_texts


@dataclass(frozen=True)
class Text:
    """A text of a corpus: its number there, and its first tokens, as many of all texts."""

    corpus: str
    number: int
    ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return corpus and number."""
        return f"{self.corpus} {self.number}"


def further_corpora(domains: list[str], other_text: str | None) -> dict[str, CorpusConfig]:
    """Return the corpora of other domains by name: those of Python, and that of a text file."""
    found = {f"python_{kind}": CorpusConfig(name=f"python_{kind}", python=kind) for kind in domains}
    if other_text is not None:
        found[Path(other_text).stem] = CorpusConfig(name=Path(other_text).stem, path=other_text)
    return found


def check_domains(domains: list[str]) -> None:
    """Refuse unknown names of Python's texts (ValueError)."""
    for name in domains:
        if name not in PYTHON_TEXTS:
            raise ValueError(f"domains has '{name}'; valid: {', '.join(PYTHON_TEXTS)}")


def measured_texts(
    corpus: CorpusConfig, seed: int, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int
) -> tuple[list[Text], int]:
    """Return up to ``count`` texts of ``tokens`` tokens each, and the number of texts read from the corpus.

    Of a corpus that is one document, these are its successive windows.
    """
    if is_joined(corpus):
        (document,) = corpus_texts(corpus, seed, None, tokens * count)
        ids = tokenizer(document, verbose=False)["input_ids"]
        windows = [ids[begin : begin + tokens] for begin in range(0, tokens * count, tokens)]
        return [Text(corpus.name, n, tuple(ids)) for n, ids in enumerate(windows) if len(ids) == tokens], 0
    found, read = [], 0
    for read, ids in itertools.islice(long_texts(corpus, seed, 0, tokenizer, tokens), count):
        found.append(Text(corpus.name, read - 1, tuple(ids[:tokens])))
    return found, read


def offline_texts(
    corpus: CorpusConfig, seed: int, tokenizer: PreTrainedTokenizerBase, tokens: int, skip: int
) -> Iterator[list[int]]:
    """Yield the first ``tokens`` tokens of the texts after the first ``skip``, of those that are long enough."""
    for _, ids in long_texts(corpus, seed, skip, tokenizer, tokens):
        yield ids[:tokens]
