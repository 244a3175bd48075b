"""Scoring goes on where it stopped, to the very same numbers; answers are of one run, and whole."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pandas as pd
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from chai.loading import ModelSource, load_model, load_tokenizer
from chai.methods import Mha
from experiments.config.compose import compose_config
from experiments.config.schema import REPOSITORY
from experiments.evaluation import responses
from experiments.evaluation.lm import MethodLM
from experiments.evaluation.responses import BatchResponses, SavedResponses, code_digest
from experiments.execute import run_config

BATCH = 4


@pytest.fixture(scope="module")
def model(workplace):
    source = ModelSource(name="small", path=str(workplace / "small"), device="cpu")
    return load_model(source), load_tokenizer(source)


def inputs_of(lm, requests):
    """What goes into each forward pass, and the answers."""
    seen, call = [], lm._model_call

    def watched(inps, *rest, **more):
        seen.append(inps.tolist())
        return call(inps, *rest, **more)

    lm._model_call = watched
    return lm._loglikelihood_tokens(requests, disable_tqdm=True), seen


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_and_answers_are_those_of_plain_lm_eval(model, batch_size):
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 60, (count,), generator=generator).tolist()  # noqa: E731
    requests = [(("", ""), draw(2 + index % 9), draw(1 + index % 4)) for index in range(25)]
    requests += [(("", ""), requests[3][1], [*requests[3][2][:-1], 7]), (("", ""), *requests[9][1:])]  # share a row
    tokens = requests[5][1] + requests[5][2]
    requests.append((("", ""), tokens[:1], tokens[1:]))  # the same text, split elsewhere
    theirs = HFLM(pretrained=model[0], tokenizer=model[1], batch_size=batch_size)
    assert inputs_of(MethodLM(*model, Mha(), batch_size), requests) == inputs_of(theirs, requests)


def overrides_of(workplace, results, method):
    settings = ["method.clusters=2"] if method in ("chai", "random") else []
    return [
        f"results_dir={results}", f"model.path={workplace / 'small'}", f"task.data_dir={workplace / 'data'}",
        "task=micro_hellaswag", f"batch_size={BATCH}", f"method={method}", *settings,
    ]  # fmt: skip


def outcome(results):
    """A run's result without what is about this run of it alone, its items, and its folder."""
    (path,) = results.rglob("result.json")
    result = json.loads(path.read_text())
    return {key: result[key] for key in result if key not in ("seconds", "resumed")}, result["resumed"], path.parent


@pytest.mark.parametrize("method", ["mha", "chai", "random", "spatten"])
def test_an_interrupted_scoring_repeats_no_batch_and_ends_with_the_same_numbers(
    workplace, tmp_path, monkeypatch, method
):
    call, forwards = MethodLM._model_call, []

    def counted(self, *args, **kwargs):
        forwards.append(1)
        if stop and len(forwards) > stop:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MethodLM, "_model_call", counted)
    stop = 0
    assert run_config(compose_config(overrides_of(workplace, tmp_path / "whole", method))) == 0
    whole = len(forwards)
    cut = compose_config(overrides_of(workplace, tmp_path / "cut", method))
    stops = (whole // 2, 2) if method == "mha" else (whole // 2,)  # at half, and once more
    for after in stops:
        stop = after
        forwards.clear()
        with pytest.raises(SystemExit) as stopped:
            run_config(cut)
        assert stopped.value.code == 130
    stop = 0
    forwards.clear()
    assert run_config(cut) == 0
    assert len(forwards) == whole - sum(stops)
    expected, none, _ = outcome(tmp_path / "whole")
    result, resumed, folder = outcome(tmp_path / "cut")
    assert result == expected
    assert none == 0 < resumed < 48
    items = [pd.read_parquet(next(tmp_path.glob(f"{name}/**/samples.parquet"))) for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*items, check_exact=True)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "status.json", "result.json", "samples.parquet"}


def test_force_and_other_code_start_afresh(workplace, tmp_path, monkeypatch, capsys):
    call, forwards = MethodLM._model_call, []

    def stopping(self, *args, **kwargs):
        forwards.append(1)
        if len(forwards) == 5:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MethodLM, "_model_call", stopping)
    for more, said in ((["force=true"], ""), ([], "discarding saved responses: code changed")):
        overrides = overrides_of(workplace, tmp_path / str(bool(said)), "mha")
        forwards.clear()
        with pytest.raises(SystemExit):
            run_config(compose_config(overrides))
        with monkeypatch.context() as patch:
            if said:
                patch.setattr("experiments.evaluation.resume.code_digest", lambda: "other")
            assert run_config(compose_config([*overrides, *more])) == 0
        assert outcome(tmp_path / str(bool(said)))[1] == 0
        assert said in capsys.readouterr().out


def batch_of(value: float) -> BatchResponses:
    return BatchResponses(
        [(value, True), (-2.5, False)], {"sequences": 2, "held": 3, "held_mha": 4, "key_heads": [[1]]}, 0.5
    )


def test_answers_come_back_as_they_were_but_for_a_torn_last_one(tmp_path):
    path, about = tmp_path / "answers.jsonl", {"code": "a", "versions": {"torch": "1"}}
    written = SavedResponses(path, about)
    values = {"one": -0.1 + 0.2, "two": -1e-17, "three": -float(torch.tensor(1.1))}
    for key, value in values.items():
        written.add(key, batch_of(value))
    written.close()
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 30):
        path.write_bytes(whole[:cut])
        again = SavedResponses(path, about)
        assert again.find("three") is None
        assert again.find("one") == batch_of(values["one"]) and again.find("two") == batch_of(values["two"])
        assert (again.restored, again.seconds, again.discarded) == (4, 1.0, [])
        again.add("three", batch_of(values["three"]))
        again.close()
        assert path.read_bytes() == whole
    other = SavedResponses(path, {**about, "versions": {"torch": "2"}})
    assert other.find("one") is None and other.discarded == ["versions"]
    other.close()
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("accepted", [0, 20])
def test_an_answer_that_does_not_fit_on_the_disk_is_taken_back(tmp_path, monkeypatch, accepted):
    path = tmp_path / "answers.jsonl"
    written = SavedResponses(path, {})
    written.add("one", batch_of(-1.0))
    whole, write, left = path.read_bytes(), os.write, [accepted]

    def full(descriptor, data):
        room = left.pop() if left else 0
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:room])

    with monkeypatch.context() as patch:
        patch.setattr(responses.os, "write", full)
        with pytest.raises(OSError, match="No space left on device.*answers.jsonl"):
            written.add("two", batch_of(-2.0))
    assert path.read_bytes() == whole
    written.add("two", batch_of(-2.0))
    written.close()
    assert SavedResponses(path, {}).find("two") == batch_of(-2.0)


def test_the_digest_covers_the_code_that_responses_depend_on(tmp_path, monkeypatch):
    for name in ("chai", "experiments/evaluation"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(responses, "REPOSITORY", tmp_path)
    digests = {code_digest()}
    for name in ("chai/heads.py", *(f"experiments/evaluation/{part}.py" for part in ("lm", "responses", "tasks"))):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        digests.add(code_digest())
    assert len(digests) == 5
    (tmp_path / "experiments/evaluation/accuracy.py").write_text("")
    assert code_digest() in digests
