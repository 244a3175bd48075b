"""Passkey and needle tasks: a key in a long text, asked for at its end; made from a seed for a model's tokenizer.

The prompt is an instruction, the filler with the statement of the key at some depth, and a question whose answer begins
with a prefix that only the key completes. The filler is whole words of a text, read again from its start where it is
too short.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from omegaconf import DictConfig
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from experiments.offline.python_texts import read_python_texts
from experiments.runs.folder import RunError

#: Columns of the items that the samples keep: the length asked for and the prompt's own; the depth asked for and the
#: tokens before the statement of the key, without those of a chat template.
COLUMNS = ("length", "depth", "tokens", "key_at")
METRIC = "exact_match"
TRIES = 12  # sentence ends that a prompt may end its filler with
SENTENCES = (
    "The path follows the river to the old mill. Two boats lie on the bank in the sun. A dog sleeps under the bridge. "
    "In the village the baker opens his shop early. Children walk to school with their bags. The wind moves the leaves "
    "of the tall trees. Some clouds come over the hills in the evening. The farmer brings his cows home. Lights go on "
    "in the houses one by one. An owl calls from the forest. The night is quiet and the road is empty. In the morning "
    "the birds begin to sing again."
)
WORDS = (
    "anchor basket candle desert engine feather garden hammer island jacket kitchen ladder marble needle orange pepper "
    "ribbon saddle ticket violin window yellow bottle copper dragon forest guitar helmet lemon mirror parrot rocket "
    "silver tiger umbrella velvet walnut zebra butter castle"
).split()
NAMES = "Anna Boris Clara David Elena Frank Greta Henry Irene James Laura Martin Nora Oscar Paula Robert".split()
THINGS = "ring letter coin map watch book".split()
COLOURS = "red blue green white black brown silver yellow".split()
PLACES = "barn tower cellar garage kitchen garden chapel boat".split()


@dataclass(frozen=True)
class Kind:
    """A kind of key; ``{key}`` and other names in braces are drawn for each item."""

    instruction: str
    statement: str
    question: str
    prefix: str  # of the answer
    pattern: str  # of the answer in what the model generates: the first match counts
    new_tokens: int  # to generate
    draw: Callable[[random.Random], dict[str, str]]


def _draw_digits(rng: random.Random) -> dict[str, str]:
    return {"key": str(rng.randrange(10_000, 100_000))}


def _draw_word(rng: random.Random) -> dict[str, str]:
    return {"key": rng.choice(WORDS)}


def _draw_sentence(rng: random.Random) -> dict[str, str]:
    place = f"{rng.choice(COLOURS)} {rng.choice(PLACES)}"
    return {"who": rng.choice(NAMES), "what": rng.choice(THINGS), "key": place}


KINDS = {
    "digits": Kind(
        "There is a pass key in the text below. Find it and remember it.",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key in the text above?", "The pass key in the text above is", r"(\d+)", 8, _draw_digits,
    ),
    "word": Kind(
        "There is a secret word in the text below. Find it and remember it.",
        "The secret word is {key}. Remember it. {key} is the secret word.",
        "What is the secret word in the text above?", "The secret word in the text above is", r"([^\W\d_]+)", 8,
        _draw_word,
    ),
    "sentence": Kind(
        "Read the text below and answer the question after it.",
        "{who} hid the {what} in the {key}.",
        "Where did {who} hide the {what}?", "{who} hid the {what} in the", r"^\s*([^.,\n]*[^.,\s])", 12, _draw_sentence,
    ),
}  # fmt: skip


def definition(task: DictConfig) -> dict[str, Any]:
    """Return lm-eval's definition of the task, without its items."""
    kind = KINDS[task.key]
    take_answer = [{"function": "regex", "regex_pattern": kind.pattern}, {"function": "take_first"}]
    return {
        "task": task.name,
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,  # an example would be a second key, and longer than the prompt's length
        "doc_to_text": "{{prompt}}",
        "gen_prefix": "{{answer_prefix}}",
        "doc_to_target": "{{key}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": kind.new_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": take_answer}],
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }


def check(task: DictConfig, architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a RunError where a prompt does not fit into the model, or the key and the question not into a prompt."""
    room, new_tokens = resolve_max_length(architecture, tokenizer), KINDS[task.key].new_tokens
    if (longest := max(task.lengths)) + new_tokens > room:
        raise RunError(
            f"task '{task.name}' has prompts of {longest} tokens and generates {new_tokens}, and the model has {room} "
            f"positions; valid: task.lengths up to {room - new_tokens}"
        )
    maker = ItemMaker(task, tokenizer)
    for depth, repeat in itertools.product(task.depths, range(task.items_per_cell)):
        maker.make(min(task.lengths), depth, repeat)


def make_items(task: DictConfig, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return the items, all lengths and depths before any is repeated; an item does not depend on the others.

    Raises:
        RunError: The filler cannot be read, or a length has no room for the key and the question.
    """
    maker = ItemMaker(task, tokenizer)
    cells = itertools.product(range(task.items_per_cell), task.lengths, task.depths)
    return [maker.make(length, depth, repeat) for repeat, length, depth in cells]


class ItemMaker:
    """Makes items of up to a number of tokens of one tokenizer, counted with its special tokens and chat template."""

    def __init__(self, task: DictConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task, self.tokenizer, self.kind = task, tokenizer, KINDS[task.key]
        self.words = read_filler(task)
        self.ends = [end for end, word in enumerate(self.words, 1) if word[-1] in ".!?"] or [len(self.words)]

    def make(self, length: int, depth: float, repeat: int) -> dict[str, Any]:
        """Return an item whose prompt has exactly ``length`` tokens, or the most below it that was found.

        The filler ends at the end of a sentence, which is another one where a word of several tokens would leave a gap.
        """
        rng = random.Random(f"{self.task.seed}-{length}-{float(depth)}-{repeat}")
        drawn = self.kind.draw(rng)
        best: tuple[int, int, int] | None = None
        for end in rng.sample(self.ends, min(len(self.ends), TRIES)):
            found = (*self._fit(end, length, depth, drawn), end)
            best = max(best or found, found, key=lambda one: one[0])
            if best[0] == length:
                break
        assert best is not None
        tokens, count, end = best
        prompt, before = self._prompt(end, count, depth, drawn)
        return {
            "prompt": prompt, "answer_prefix": self.kind.prefix.format(**drawn), "key": drawn["key"],
            "length": length, "depth": float(depth), "tokens": tokens, "key_at": self._count_plain(before),
        }  # fmt: skip

    def _fit(self, end: int, length: int, depth: float, drawn: dict[str, str]) -> tuple[int, int]:
        """Return the tokens and the words of filler of the longest prompt that fits."""
        low, tokens = 0, self._tokens(end, 0, depth, drawn)
        if tokens > length:
            raise RunError(
                f"task '{self.task.name}': the key and the question alone take {tokens} tokens of the model; "
                f"task.lengths has {length}"
            )
        # `low` words of filler fit, in `found` tokens; `high` words do not, at the `rate` of a token or more for each.
        high, found, rate = length + 1, tokens, 1.0
        while high - low > 1 and found < length:
            count = low + min(max(int((length - found) / rate), 1), high - low - 1)
            tokens = self._tokens(end, count, depth, drawn)
            rate = max((tokens - found) / (count - low), 1.0)
            if tokens > length:
                high = count
            else:
                low, found = count, tokens
        return found, low

    def _tokens(self, end: int, count: int, depth: float, drawn: dict[str, str]) -> int:
        """Return the tokens of a prompt as lm-eval sends it, with the prefix of the answer."""
        prompt, prefix = self._prompt(end, count, depth, drawn)[0], self.kind.prefix.format(**drawn)
        if not self.task.apply_chat_template:
            return self._count_plain(f"{prompt} {prefix}")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": prefix}]
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=False, continue_final_message=True
        )
        return self._count_plain(str(text))

    def _count_plain(self, text: str) -> int:
        special = not has_bos_prefix(text, getattr(self.tokenizer, "bos_token", None))
        return len(self.tokenizer(text, **({} if special else {"add_special_tokens": False})).input_ids)

    def _prompt(self, end: int, count: int, depth: float, drawn: dict[str, str]) -> tuple[str, str]:
        """Return the prompt with ``count`` words of filler up to the sentence end ``end``, and its part before the key.

        The key is at the start of a sentence of the filler, at its start or at its end, whichever is nearest to the
        depth.
        """
        total = len(self.words)
        filler = [self.words[place % total] for place in range(end - count, end)]
        starts = [0, *(place for place, word in enumerate(filler, 1) if word[-1] in ".!?"), count]
        cut = min(starts, key=lambda start: abs(start - depth * count))
        statement, question = self.kind.statement.format(**drawn), self.kind.question.format(**drawn)
        head = f"{self.kind.instruction}\n\n"
        text = " ".join([*filler[:cut], statement, *filler[cut:]])
        return f"{head}{text}\n\n{question}", head + " ".join(filler[:cut])


def read_filler(task: DictConfig) -> Sequence[str]:
    """Return the words of the filler; a RunError if it cannot be read or has none."""
    if task.text is not None:
        path = Path(task.text)
        try:
            words = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if not words:
            raise RunError(f"task.text={path} has no words")
        return words
    if task.filler == "sentences":
        return SENTENCES.split()
    return " ".join(read_python_texts(task.filler.removeprefix("python_"))).split()
