"""Perplexity equals a plain loop of transformers, is resumed exactly, and is compared document by document."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as functional
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from chai.gguf_files import convert
from experiments.cli import main
from experiments.config.schema import CorpusConfig
from experiments.evaluation import perplexity
from experiments.evaluation.perplexity import cut_windows, tokenize
from experiments.offline.python_texts import read_python_texts
from experiments.runs.folder import RunFolder
from experiments.system.interrupts import Interrupted
from experiments.tables.perplexity import paired_change
from tests.chai.gguf_models import small_model, write_gguf

TEXT = "abcd ab\ncd efgh" * 20
TEXTS = ["abcdabcd", "h" * 50, "é", "efgh" * 30, "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with its tokenizer."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return convert(write_gguf(small_model(), cache / "small.gguf"))


def measure(folder, tmp_path, *overrides, method="mha"):
    """Run the experiment on the model; return result.json and samples.parquet."""
    code = main(
        ["experiment=perplexity", f"method={method}", f"model.path={folder}", "model.clusters=2", "device=cpu",
         f"results_dir={tmp_path}", *overrides]
    )  # fmt: skip
    assert code == 0
    path = max(tmp_path.glob(f"perplexity/*/{method}/*/*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(path.read_text()), pd.read_parquet(path.with_name("samples.parquet"))


def plain_loop(folder, text, window, stride, prefix):
    """Sum of nats and number of scored tokens, one window at a time without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    total, count, scored = 0.0, 0, set()
    for begin in range(0, len(ids), stride):
        part = prefix + ids[begin : begin + window - len(prefix)]
        with torch.no_grad():
            logs = functional.log_softmax(model(torch.tensor([part]), use_cache=False).logits[0].double(), -1)
        for place in range(1, len(part)):
            position = begin + place - len(prefix)
            if position >= begin and position not in scored:
                scored.add(position)
                total -= float(logs[place - 1, part[place]])
                count += 1
        if begin + window - len(prefix) >= len(ids):
            break
    return total, count


@pytest.mark.parametrize(("stride", "special"), [(None, False), (5, False), (7, True)])
def test_equals_a_plain_loop(folder, tmp_path, stride, special):
    (tmp_path / "text.txt").write_text(TEXT)
    result, frame = measure(
        folder, tmp_path, f"corpus.path={tmp_path}/text.txt", "experiment.window=16", "experiment.tokens=null",
        f"experiment.stride={stride or 'null'}", f"experiment.special_tokens={special}", "batch_size=3",
    )  # fmt: skip
    prefix = AutoTokenizer.from_pretrained(folder)("").input_ids if special else []
    total, count = plain_loop(folder, TEXT, 16, stride or 16, prefix)
    assert result["n"] == count == frame.tokens.sum()
    assert abs(result["metrics"]["nats_per_token"] - total / count) < 1e-6
    assert result["metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
    assert len(frame) == result["windows"] and result["documents"] == result["windows"]


def test_documents_tokens_and_bytes_of_a_jsonl_file(folder, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    result, frame = measure(folder, tmp_path, f"corpus.path={path}", "experiment.window=32")
    totals = [plain_loop(folder, text, 32, 32, []) for text in TEXTS]
    scored = [index for index, (_, count) in enumerate(totals) if count]
    assert frame.doc_id.tolist() == scored and len(scored) >= 3
    assert frame.tokens.tolist() == [totals[index][1] for index in scored]
    assert frame.nats.to_numpy() == pytest.approx([totals[index][0] for index in scored], rel=1e-5)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(frame.nats.sum() / math.log(2) / frame.bytes.sum())
    limited, _ = measure(folder, tmp_path, f"corpus.path={path}", "experiment.window=32", "limit=2")
    assert limited["n"] == frame.tokens[:2].sum()
    capped, _ = measure(folder, tmp_path, f"corpus.path={path}", "experiment.window=32", "experiment.tokens=9")
    assert capped["n"] < limited["n"]
    begun, frame = measure(
        folder, tmp_path, f"corpus.path={path}", "experiment.window=32", "experiment.document_tokens=7"
    )
    assert frame.doc_id.tolist() == scored and frame.tokens.max() == 6
    expected = [min(6, totals[index][1]) for index in scored]
    assert frame.tokens.tolist() == expected and begun["n"] == sum(expected)


def test_bytes_are_those_of_the_text():
    alphabet = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    plain = Tokenizer(BPE(alphabet, []))  # a token for each byte
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    for text in ("abcd" * 7, "aébcd€ é", ""):
        document = tokenize(text, tokenizer)
        assert (document.byte_ends[-1] if text else 0) == len(text.encode())
        windows = list(cut_windows(0, document, 4, 4, [1]))  # with a prefix every token is scored
        assert sum(window.bytes for window in windows) == len(text.encode())
        assert sum(len(window.tokens) - window.first for window in windows) == len(document.ids)


def test_a_stopped_run_goes_on_and_equals_an_unbroken_one(folder, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    options = (f"corpus.path={tmp_path}/text.txt", "experiment.window=8", "batch_size=2")
    whole, frame = measure(folder, tmp_path / "whole", *options, method="chai")
    calls = []

    def stop(self, done, total):
        calls.append(done)
        if len(calls) == 3:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "progress", stop)
        with pytest.raises((Interrupted, SystemExit)):
            measure(folder, tmp_path / "part", *options, method="chai")
    assert not list((tmp_path / "part").rglob("result.json"))
    resumed, again = measure(folder, tmp_path / "part", *options, method="chai")
    assert resumed["resumed"] == calls[2] == 6
    pd.testing.assert_frame_equal(frame, again)
    assert resumed["metrics"] == whole["metrics"] and resumed["savings"] == whole["savings"]


def test_every_method_is_scored_and_compared_with_mha(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    options = (f"corpus.path={tmp_path}/text.txt", "experiment.window=16")
    base, base_frame = measure(folder, tmp_path, *options)
    for method in ("chai", "random", "chai_qkv", "spatten"):
        result, frame = measure(folder, tmp_path, *options, method=method)
        assert result["n"] == base["n"] and result["settings_id"] == base["settings_id"]
        mean, low, high = paired_change(base_frame, frame)
        assert mean == pytest.approx(result["metrics"]["nats_per_token"] - base["metrics"]["nats_per_token"])
        assert low <= mean <= high
        assert f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" in capsys.readouterr().out
    equal, _ = measure(folder, tmp_path, *options, "method.clusters=4", method="chai")
    assert equal["metrics"]["nats_per_token"] == pytest.approx(base["metrics"]["nats_per_token"], abs=1e-6)


def test_the_interval_of_equally_long_documents_is_that_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    base = pd.DataFrame({"doc_id": range(12), "doc_hash": "x", "tokens": 10, "bytes": 0, "nats": generator.random(12)})
    other = base.assign(nats=base.nats + generator.normal(0.3, 0.2, 12))
    expected = stats.ttest_rel(other.nats / 10, base.nats / 10).confidence_interval(0.95)
    mean, low, high = paired_change(base, other)
    assert (low, high) == pytest.approx((expected.low, expected.high)) and low < mean < high
    with pytest.raises(ValueError, match="not the same documents"):
        paired_change(base, other[1:])


def test_mistakes_are_refused_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("")
    cases = {
        "experiment.window=999": (2, "experiment.window is 999; the model has 128 positions"),
        "limit=2": (2, "a text file is one document, which limit does not shorten; set experiment.tokens"),
        "experiment.document_tokens=1": (2, "experiment: document_tokens is 1; valid: 2 or more"),
        "experiment.window=1": (2, "experiment: window is 1; valid: 2 or more"),
        "experiment.stride=0": (2, "experiment: stride is 0; valid: 1 to 64 (the window), or null"),
        "corpus.python=books": (2, "corpus.python is 'books'; valid: docs, code, packages, null"),
        f"corpus.path={tmp_path}/text.txt": (1, "corpus text has no document of two tokens"),
        f"corpus.path={tmp_path}/missing.txt": (1, "missing.txt: No such file or directory"),
    }
    common = ["experiment=perplexity", "method=mha", f"model.path={folder}", "device=cpu", f"results_dir={tmp_path}/r"]
    for override, (code, message) in cases.items():
        source = [f"corpus.path={tmp_path}/text.txt"] if override == "limit=2" else []
        assert (
            main([*common, *source, *([] if "window" in override else ["experiment.window=64"]), override]) == code
        ), override
        assert message in " ".join(capsys.readouterr().err.split()), override
    assert main([*common, "experiment.window=8", "corpus=micro", "experiment.tokens=null"]) == 2
    assert "corpus micro is endless: set experiment.tokens or limit" in capsys.readouterr().err
    assert main([*common, "experiment.window=8", "corpus=micro", "corpus.joined=true"]) == 2
    assert "corpus micro is endless: set limit" in capsys.readouterr().err


def test_the_texts_of_python_are_there(folder, tmp_path):
    for corpus in ("python_docs", "python_code", "python_packages"):
        result, _ = measure(
            folder, tmp_path, f"corpus={corpus}", "experiment.window=32", "experiment.tokens=200", "limit=3"
        )
        assert result["task"] == corpus and result["n"] > 100 and result["corpus"].startswith("Python 3.")
    texts = [set(read_python_texts(kind)) for kind in ("docs", "code", "packages")]
    assert all(len(one) > 30 for one in texts)
    assert not texts[2] & (texts[0] | texts[1])  # a head profile of it can be evaluated on the others


def test_joined_texts_are_one_document_in_their_own_order(folder, tmp_path):
    (tmp_path / "whole.txt").write_text("\n\n".join(TEXTS[:4]))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = ("experiment.window=16", "experiment.stride=8")
    whole, frame = measure(folder, tmp_path, f"corpus.path={tmp_path}/whole.txt", *options)
    joined = (f"corpus.path={tmp_path}/texts.jsonl", "corpus.joined=true", "limit=4", "seed=3")
    result, again = measure(folder, tmp_path, *joined, *options)
    assert result["metrics"] == whole["metrics"] and result["n"] == whole["n"]
    pd.testing.assert_frame_equal(frame, again)


def test_a_joined_corpus_is_read_as_far_as_its_tokens_need():
    read = []

    def texts(corpus, seed):
        for number in range(9):
            read.append(number)
            yield "x" * 40

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "read_texts", texts)
        (text,) = perplexity.corpus_texts(CorpusConfig(name="own", hub_id="own/own", joined=True), 0, None, 3)
    assert read == [0, 1, 2] and text == "\n\n".join(["x" * 40] * 3)


def test_special_tokens_before_a_text_alone_are_its_prefix(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = f"{tokenizer.bos_token} $A {tokenizer.eos_token}"
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ends)
    assert perplexity.leading_tokens(tokenizer) == [tokenizer.bos_token_id]
