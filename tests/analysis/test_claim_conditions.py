"""Runs that count for a claim of the paper, and what the board says of those that do not."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml

from analysis import figures
from analysis.report import page as pages
from analysis.report import plots
from analysis.report.accuracy import exact_points
from analysis.report.claims import NOT_IMPLEMENTED
from analysis.report.content import collect
from analysis.stats.paired import from_counts
from analysis.tables.settings import defaults
from tests.analysis import reported, scored, synthetic
from tests.analysis.reported import LLAMA_7B, MODEL, SIZES

CHAI = {"name": "chai", **scored.CHAI}
SMALL = LLAMA_7B | {"hidden_size": 512, "num_hidden_layers": 2}
FEW_LAYERS = "2 layers, the paper's model has 32"


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """They have tests of their own, and take the most time."""
    monkeypatch.setattr(figures, "names", list)
    monkeypatch.setattr(plots, "tradeoff", lambda *_: [])


def board(root):
    """The claims by id."""
    return {one.claim.id: one for one in collect(root).claims}


def reasons(judged):
    return {one.reason for one in judged.passed}


def memory(root, counts, run_id="m", method=CHAI, model=MODEL, **fields):
    """A memory run whose live bytes are exact."""
    exact = synthetic.memory(counts).assign(weights_bytes=13_476_000_000)
    exact = exact.assign(cache_bytes=exact.formula_bytes)
    more = {"heads_kept": counts, "device": "cuda:0", "architecture": model["architecture"]} | fields
    more["model"] = model["name"]
    return reported.configured(synthetic.save(root, "memory", exact, run_id, **more), method, model)


def profile(root, run_id="p", change=None, **fields):
    """A head profile of LLaMA-7B's shape, its arrays changed."""
    arrays, kept = synthetic.profile(32, 32)
    arrays |= change(arrays) if change else {}
    folder = synthetic.save_profile(root, arrays, kept, run_id, **{"n": 1024, "architecture": LLAMA_7B, **fields})
    return reported.configured(folder, {"name": "none"}, MODEL, "c4")


def test_the_shape_is_that_of_the_configuration():
    assert defaults("model/llama7b")["architecture"] == LLAMA_7B


def test_the_models_own_runs_count(tmp_path):
    reported.everything(tmp_path)
    judged = board(tmp_path)
    measured = {name for name, one in judged.items() if one.number}
    assert {"kv-saved", "accuracy-7b", "dejavu-30", "first-token", "next-token", "five-tokens", "kv-size"} <= measured
    assert not any(one.passed for one in judged.values())


def test_a_small_random_model_filed_as_llama7b(tmp_path):
    """It would save the paper's 21.4 %, if it were LLaMA-7B."""
    counts = [18, 18]  # 57 % of the keys
    memory(tmp_path, counts, model=MODEL | {"architecture": SMALL}, layers=2)
    (row,) = [one for name, one in board(tmp_path).items() if name == "kv-saved"]
    assert row.verdict == "not run yet" and row.ours is None
    (reason,) = reasons(row)
    assert reason.startswith(FEW_LAYERS)
    html = pages.write(collect(tmp_path), tmp_path / "out").read_text()
    assert f"Does not count: {FEW_LAYERS}" in re.sub("&#39;", "'", html) and "no run that counts" in html
    assert FEW_LAYERS in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 512, "hidden_size 512, the paper's model has 4096"),
        ("intermediate_size", 1024, "intermediate_size 1024"),
        ("num_key_value_heads", 8, "8 KV heads, the paper's model has 32"),
        ("vocab_size", 1024, "1,024 tokens in the vocabulary, the paper's model has 32,000"),
        ("max_position_embeddings", 4096, "4,096 positions"),
        ("rms_norm_eps", 1e-5, "rms_norm_eps 1e-05"),
        ("model_type", "mistral", "model_type mistral"),
    ],
)
def test_every_field_of_the_architecture_counts(tmp_path, key, value, words):
    """As loaded, whatever the configuration asked for; and as configured."""
    wrong = LLAMA_7B | {key: value}
    memory(tmp_path, synthetic.PARAMS_7B, "loaded", architecture=wrong)
    memory(tmp_path, synthetic.PARAMS_7B, "asked", model=MODEL | {"architecture": wrong}, architecture=LLAMA_7B)
    row = board(tmp_path)["kv-saved"]
    assert row.ours is None and len(row.passed) == 2
    assert all(words in one.reason for one in row.passed)


def test_an_older_run_that_did_not_record_what_was_loaded(tmp_path):
    reported.change(memory(tmp_path, synthetic.PARAMS_7B), architecture=None)
    row = board(tmp_path)["kv-saved"]
    assert reasons(row) == {"result.json has no architecture: made by an older version (force=true repeats the run)"}


def test_random_weights_count_for_memory_and_never_for_accuracy(tmp_path):
    memory(tmp_path, synthetic.PARAMS_7B, model=MODEL | {"name": "llama7b-random"})
    reported.scores(tmp_path, MODEL | {"name": "llama7b-random"})
    judged = board(tmp_path)
    assert judged["kv-saved"].number and "random weights" in judged["kv-saved"].ours.device
    assert judged["accuracy-7b"].ours is None and reasons(judged["accuracy-7b"]) == {"random weights"}


def test_other_weights_of_the_same_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(reported, "RIGHT", dict.fromkeys(reported.RIGHT, 0.3))
    reported.scores(tmp_path, MODEL, lost=0)
    row = board(tmp_path)["accuracy-7b"]
    assert row.ours is None
    assert "MHA scores 30.0 % on PIQA, the paper's model 79.8 %: other weights or other data" in reasons(row)


def test_the_first_items_only(tmp_path):
    reported.scores(tmp_path, MODEL, lost=0, limit=20)
    judged = board(tmp_path)
    for name in ("accuracy", "accuracy-7b", "accuracy-table-7b", "dejavu-30"):
        assert judged[name].ours is None and judged[name].verdict == "not run yet", name
    assert "first 20 items only, of 1,838 (PIQA, limit=20)" in reasons(judged["accuracy-7b"])
    assert {"first 20 items only, of 10,042 (HellaSwag, limit=20)"} == reasons(judged["dejavu-30"])
    html = pages.write(collect(tmp_path), tmp_path / "out").read_text()
    table = html[html.index('id="table-table2"') : html.index('id="table-table3"')]
    assert "does not count;" in table and "✓" not in table  # the run is shown, without a verdict


def test_a_part_of_the_data_without_a_limit(tmp_path):
    for method in ("mha", "chai"):
        fields = reported.fields(method, 1.0, [32] * 32 if method == "mha" else synthetic.PARAMS_7B)
        more = fields | {"architecture": LLAMA_7B}
        settings = scored.CHAI if method == "chai" else {}
        scored.save(tmp_path, method, "piqa", scored.outcomes(80, n=100), settings, model=MODEL, result=more)
    assert reasons(board(tmp_path)["accuracy-7b"]) == {"100 items, PIQA has 1,838"}


def test_another_dtype_on_one_side(tmp_path):
    reported.scores(tmp_path, MODEL)
    for folder in tmp_path.glob("accuracy/llama7b/chai/*/*"):
        reported.change(folder, dtype="bfloat16")
    row = board(tmp_path)["accuracy-7b"]
    assert row.ours is None and reasons(row) == {"bfloat16, the runs to compare it with are of float16"}


def test_runs_of_another_dtype_beside_those_that_are_compared(tmp_path):
    reported.scores(tmp_path, MODEL)
    answers = scored.outcomes(1470, n=SIZES["piqa"])
    more = reported.fields("chai", 0.8, synthetic.PARAMS_7B) | {"architecture": LLAMA_7B, "dtype": "bfloat16"}
    other = MODEL | {"dtype": "bfloat16"}
    scored.save(tmp_path, "chai", "piqa", answers, scored.CHAI, model=other, result=more)
    row = board(tmp_path)["accuracy-7b"]
    assert row.number and reasons(row) == {"bfloat16, the runs to compare it with are of float16"}


def test_numbers_of_32_bits(tmp_path):
    memory(tmp_path, synthetic.PARAMS_7B, dtype="float32")
    judged = board(tmp_path)
    for name in ("kv-saved", "kv-size", "weights-size", "attention-memory"):
        assert reasons(judged[name]) == {"float32, the paper's numbers have 16 bits (float16 or bfloat16)"}


def test_counts_set_by_hand(tmp_path):
    """Four clusters in each layer save 43.8 %, more than the paper; their accuracy is another matter."""
    memory(tmp_path, [4] * 32, method=CHAI | {"clusters": 4})
    memory(tmp_path, [18] * 32, "patch", method=CHAI | {"clusters": "llama7b_patch"})
    row = board(tmp_path)["kv-saved"]
    assert row.ours is None and reasons(row) == {
        "k = 4 in all 32 layers set by hand, the model's counts are llama7b_params",
        "k = 18 in all 32 layers set by hand, the model's counts are llama7b_params",
    }


def test_counts_that_combine_nothing(tmp_path):
    """A list of a profile with k = H is not CHAI."""
    by_profile = CHAI | {"profile": "/data/profile"}
    memory(tmp_path, [32] * 31 + [31], method=by_profile)
    (reason,) = reasons(board(tmp_path)["kv-saved"])
    assert reason.endswith("of 32 heads next to none are combined")


def test_other_counts_for_memory_than_for_accuracy(tmp_path):
    reported.scores(tmp_path, MODEL)
    memory(tmp_path, [18] * 32, method=CHAI | {"profile": "/data/profile"})
    (reason,) = reasons(board(tmp_path)["kv-saved"])
    assert reason.startswith("other counts than the accuracy runs: k = 18 in all 32 layers; there k = 32")


def test_other_counts_under_chai_static_than_under_chai(tmp_path):
    reported.scores(tmp_path, MODEL)
    for name, right in reported.RIGHT.items():
        n = SIZES[name]
        more = reported.fields("chai_static", 0.8, [8] * 32) | {"architecture": LLAMA_7B}
        answers = scored.outcomes(round(right * n), n // 10, n=n)
        scored.save(tmp_path, "chai_static", name, answers, {"profile": "/data/profile"}, model=MODEL, result=more)
    row = board(tmp_path)["tradeoff-chai-static"]
    assert row.ours is None and len(row.passed) == 5
    assert all(
        one.reason.startswith("other counts than CHAI's: k = 8 in all 32 layers; CHAI k = 32") for one in row.passed
    )
    for folder in tmp_path.glob("accuracy/llama7b/chai_static/*/*"):
        reported.change(folder, **reported.fields("chai_static", 0.8, synthetic.PARAMS_7B))
    row = board(tmp_path)["tradeoff-chai-static"]
    assert row.verdict == "reproduced" and row.ours.interval.value == pytest.approx(8, abs=0.1) and not row.passed


def test_other_settings_than_the_methods_own(tmp_path):
    memory(tmp_path, synthetic.PARAMS_7B, method=CHAI | {"tokens": 64})
    assert reasons(board(tmp_path)["kv-saved"]) == {"method.tokens=64, the method's default is 5"}


def test_times_of_a_cpu(tmp_path):
    more = {"device": "cpu", "device_name": "a processor", "architecture": LLAMA_7B}
    folder = synthetic.save(tmp_path, "latency", synthetic.latency(), "cpu", **more)
    reported.configured(folder, CHAI, MODEL)
    row = board(tmp_path)["next-token"]
    assert row.ours is None and reasons(row) == {"measured on cpu, the paper's times are of a GPU"}


def test_a_part_that_takes_longer_than_the_whole_decides_nothing(tmp_path):
    reported.probes(tmp_path, "llama7b", synthetic.PARAMS_7B, 32)  # attention is timed as 2.4 ms, 32 layers as 16.4
    row = board(tmp_path)["attention-compute"]
    assert row.verdict == "undecided" and row.ours.caveat == "attention alone took longer than the whole model with it"


def test_what_is_not_implemented_says_what_is_missing(tmp_path):
    reported.probes(tmp_path, "llama7b", synthetic.PARAMS_7B, 32)
    judged = board(tmp_path)
    assert {name for name, one in judged.items() if one.verdict == "not implemented"} == set(NOT_IMPLEMENTED)
    html = pages.write(collect(tmp_path), tmp_path / "out").read_text()
    assert "Not implemented: A fused kernel" in html and html.count("∅ not implemented") == 1
    assert judged["first-token"].number  # what was measured is shown


# Intervals


def test_without_flips_the_interval_has_a_width():
    found = exact_points(from_counts(0, 0, 1838))
    assert found.value == 0 and found.high == -found.low == pytest.approx(100 * (1 - 0.0125 ** (1 / 1838)))


def test_the_exact_interval_covers_at_its_level():
    """Simulated with few flips, where a bootstrap's covers less."""
    generator = np.random.default_rng(0)
    n, lost, gained = 400, 0.01, 0.004
    draws = generator.multinomial(n, [lost, gained, 1 - lost - gained], size=2000)
    intervals = {pair: exact_points(from_counts(*pair, n)) for pair in {(int(a), int(b)) for a, b, _ in draws}}
    covered = [intervals[int(a), int(b)] for a, b, _ in draws]
    assert np.mean([one.low <= 100 * (gained - lost) <= one.high for one in covered]) >= 0.95


# Claims of head profiles


def test_a_profile_without_redundancy_decides_nothing(tmp_path):
    """Five tokens always suffice where every head is its own cluster."""

    def all_heads(arrays):
        eye = np.arange(32)
        return {
            "clusters": np.full(32, 32), "assignment": np.tile(eye, (32, 1)), "representatives": np.tile(eye, (32, 1)),
            "changes": np.zeros_like(arrays["changes"]),
        }  # fmt: skip

    profile(tmp_path, change=all_heads)
    judged = board(tmp_path)
    for name in ("five-tokens", "correlation", "cluster-skew", "cluster-majority"):
        assert judged[name].verdict == "undecided", name
        assert judged[name].ours.caveat.startswith("no redundancy found: k = 32 in"), name
    html = pages.write(collect(tmp_path), tmp_path / "out").read_text()
    assert "Decides nothing: no redundancy found" in html and ">nan" not in html


def test_correlation_grows_with_depth_or_not(tmp_path):
    def rising(arrays):
        means = np.linspace(0.05, 0.9, 32)[:, None, None]
        return {"correlation": np.where(np.eye(32, dtype=bool), 1, means).astype(np.float32)}

    profile(tmp_path / "rising", change=rising)
    judged = board(tmp_path / "rising")
    assert judged["correlation-growth"].verdict == "reproduced"
    assert judged["correlation-growth"].ours.interval.value == pytest.approx(1)
    assert judged["correlation-first"].ours.interval.value == pytest.approx(0.05, abs=1e-6)
    assert judged["correlation-first"].verdict == "reproduced"
    profile(tmp_path / "falling", change=lambda arrays: {"correlation": rising(arrays)["correlation"][::-1].copy()})
    judged = board(tmp_path / "falling")
    assert judged["correlation-growth"].verdict == judged["correlation-first"].verdict == "not reproduced"


def test_fewer_texts_or_another_corpus_than_the_papers(tmp_path):
    profile(tmp_path, "few", n=64)
    profile(tmp_path, "other", task="wiki")
    row = board(tmp_path)["correlation-growth"]
    assert row.ours is None
    assert reasons(row) == {"64 texts, the paper has 1,024", "of corpus wiki, the paper's is c4"}


def test_sizes_of_clusters(tmp_path):
    def skewed(arrays):
        sizes = np.zeros_like(arrays["cluster_sizes"])
        k = arrays["clusters"][18]
        sizes[18, k - 1, :k] = [17, 9, *[6 / (k - 2)] * (k - 2)]
        return {"cluster_sizes": sizes}

    profile(tmp_path, change=skewed)
    judged = board(tmp_path)
    k = int(synthetic.profile(32, 32)[0]["clusters"][18])
    assert judged["cluster-majority"].ours.interval.value == pytest.approx(100 * 17 / 32)
    assert judged["cluster-skew"].ours.interval.value == pytest.approx(13 / (6 / (k - 2)))
    assert judged["cluster-majority"].verdict == judged["cluster-skew"].verdict == "reproduced"


def test_heads_of_uniform_attention(tmp_path):
    def uniform(arrays):
        entropy = np.full((32, 32), 0.5)
        entropy[3, :4] = 0.95
        return {"entropy": entropy}

    profile(tmp_path, change=uniform)
    row = board(tmp_path)["uniform-llama"]
    assert row.ours.interval.value == 4 and row.verdict == "not reproduced" and "4, in layer 3" in row.ours.detail
    assert board(tmp_path)["uniform-opt"].verdict == "not run yet"


# The trade-off


def random_heads(root, points):
    """Random clusters: their number, operations as a share of CHAI's, answers lost of 200."""
    whole = reported.fields("chai", 0.809, [])["flops"]["method"]
    for clusters, share, lost in points:
        for name, right in reported.RIGHT.items():
            n = SIZES[name]
            more = reported.fields("random", 0.8, [clusters] * 32) | {"architecture": LLAMA_7B}
            more["flops"] |= {"method": round(whole * share)}
            answers = scored.outcomes(round(right * n), round(lost * n / 200), n=n)
            settings = {"clusters": clusters, "seed": 0}
            scored.save(root, "random", name, answers, settings, model=MODEL, result=more)


def test_the_trade_off_is_against_the_best_point_of_no_more_operations(tmp_path):
    """Which is known once all points are run, by both readings of the numbers of heads."""
    reported.scores(tmp_path, MODEL)
    random_heads(tmp_path, [(4, 0.98, 60), (8, 0.99, 20), (29, 1.05, 2)])
    row = board(tmp_path)["tradeoff-random"]
    # k = 29 has more operations, k = 4 loses more: k = 8 loses 10 points, CHAI 2.
    assert row.ours.interval.value == pytest.approx(8, abs=0.05) and "random k=8, 99.0 %" in row.ours.detail
    assert row.verdict == "not run yet" and row.commands == ("python run.py -m paper=figure1",)
    random_heads(tmp_path, [(16, 1.01, 30), (24, 1.03, 30), (25, 1.03, 30), (17, 1.01, 30), (9, 0.995, 30)])
    row = board(tmp_path)["tradeoff-random"]
    assert row.verdict == "reproduced" and not row.commands
    assert board(tmp_path)["tradeoff-dejavu"].verdict == "not run yet"  # 30 % alone


def test_a_better_point_breaks_the_claim_at_once(tmp_path):
    reported.scores(tmp_path, MODEL)
    random_heads(tmp_path, [(8, 0.99, 0)])
    assert board(tmp_path)["tradeoff-random"].verdict == "not reproduced"


def test_pairs_that_are_not_run_yet_break_nothing(tmp_path):
    reported.scores(tmp_path, MODEL)
    row = board(tmp_path)["no-training"]
    assert (
        row.ours.interval.value == 5 and row.verdict == "not run yet" and any("opt66b" in one for one in row.commands)
    )


def test_the_table_is_counted_by_numbers(tmp_path):
    reported.scores(tmp_path, MODEL)
    row = board(tmp_path)["accuracy-table-7b"]
    assert row.claim.value == 35 and row.verdict == "not reproduced" and 0 < row.ours.interval.value < 20
    assert row.ours.interval.high < 35


def test_a_corrupt_configuration_is_a_reason(tmp_path):
    folder = memory(tmp_path, synthetic.PARAMS_7B)
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": {}}))
    assert reasons(board(tmp_path)["kv-saved"]) == {"config.yaml is corrupt"}
