"""The probes on small models: complete rows, honest bytes, and what they refuse."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from transformers import DynamicCache

from chai.cache import cache_bytes
from chai.methods import Chai, Mha
from experiments.benchmarks.harness import PROFILED_STEPS, fill_cache, interleave, peak_memory, twin
from experiments.config.compose import compose_config
from experiments.execute import run_config
from tests.models import HEADS, LAYERS, make_batch, make_model

SMALL = [
    "model.random_init=true",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=8",
    "model.architecture.num_key_value_heads=8",
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=96",
    "model.architecture.head_dim=8",
    "+model.architecture.vocab_size=200",
]


def run(tmp_path, *overrides: str) -> int:
    return run_config(compose_config([*SMALL, f"results_dir={tmp_path}", *overrides]))


def only(tmp_path, pattern: str):
    found = list(tmp_path.glob(pattern))
    assert len(found) == 1
    return json.loads((found[0] / "result.json").read_text()), pd.read_parquet(found[0] / "measurements.parquet")


def test_latency_has_a_row_for_everything(tmp_path, capsys):
    settings = ["experiment=latency", "method.clusters=[3,8]", "experiment.lengths=[24,40]", "experiment.rounds=2"]
    assert run(tmp_path, *settings) == 0
    result, rows = only(tmp_path, "latency/tiny-random/chai/none/*")
    assert {tuple(row) for row in rows[["part", "phase", "length", "implementation"]].itertuples(index=False)} == {
        (part, phase, length, name)
        for part in ("attention", "layer", "model")
        for phase in ("prefill", "decode")
        for length in (24, 40)
        for name in ("eager", "sdpa", "chai")
    }
    alone = rows[rows.part != "model"]
    assert set(alone.k) == {3, 8} and rows[rows.part == "model"].k.isna().all()
    assert (rows.ms > 0).all() and (rows.ms_p25 <= rows.ms).all() and (rows.ms <= rows.ms_p75).all()
    own = alone[~alone.baseline & (alone.part == "attention")]
    assert set(own[own.k == 3].limit.round(6)) == {round(16 / 11, 6)}  # 2H / (H + k), operations and bytes alike
    assert set(own[own.k == 8].limit) == {1.0}
    best = rows[rows.implementation == rows.best_baseline]
    assert (best.speedup == 1).all()
    fastest = rows[rows.baseline].groupby(["part", "phase", "length", rows.k.fillna(0)]).ms.min()
    assert sorted(fastest) == sorted(best.ms)
    assert result["membership"]["decide_ms"] > 0 and result["heads_kept"] == [3, 8]
    assert result["metrics"]["attention_decode_k3"] > 0 and result["metrics"]["model_prefill"] > 0
    printed = capsys.readouterr().out
    assert "attention decode" in printed and "Clustering of all layers" in printed
    assert run(tmp_path, *settings) == 0 and "already complete" in capsys.readouterr().out


def test_methods_without_clusters_are_timed_as_whole_models(tmp_path, capsys):
    settings = ["method=spatten", "experiment=latency", "experiment.lengths=[24]", "experiment.rounds=2"]
    assert run(tmp_path, *settings) == 0
    _, rows = only(tmp_path, "latency/tiny-random/spatten/none/*")
    assert set(rows[~rows.baseline].part) == {"model"}
    own = rows[rows.implementation == "spatten"].set_index("phase")
    assert own.ms.gt(0).all() and own.speedup.gt(0).all()
    assert own.limit["prefill"] > 1 and pd.isna(own.limit["decode"])
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("key_heads", [8, 4])
def test_pruned_contexts_and_masks_have_formulas_of_their_own(tmp_path, key_heads):
    """SpAtten's cache is its schedule's; DejaVu's mask leaves everything in it."""
    grouped = f"model.architecture.num_key_value_heads={key_heads}"
    settings = [grouped, "experiment=memory", "experiment.lengths=[64,100]", "experiment.steps=8"]
    for method in (
        ["method=spatten", "method.preset=linear", "method.unpruned_heads=0"],
        ["method=dejavu", "method.predictor=oracle"],
    ):
        assert run(tmp_path, *settings, *method) == 0
    for name in ("spatten", "dejavu"):
        _, rows = only(tmp_path, f"memory/tiny-random/{name}/none/*")
        assert (rows.cache_bytes == rows.formula_bytes).all()
    assert (rows.cache_bytes == rows.groupby("length").cache_bytes.transform("max")).all()  # dejavu's
    _, rows = only(tmp_path, "memory/tiny-random/spatten/none/*")
    pruned = rows[(rows.method == "spatten") & (rows.length == 100)].cache_bytes.item()
    whole = rows[(rows.method == "mha") & (rows.length == 100)].cache_bytes.item()
    # The second layer holds half the 92 tokens of the context, and those decoded; of 6 heads, with groups of 2 no fewer
    # than 3 and no more than 4 key heads.
    kept = (6,) if key_heads == 8 else (3, 4)
    assert pruned in {whole * (100 * key_heads + (46 + 8) * heads) // (2 * 100 * key_heads) for heads in kept}


def test_memory_equals_the_formula_exactly(tmp_path, capsys):
    settings = ["experiment=memory", "method.clusters=[3,8]", "experiment.lengths=[64,200]", "experiment.steps=40"]
    assert run(tmp_path, *settings) == 0
    result, rows = only(tmp_path, "memory/tiny-random/chai/none/*")
    assert (rows.cache_bytes == rows.formula_bytes).all()
    by = rows.set_index(["method", "length"])
    for length in (64, 200):
        assert by.loc[("mha", length), "cache_bytes"] == 2 * 2 * 8 * 8 * length * 4
        assert by.loc[("chai", length), "cache_bytes"] == ((3 + 8) + (8 + 8)) * 8 * length * 4
        assert by.loc[("chai", length), "cache_bytes"] <= by.loc[("chai", length), "allocated_bytes"]
    assert (rows.peak_bytes >= rows.allocated_bytes).all()
    assert (rows.steps == 40).all()
    assert result["metrics"]["kv_saved"] == pytest.approx(5 / 32)
    loaded = result["architecture"]
    assert (loaded["model_type"], loaded["num_hidden_layers"], loaded["intermediate_size"]) == ("llama", 2, 96)
    assert "Formula MB" in capsys.readouterr().out


def test_shared_values_are_counted_once_a_cluster(tmp_path):
    """With and without grouped queries, in the cache and in the limit by arithmetic."""
    settings = ["method=chai_qkv", "method.clusters=[3,8]", "experiment.lengths=[64]"]
    for key_heads, kept in ((8, 3), (4, 2)):
        grouped = [f"model.architecture.num_key_value_heads={key_heads}", "method.group_aware=true"]
        at = tmp_path / str(key_heads)
        assert run(at, "experiment=memory", *settings, *grouped, "experiment.steps=20") == 0
        _, rows = only(at, "memory/tiny-random/chai_qkv/none/*")
        assert (rows.cache_bytes == rows.formula_bytes).all()
        assert rows[rows.method == "chai_qkv"].cache_bytes.item() == 2 * (kept + key_heads) * 8 * 64 * 4
    assert run(tmp_path, "experiment=latency", *settings, "experiment.rounds=1") == 0
    _, rows = only(tmp_path, "latency/tiny-random/chai_qkv/none/*")
    alone = rows[(rows.part == "attention") & (rows.k == 3) & ~rows.baseline]
    assert len(alone) == 2 and alone.limit.to_numpy() == pytest.approx(8 / 3)


@pytest.mark.parametrize("method", ["static", "chai_static"])
def test_static_memberships_are_probed_on_random_weights_of_the_same_shape(tmp_path, method):
    """Time and memory don't depend on which heads they are; a layer alone has a membership that is known as early."""
    shape = ["model.random_init=true", "+model.architecture.vocab_size=200", f"results_dir={tmp_path}"]
    for more in (["experiment=memory", "experiment.steps=4"], ["experiment=latency", "experiment.rounds=1"]):
        settings = [*more, f"method={method}", "experiment.lengths=[24]"]
        assert run_config(compose_config([*shape, *settings])) == 0
    result, rows = only(tmp_path, f"memory/tiny-random/{method}/none/*")
    kept = {"static": [4, 4, 4, 4], "chai_static": [8, 6, 4, 4]}[method]
    assert result["heads_kept"] == kept and (rows.cache_bytes == rows.formula_bytes).all()
    assert rows[rows.method == method].cache_bytes.item() == (sum(kept) + 4 * 16) * 16 * 24 * 4
    result, rows = only(tmp_path, f"latency/tiny-random/{method}/none/*")
    assert set(rows.k.dropna()) == set(kept) and result["membership"] is None


def test_grouped_queries_are_counted_by_the_key_heads_that_are_read(tmp_path):
    settings = ["experiment=memory", "method.clusters=3", "experiment.lengths=[32]", "experiment.steps=0"]
    assert run(tmp_path, *settings, "model.architecture.num_key_value_heads=4", "method.group_aware=true") == 0
    _, rows = only(tmp_path, "memory/tiny-random/chai/none/*")
    assert (rows.cache_bytes == rows.formula_bytes).all()
    assert set(rows[rows.method == "chai"].cache_bytes) == {2 * (2 + 4) * 8 * 32 * 4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["experiment=latency", "experiment.parts=[atention]"], "valid: attention, layer, model"),
        (["experiment=latency", "experiment.rounds=0"], "rounds is 0; valid: 1 or more"),
        (["experiment=latency", "experiment.clusters=[9]"], "experiment.clusters has 9; the model has 8 heads"),
        (["experiment=memory", "experiment.lengths=[4]"], "valid: a list of numbers of 8 or more"),
        (["experiment=memory", "method.clusters=[1,2,3]"], "3 counts, the model has 2 layers"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, override, message):
    assert run(tmp_path, "method.clusters=3", *override) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("status.json"))


def test_lengths_beyond_a_trained_models_positions_are_refused(tmp_path, capsys):
    settings = ["experiment=memory", "experiment.lengths=[300]", f"results_dir={tmp_path}"]
    assert run_config(compose_config(settings)) == 2
    assert "experiment.lengths has 300; the model has 256 positions" in capsys.readouterr().err


def test_rounds_take_turns():
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    after = {"b": lambda: order.append("-")}
    times = interleave(works, 2, torch.device("cpu"), after)
    assert order == ["a", "b", "-", "c", "b", "-", "c", "a", "c", "a", "b", "-"]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2, "c": 2}


@torch.no_grad()
def test_a_twin_shares_weights_and_nothing_else():
    model, batch = make_model("llama"), make_batch([12])
    expected = model(**batch).logits
    other = twin(model, "eager")
    assert all(
        one.data_ptr() == two.data_ptr() for one, two in zip(model.parameters(), other.parameters(), strict=True)
    )
    with Chai(clusters=2)(other):
        assert torch.equal(model(**batch).logits, expected)
        assert not torch.equal(other(**batch).logits, expected)
    assert model.config._attn_implementation != other.config._attn_implementation


@torch.no_grad()
def test_filled_caches_have_their_length_and_go_on():
    model, method = make_model("llama"), Chai(clusters=[HEADS, 3, 2])
    stock = DynamicCache()
    fill_cache(model, Mha(), stock, 2, 30)
    with method(model):
        cache = method.new_cache(model)
        fill_cache(model, method, cache, 2, 30)
        assert cache.get_seq_length() == stock.get_seq_length() == 30
        assert [layer.keys.shape[1] for layer in cache.layers] == [HEADS, 3, 2]
        assert model(torch.tensor([[5], [6]]), past_key_values=cache).logits.isfinite().all()
    assert cache.nbytes * 2 * HEADS * LAYERS == cache_bytes(stock) * (2 * HEADS * LAYERS - 5 - 6) * 31 // 30


@pytest.mark.parametrize("steps", [0, 3, PROFILED_STEPS + 5])
def test_peak_memory_counts_what_lives_at_once(steps):
    held = []

    def prepare():
        held.append(torch.zeros(10_000, dtype=torch.uint8))

    def step():
        held.append(torch.zeros(100, dtype=torch.uint8))
        torch.zeros(5000, dtype=torch.uint8)

    expected = 10_000 + (100 * steps + 5000 if steps else 0)
    peak = peak_memory(torch.device("cpu"), prepare, step, steps)
    assert expected <= peak < 1.1 * expected + 64 * steps  # the allocator's own rounding
