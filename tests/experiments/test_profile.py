"""``experiment=profile`` from the command line to the method that uses it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import IterableDataset
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.metrics import adjusted_rand_score

import experiments.offline.profile_heads
from chai.clustering.num_clusters import plateau
from chai.offline.head_profile import HeadProfile
from chai.offline.stability import measure_stability
from experiments.config.compose import compose_config
from experiments.config.schema import REPOSITORY, CorpusConfig
from experiments.execute import run_config
from experiments.offline.corpus import read_texts
from experiments.runs.files import read_json
from experiments.runs.folder import RunError
from experiments.tables.head_profile import show_head_profile

RULES = ("plateau", "knee", "saving", "error")
RECIPE = REPOSITORY / "experiments" / "microworld" / "model" / "recipe.json"
FEW = ["experiment=profile", "profile.samples=48", "profile.history_samples=8"]


def start(results: Path, *overrides: str) -> int:
    return run_config(compose_config([*FEW, f"results_dir={results}", *overrides]))


def folder_of(results: Path, model: str = "tiny") -> Path:
    (folder,) = (results / "profile" / model).glob("*/*/*")
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A profile of the embedded model."""
    results = tmp_path_factory.mktemp("results")
    assert start(results) == 0
    return folder_of(results)


def test_the_planted_clusters_are_found(done):
    """Their number within one in at least three of four layers, and the groups themselves."""
    profile, planted = HeadProfile.load(done), json.loads(RECIPE.read_text())["planted_groups"]["facts"]
    right = [abs(k - len(set(groups))) <= 1 for k, groups in zip(profile.num_clusters, planted, strict=True)]
    assert sum(right) >= 3
    for layer, groups in enumerate(planted):
        found = profile.clusters(layer, len(set(groups))).assignment[0]
        assert adjusted_rand_score(groups, found.numpy()) >= 0.9


def test_the_planted_number_is_inside_the_interval_of_every_layer(done):
    """Bootstrap of the texts."""
    result, about = read_json(done / "result.json"), read_json(done / "profile.json")
    planted = [len(set(groups)) for groups in json.loads(RECIPE.read_text())["planted_groups"]["facts"]]
    spread = about["stability"]
    assert result["stability"] == spread and spread["level"] == 0.95 and spread["resamples"] == 1000
    assert planted == [8, 6, 4, 4]
    assert all(low <= k <= high for low, k, high in zip(spread["low"], planted, spread["high"], strict=True))
    assert about["rules"]["plateau"] == result["heads_kept"] and set(about["rules"]) == set(RULES)
    # It is that of the saved errors.
    errors = HeadProfile.load(done).arrays["sample_error"]
    assert errors.shape == (48, 4, 16)
    again = measure_stability(errors, lambda error: plateau(error, 0.01), seed=0)
    assert again.to_json() == spread


def test_the_printed_table_has_the_intervals(done, capsys):
    show_head_profile(done)
    said, spread = capsys.readouterr().out, read_json(done / "profile.json")["stability"]
    rows = [line.split() for line in said.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]
    assert [row[2] for row in rows] == [f"{a}-{b}" for a, b in zip(spread["low"], spread["high"], strict=True)]
    assert "bootstrap of the texts" in said


def test_a_profile_without_errors_of_single_texts_says_that_it_has_no_interval(tmp_path, capsys):
    assert start(tmp_path, "profile.combine=concatenated") == 0
    said = capsys.readouterr().out
    assert "no interval of the numbers of clusters: combine=concatenated" in said
    assert "No interval of the clusters" in said
    assert read_json(folder_of(tmp_path) / "result.json")["stability"] is None
    show_head_profile(REPOSITORY / "experiments" / "microworld" / "profile")  # of an earlier version
    assert "No interval of the clusters" in capsys.readouterr().out


def test_statistics_of_an_earlier_version_give_no_interval(done, tmp_path, capsys):
    """They are used, and the reason is said."""
    folder = tmp_path / done.relative_to(done.parents[4])
    shutil.copytree(done, folder)
    (folder / "status.json").unlink()
    with safe_open(folder / "statistics.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    new = ("series.sample_error", "within", "between")
    old = {name: array for name, array in tensors.items() if name not in new}
    save_file(old, folder / "statistics.safetensors", metadata=metadata)
    assert start(tmp_path) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "reusing statistics" in said and "statistics are of an earlier version" in said
    assert "sample_error" not in HeadProfile.load(folder).arrays
    assert HeadProfile.load(folder).num_clusters == HeadProfile.load(done).num_clusters


class Stream:
    """A streamed data set of the hub: shuffled by a window, then skipped, as ``datasets`` does it."""

    def __init__(self, texts):
        self.stream = IterableDataset.from_generator(lambda: ({"text": text} for text in texts))

    def __call__(self, hub_id, subset, *, split, revision, streaming):
        assert (hub_id, subset, split, streaming) == ("allenai/c4", "en", "train", True)
        return self.stream


@pytest.mark.parametrize("source", ["hub", "jsonl", "txt"])
def test_the_order_of_the_texts_follows_the_seed(source, tmp_path, monkeypatch):
    texts = [f"text {number}" for number in range(300)]
    corpus = CorpusConfig("c4", column="text")
    if source == "hub":
        corpus.hub_id, corpus.subset = "allenai/c4", "en"
        monkeypatch.setattr(datasets, "load_dataset", Stream(texts))
    else:
        path = tmp_path / f"c4.{source}"
        path.write_text("\n\n".join(json.dumps({"text": text}) if source == "jsonl" else text for text in texts))
        corpus.path = str(path)

    def read(seed, skip=0, most=50):
        return list(itertools.islice(read_texts(corpus, seed, skip), most))

    assert read(0) == texts[:50]  # as earlier versions read them: run ids of seed 0 stay what they were
    assert read(1) == read(1) and read(1) != read(2) and read(1) != texts[:50]
    assert len(set(read(1))) == 50 and not set(read(1)) <= set(texts[:60])
    assert read(1, skip=20) == read(1, most=70)[20:]  # an interrupted pass goes on in the same order
    assert sorted(read(1, most=1000)) == sorted(texts)


def test_a_bad_line_is_named_in_any_order(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x"}\nno json\n{"text": "y"}\n')
    for seed in range(3):
        with pytest.raises(RunError, match="line 2, is not valid JSON"):
            list(read_texts(CorpusConfig("bad", path=str(path)), seed))
    with pytest.raises(RunError, match=r"none.jsonl: No such file"):
        list(read_texts(CorpusConfig("none", path=str(tmp_path / "none.jsonl")), 1))


def test_what_is_saved(done):
    result, about = read_json(done / "result.json"), read_json(done / "profile.json")
    assert result["n"] == about["corpus"]["samples"] == 48
    assert result["heads_kept"] == HeadProfile.load(done).num_clusters
    assert about["model"]["fingerprint"] and about["corpus"]["source"].endswith("documents.py")
    assert {"statistics_bytes", "host_bytes", "seconds_pass", "device_name"} <= set(result)
    arrays = HeadProfile.load(done).arrays
    assert np.isnan(arrays["within"][:, -1]).all() and np.isnan(arrays["between"][:, 0]).all()  # no such pairs
    complete = arrays | {"within": arrays["within"][:, :-1], "between": arrays["between"][:, 1:]}
    assert np.isfinite(np.concatenate([array.ravel() for array in complete.values()])).all()
    assert (np.diff(arrays["error"], axis=1) <= 1e-3 * arrays["error"][:, :1]).all()
    np.testing.assert_allclose(arrays["maps"].sum(-1), 1, atol=1e-5)
    assert arrays["changes"][:, 10:].mean() < arrays["changes"][:, 0].mean()


def test_a_stopped_run_goes_on_to_the_same_numbers(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments.offline.profile_heads, "CHECKPOINT_SECONDS", 0.0)
    real, calls = experiments.offline.profile_heads.look, []

    def stop_after_two(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(experiments.offline.profile_heads, "look", stop_after_two)
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path)
    assert stopped.value.code == 130
    folder = folder_of(tmp_path)
    assert read_json(folder / "status.json")["state"] == "failed" and not (folder / "profile.json").exists()
    monkeypatch.setattr(experiments.offline.profile_heads, "look", real)
    assert start(tmp_path) == 0
    assert "resuming after 32 samples" in capsys.readouterr().out
    first, second = HeadProfile.load(done), HeadProfile.load(folder)
    assert all(np.array_equal(first.arrays[name], array, equal_nan=True) for name, array in second.arrays.items())
    assert first.about["stability"] == second.about["stability"]


def test_another_rule_needs_no_other_pass(done, monkeypatch, capsys):
    monkeypatch.setattr(experiments.offline.profile_heads, "look", None)  # it would fail
    results = done.parents[4]
    assert start(results, "profile.rule=saving", "profile.saving=0.3") == 0
    assert "reusing statistics of 48 samples" in capsys.readouterr().out
    (other,) = (path for path in done.parent.iterdir() if path != done)
    profile = HeadProfile.load(other)
    assert profile.about["saving"] >= 0.3 and profile.num_clusters != HeadProfile.load(done).num_clusters
    assert read_json(other / "result.json")["device_name"] == read_json(done / "result.json")["device_name"]
    shutil.rmtree(other)


@pytest.mark.parametrize("rule", ["knee", "error"])
def test_every_rule_gives_counts(done, rule):
    results = done.parents[4]
    assert start(results, f"profile.rule={rule}") == 0
    (other,) = (path for path in done.parent.iterdir() if path != done)
    assert all(1 <= k <= 16 for k in HeadProfile.load(other).num_clusters)
    shutil.rmtree(other)


def test_last_rows_averaged(tmp_path):
    assert start(tmp_path, "profile.features=last_row", "profile.combine=averaged") == 0
    assert HeadProfile.load(folder_of(tmp_path)).about["rule"]["combine"] == "averaged"


def test_a_method_uses_it(done, tmp_path, capfd):
    accuracy = ["method=chai", "task=micro_piqa", "limit=8", f"results_dir={tmp_path}"]
    assert run_config(compose_config([*accuracy, f"method.profile={done}"])) == 0
    (result,) = (read_json(path) for path in tmp_path.glob("accuracy/*/*/*/*/result.json"))
    assert result["savings"]["heads_kept"] == HeadProfile.load(done).num_clusters
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    assert run_config(compose_config([*accuracy, f"method.profile={copy}"])) == 0
    assert len(list(tmp_path.glob("accuracy/*/*/*/*"))) == 1  # a profile counts by what it says, not by where it lies
    capfd.readouterr()
    (copy / "profile.safetensors").write_bytes(b"")
    assert run_config(compose_config([*accuracy, f"method.profile={copy}"])) == 2
    error = capfd.readouterr().err.strip()
    assert "damaged or truncated" in error and "\n" not in error
    about = read_json(done / "profile.json")
    about["model"]["fingerprint"] = "another"
    (done / "profile.json").rename(done / "aside")
    (done / "profile.json").write_text(json.dumps(about))
    try:
        assert run_config(compose_config([*accuracy, f"method.profile={done}"])) == 2
        assert "is of another model" in capfd.readouterr().err
    finally:
        (done / "aside").rename(done / "profile.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profile.rule=eye", "rule is 'eye'; valid: plateau, knee, saving, error"),
        ("profile.samples=0", "samples is 0; valid: 1 or more"),
        ("profile.tolerance=1", "tolerance is 1"),
        ("profile.tokens=10", "tokens is 10; valid: 20 (history) or more"),
        ("profile.combine=averaged", "needs features=last_row"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capfd, override, message):
    assert start(tmp_path, override) == 2
    error = capfd.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_a_saving_that_can_not_be_had_is_one_line(tmp_path, capfd):
    assert start(tmp_path, "profile.rule=saving", "profile.saving=0.49") == 2
    assert "the maximum is 46.88 %" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.jsonl", "none.jsonl: No such file"),
        ('{"text": "x"}\nno json\n', "bad.jsonl", "line 2, is not valid JSON"),
        ('{"body": "x"}\n', "other.jsonl", "line 1, has no text"),
        ("mona hosts bob .\n", "short.txt", "has 20 tokens"),
    ],
)
def test_a_corpus_that_can_not_be_used_fails_with_the_reason(tmp_path, capfd, content, name, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert start(tmp_path / "results", f"corpus.path={tmp_path / name}") == 1
    assert message in capfd.readouterr().err
    status = read_json(folder_of(tmp_path / "results") / "status.json")
    assert status["state"] == "failed" and message in status["error"]


def test_local_texts_are_named_by_their_file(tmp_path, shared):
    options = [f"model.path={shared / 'models' / 'stories260K'}", f"corpus.path={shared / 'data' / 'c4_en_2480.jsonl'}"]
    assert start(tmp_path, *options, "profile.samples=6", "profile.tokens=64") == 0
    folder = folder_of(tmp_path, "stories260K")
    assert folder.parent.name == "c4_en_2480"
    assert HeadProfile.load(folder).about["model"]["key_heads"] == 4
    # The folder's own shape, which is not the configuration's (16 heads in 4 layers).
    loaded = read_json(folder / "result.json")["architecture"]
    assert (loaded["num_hidden_layers"], loaded["num_attention_heads"], loaded["num_key_value_heads"]) == (5, 8, 4)
