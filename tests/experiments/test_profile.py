"""``experiment=profile`` from the command line to the method that uses it."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import IterableDataset
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.metrics import adjusted_rand_score
from transformers import LlamaConfig

import experiments.offline.corpus
import experiments.offline.profile_heads
import experiments.offline.sensitivities
from chai.clustering.num_clusters import plateau
from chai.loading import load_model, load_tokenizer
from chai.offline.head_profile import HeadProfile
from chai.offline.sensitivity import measure_sensitivity, measured_counts
from chai.offline.stability import measure_stability
from experiments.cli import main
from experiments.config.compose import compose_config
from experiments.config.schema import REPOSITORY, CorpusConfig
from experiments.execute import run_config
from experiments.microworld.documents import document
from experiments.offline.corpus import long_texts, read_texts
from experiments.offline.sensitivities import check_budget
from experiments.runs.files import read_json
from experiments.runs.folder import RunError
from experiments.runs.model import model_source
from experiments.tables.head_profile import show_head_profile

RULES = ("plateau", "knee")
RECIPE = REPOSITORY / "experiments" / "microworld" / "model" / "recipe.json"
FEW = ["experiment=profile", "profile.samples=48", "profile.history_samples=8"]
#: Sensitivities of a metric that costs little.
MEASURED = ["profile.rule=sensitivity", "profile.sensitivity_texts=2", "profile.sensitivity_tokens=16"]
QUICK = ["profile.samples=16", *MEASURED, "profile.metric=cosine"]


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
    assert start(results, "profile.rule=knee") == 0
    assert "reusing statistics of 48 samples" in capsys.readouterr().out
    (other,) = (path for path in done.parent.iterdir() if path != done)
    profile = HeadProfile.load(other)
    assert profile.num_clusters == profile.about["rules"]["knee"] != HeadProfile.load(done).num_clusters
    assert read_json(other / "result.json")["device_name"] == read_json(done / "result.json")["device_name"]
    shutil.rmtree(other)


# Sensitivity.


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A profile whose counts follow from the errors of the output, with its joint products."""
    results = tmp_path_factory.mktemp("measured")
    assert start(results, "profile.samples=16", *MEASURED, "profile.heads=6", "profile.metrics=[cosine]") == 0
    return folder_of(results)


def counts_within(losses: np.ndarray, counts: list[int], most: float) -> float:
    """The least loss of all schedules whose counts sum to ``most`` at the most, by enumeration."""
    options = [*itertools.product(range(len(counts)), repeat=len(losses))]
    return min(
        sum(losses[layer, option] for layer, option in enumerate(own))
        for own in options
        if sum(counts[option] for option in own) <= most
    )


def test_counts_spend_the_budget_where_it_costs_least(measured):
    profile = HeadProfile.load(measured)
    about, kl = profile.about, profile.arrays["sensitivity"]
    assert about["rule"] == {
        "name": "sensitivity", "budget": "heads", "amount": 6, "metric": "output", "combine": "per_sample"
    }  # fmt: skip
    facts = about["sensitivity"]
    counts = facts["counts"]
    assert counts == measured_counts(16) and kl.shape == (2, 4, len(counts)) and np.isfinite(kl).all()
    assert (facts["texts"], facts["exact_tokens"], facts["group_aware"]) == (2, 5, False)
    losses = np.concatenate([kl.mean(0), np.zeros((4, 1))], 1)
    chosen = [[*counts, 16].index(k) for k in profile.num_clusters]
    assert sum(profile.num_clusters) <= 24
    spent = sum(losses[layer, option] for layer, option in enumerate(chosen))
    assert spent == pytest.approx(counts_within(losses, [*counts, 16], 24))
    assert about["rules"] == {
        "plateau": about["rules"]["plateau"], "knee": about["rules"]["knee"], "sensitivity": profile.num_clusters
    }  # fmt: skip
    assert about["stability"]["resamples"] == 1000
    # What the maps need, and what was asked for besides.
    assert {"cost_output", "cost_cosine", "gram"} <= set(profile.arrays)
    assert profile.arrays["gram"].shape == (4, 256, 256)


def test_the_sensitivity_is_that_of_the_profiles_own_maps(measured):
    """By the library, on the texts after those of the statistics."""
    config = compose_config([*FEW, "profile.samples=16", *MEASURED, "profile.heads=6"])
    source = model_source(config)
    model, tokenizer = load_model(source), load_tokenizer(source)
    profile = HeadProfile.load(measured)
    with safe_open(measured / "statistics.safetensors", "np") as file:
        read = json.loads(file.metadata()["state"])["read"]
    texts = itertools.islice(long_texts(config.corpus, 0, read, tokenizer, 16), 2)
    ids = torch.tensor([ids[:16] for _, ids in texts])
    maps = [{k: profile.clusters(layer, k, "output") for k in (1, 4)} for layer in range(4)]
    counts = profile.about["sensitivity"]["counts"]
    for layer, found in measure_sensitivity(model, ids, maps, 5):
        for k in (1, 4):
            expected = profile.arrays["sensitivity"][:, layer, counts.index(k)]
            np.testing.assert_allclose(found[k].numpy(), expected, rtol=1e-3, atol=1e-7)


def test_the_table_has_the_sensitivity_with_its_standard_error(measured, done, capsys):
    show_head_profile(measured)
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]
    profile = HeadProfile.load(measured)
    for layer, (row, k) in enumerate(zip(rows, profile.num_clusters, strict=True)):
        if k == 16:
            assert row[5] == "0"
            continue
        texts = profile.arrays["sensitivity"][:, layer, profile.about["sensitivity"]["counts"].index(k)]
        mean, error = 1000 * texts.mean(), 1000 * abs(texts[0] - texts[1]) / 2
        assert row[5:8] == [f"{mean:.2f}", "±", f"{error:.2f}"]
    assert "Millinats: sensitivity, the KL divergence" in said and "over the 2 texts" in said
    assert all(len(line) <= 110 and "…" not in line for line in said.splitlines() if "method.profile" not in line)
    show_head_profile(done)
    assert "Millinats" not in capsys.readouterr().out


def test_another_budget_uses_what_was_measured(measured, monkeypatch, capsys):
    """For more heads, and for a loss; statistics and sensitivities are those of the first run."""
    monkeypatch.setattr(experiments.offline.profile_heads, "look", None)  # they would fail
    monkeypatch.setattr(experiments.offline.sensitivities, "measure_sensitivity", None)
    results, first = measured.parents[4], HeadProfile.load(measured)
    for budget, fits in (
        (["profile.heads=9.5"], lambda counts, loss: sum(counts) <= 38),
        (["profile.budget=kl", "profile.kl=0.002"], lambda counts, loss: loss <= 0.002 + 1e-9),
        (["profile.budget=kv_bytes", "profile.saving=0.25"], lambda counts, loss: sum(counts) <= 32),
    ):
        options = ["profile.samples=16", *MEASURED, "profile.metrics=[cosine]", *budget]
        assert start(results, *options) == 0
        assert "reusing statistics of 16 samples" in capsys.readouterr().out
        (other,) = (path for path in measured.parent.iterdir() if path != measured)
        profile = HeadProfile.load(other)
        assert np.array_equal(profile.arrays["sensitivity"], first.arrays["sensitivity"])
        counts = profile.about["sensitivity"]["counts"]
        kl = profile.arrays["sensitivity"].mean(0)
        loss = sum(kl[layer, counts.index(k)] for layer, k in enumerate(profile.num_clusters) if k < 16)
        assert fits(profile.num_clusters, loss)
        shutil.rmtree(other)


def test_an_interrupted_measurement_repeats_no_finished_layer(tmp_path, monkeypatch):
    """Two batches of a text; stopped after layer 1 of the second. The numbers are those of a run without a stop."""
    options = [*QUICK, "profile.heads=6", "batch_size=1"]
    assert start(tmp_path / "whole", *options) == 0
    real, layers = experiments.offline.sensitivities.measure_sensitivity, []

    def stop_at(number):
        def measure(*arguments, **more):
            for layer, found in real(*arguments, **more):
                if len(layers) == number:
                    raise KeyboardInterrupt
                layers.append(layer)
                yield layer, found

        return measure

    monkeypatch.setattr(experiments.offline.sensitivities, "measure_sensitivity", stop_at(6))
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path / "stopped", *options)
    assert stopped.value.code == 130 and layers == [0, 1, 2, 3, 0, 1]
    monkeypatch.setattr(experiments.offline.sensitivities, "measure_sensitivity", stop_at(-1))
    assert start(tmp_path / "stopped", *options) == 0
    assert layers[6:] == [2, 3]
    whole, resumed = (HeadProfile.load(folder_of(tmp_path / name)) for name in ("whole", "stopped"))
    np.testing.assert_array_equal(whole.arrays["sensitivity"], resumed.arrays["sensitivity"])
    assert whole.num_clusters == resumed.num_clusters


def test_further_metrics_are_gathered_again(done, monkeypatch, capsys):
    """And a resumed pass has the numbers of one without a stop: the random projections follow the batch."""
    results, calls, real = done.parents[4], [], experiments.offline.profile_heads.look

    def count(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(experiments.offline.profile_heads, "look", count)
    assert start(results, "profile.metrics=[cosine]") == 0
    assert len(calls) == 3 and "reusing" not in capsys.readouterr().out
    (other,) = (path for path in done.parent.iterdir() if path != done)
    first, second = HeadProfile.load(done), HeadProfile.load(other)
    assert set(second.arrays) - set(first.arrays) == {"cost_cosine"}
    np.testing.assert_array_equal(first.arrays["distances"], second.arrays["distances"])
    shutil.rmtree(other)


def test_a_stopped_pass_goes_on_with_the_same_products(tmp_path, monkeypatch):
    """The embedded model is wider than the random projection: the projection of a batch must not depend on the stop."""
    options = ["profile.samples=6", "profile.tokens=20", "profile.metrics=[output]", "batch_size=2"]
    assert start(tmp_path / "whole", *options) == 0
    monkeypatch.setattr(experiments.offline.profile_heads, "CHECKPOINT_SECONDS", 0.0)
    real, calls = experiments.offline.profile_heads.look, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(experiments.offline.profile_heads, "look", stop)
    with pytest.raises(SystemExit):
        start(tmp_path / "stopped", *options)
    monkeypatch.setattr(experiments.offline.profile_heads, "look", real)
    assert start(tmp_path / "stopped", *options) == 0
    whole, resumed = (HeadProfile.load(folder_of(tmp_path / name)) for name in ("whole", "stopped"))
    for name in ("gram", "cost_output"):
        np.testing.assert_array_equal(whole.arrays[name], resumed.arrays[name])


def test_a_method_uses_the_map(measured, tmp_path, capfd):
    """The planted task of the embedded model with the map of the profile, and with its correction."""
    accuracy = ["method=chai_output", "task=micro_piqa", "limit=8", f"results_dir={tmp_path}"]
    for more in ([], ["method.prior=16"]):
        assert run_config(compose_config([*accuracy, f"method.profile={measured}", *more])) == 0
    for path in tmp_path.glob("accuracy/*/*/*/*/result.json"):
        assert read_json(path)["savings"]["heads_kept"] == HeadProfile.load(measured).num_clusters
    capfd.readouterr()
    embedded = "the profile of tiny has no metric 'output'; valid: attention, or a profile with"
    for options, message in (
        (["method.profile=null"], "a head profile of this model is needed; make one: python run.py experiment=profile"),
        ([], embedded),  # the profile that the embedded model comes with
        ([f"method.profile={measured}", "method.metric=sink_removed"], "valid: attention, cosine, output"),
        ([f"method.profile={measured}", "method.metric=cosine", "method.prior=1"], "valid: metric=output, tokens >= 1"),
        ([f"method.profile={measured}", "method.metric=eye"], "method.metric is 'eye'; valid: attention, cosine"),
    ):
        with pytest.raises(SystemExit) as stopped:
            sys.exit(main([*accuracy, *options]))
        assert stopped.value.code == 2
        error = capfd.readouterr().err.strip()
        assert message in error and "\n" not in error


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
        ("profile.rule=eye", "rule is 'eye'; valid: plateau, knee, sensitivity"),
        ("profile.samples=0", "samples is 0; valid: 1 or more"),
        ("profile.tolerance=1", "tolerance is 1"),
        ("profile.tokens=10", "tokens is 10; valid: 20 (history) or more"),
        ("profile.combine=averaged", "needs features=last_row"),
        ("profile.rule=sensitivity", "budget=heads needs the mean number of heads to compute: profile.heads=N"),
        ("profile.rule=sensitivity profile.heads=17", "heads is 17; valid: 1 to 16, the mean of the layers"),
        ("profile.rule=sensitivity profile.heads=0.5", "heads is 0.5; valid: 1 to 16, the mean of the layers"),
        ("profile.rule=sensitivity profile.heads=4 profile.sensitivity_texts=0", "sensitivity_texts is 0; valid: 1"),
        ("profile.sensitivity_tokens=5", "sensitivity_tokens is 5; valid: 6 or more"),
        ("profile.rule=sensitivity profile.budget=bytes", "budget is 'bytes'; valid: heads, kv_bytes, kl"),
        ("profile.rule=sensitivity profile.budget=kl profile.kl=0", "kl is 0; valid: above 0"),
        ("profile.metrics=[cosin]", "valid: attention, cosine, jensen_shannon, sink_removed, output"),
        ("profile.metric=eye", "metric is 'eye'; valid: attention, cosine, jensen_shannon, sink_removed, output"),
        ("profile.rule=sensitivity profile.budget=kv_bytes profile.saving=0.49", "the maximum is 46.88 %"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capfd, override, message):
    assert start(tmp_path, *override.split()) == 2
    error = capfd.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_further_texts_that_are_too_short_or_too_few(tmp_path, capfd, monkeypatch):
    """The embedded generator has no end, and no text of 256 tokens; a file has no text beyond those of the pass."""
    monkeypatch.setattr(experiments.offline.corpus, "MOST_SHORT", 50)
    quick = ["profile.rule=sensitivity", "profile.heads=6", "profile.metric=cosine", "profile.samples=16"]
    assert start(tmp_path / "long", *quick) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "corpus micro has no further text of 256 tokens after the" in said and "profile.sensitivity_tokens" in said
    documents = (" ".join(text for text, _ in document(random.Random(seed), phase=1)) for seed in itertools.count())
    texts = list(itertools.islice((text for text in documents if len(text.split()) >= 30), 18))
    (tmp_path / "few.txt").write_text("\n".join(text.replace("\n", " ") for text in texts))
    file = f"corpus.path={tmp_path / 'few.txt'}"
    assert start(tmp_path / "few", *QUICK, "profile.heads=6", "profile.sensitivity_texts=4", file) == 0
    assert "only 2 further texts of 16 tokens" in capfd.readouterr().out
    profile = HeadProfile.load(folder_of(tmp_path / "few"))
    assert profile.arrays["sensitivity"].shape[0] == profile.about["sensitivity"]["texts"] == 2
    assert start(tmp_path / "none", *QUICK, "profile.heads=6", "profile.samples=18", file) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "no further text of 16 tokens after the 18 texts" in said and "profile.samples" in said


def test_grouped_queries_are_measured_by_the_key_head(tmp_path, shared):
    """8 query heads on 4 key heads: a budget of bytes leaves whole key heads out."""
    options = [f"model.path={shared / 'models' / 'stories260K'}", f"corpus.path={shared / 'data' / 'c4_en_2480.jsonl'}"]
    budget = ["profile.budget=kv_bytes", "profile.saving=0.2"]
    assert start(tmp_path, *options, "profile.samples=6", "profile.tokens=64", *MEASURED, *budget) == 0
    folder = folder_of(tmp_path, "stories260K")
    profile = HeadProfile.load(folder)
    assert profile.about["sensitivity"]["counts"] == [2, 4, 6] and profile.about["sensitivity"]["group_aware"]
    assert all(k % 2 == 0 for k in profile.num_clusters) and profile.about["saving"] >= 0.2
    assert start(tmp_path / "more", *options, *MEASURED, "profile.budget=kv_bytes", "profile.saving=0.4") == 2


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


@pytest.mark.parametrize(
    ("heads", "key_heads", "budget", "message"),
    [
        (32, 32, {"budget": "kv_bytes", "saving": 0.48}, "the maximum is 46.88 %"),  # 2 of 32 heads at the least
        (9, 3, {"budget": "kv_bytes", "saving": 0.34}, "the maximum is 33.33 %"),
        (8, 1, {"budget": "kv_bytes", "saving": 0.1}, "the maximum is 0 %"),
        (32, 32, {"budget": "heads", "heads": 1.5}, "heads is 1.5; valid: 2 to 32"),
        (9, 3, {"budget": "heads", "heads": 9.5}, "heads is 9.5; valid: 1 to 9"),
    ],
)
def test_budgets_below_what_is_measured_are_refused_before_the_work(heads, key_heads, budget, message):
    architecture = LlamaConfig(num_attention_heads=heads, num_key_value_heads=key_heads, hidden_size=8 * heads)
    with pytest.raises(ValueError, match=message):
        check_budget(SimpleNamespace(**budget), architecture)
    check_budget(SimpleNamespace(budget="heads", heads=4.0), architecture)


def test_output_projections_are_fitted_and_used(tmp_path, capfd):
    texts = itertools.islice(read_texts(compose_config(["experiment=profile"]).corpus, seed=0), 24)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    fitted = [f"corpus.path={tmp_path / 'texts.txt'}", "profile.samples=4", "profile.refit_texts=4"]
    assert start(tmp_path, *fitted) == 1
    assert "no text of 256 tokens (profile.sensitivity_tokens)" in capfd.readouterr().err
    assert start(tmp_path, *fitted, "profile.sensitivity_tokens=24") == 0
    (folder,) = (path.parent for path in tmp_path.rglob("refit.safetensors"))
    about = read_json(folder / "profile.json")
    assert about["refit"]["texts"] == 4 and about["refit"]["tokens"] == 24 and about["refit"]["metric"] == "output"
    command = ["method=chai_output", "task=micro_piqa", "limit=4", f"results_dir={tmp_path}"]
    command.append(f"method.profile={folder}")
    assert run_config(compose_config([*command, "method.refit=true"])) == 0
    assert run_config(compose_config([*command, "method.refit=true", "method.tokens=3"])) == 2
    assert "tokens is 3; valid with refit: 5" in capfd.readouterr().err
