"""The probes on small models: complete rows, honest bytes, and what they refuse."""

from __future__ import annotations

import json
import statistics
from functools import partial

import pandas as pd
import pytest
import torch
from transformers import DynamicCache

from chai.cache import cache_bytes
from chai.methods import Chai, Mha
from experiments.benchmarks import harness
from experiments.benchmarks.baselines import forget_last_token, model_baselines
from experiments.benchmarks.harness import PROFILED_STEPS, fill_cache, interleave, peak_memory, twin
from experiments.benchmarks.roofline import summarize
from experiments.config.compose import compose_config
from experiments.execute import run_config
from experiments.tables.benchmarks import show_latency
from tests.models import HEADS, LAYERS, make_batch, make_latent_model, make_model, make_nested_model

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


#: What a method is compared with, written out here so that a slip in the benchmark shows.
ATTENTION = {"eager", "sdpa", "products"}
PREFILL = {"eager", "sdpa", "sdpa_growing", "products_growing"}
DECODE = {"eager", "sdpa", "eager_growing", "sdpa_growing", "eager_static", "sdpa_static", "products_static"}


def baselines(part: str, phase: str) -> set[str]:
    return ATTENTION if part == "attention" else PREFILL if phase == "prefill" else DECODE


def test_latency_has_a_row_for_everything(tmp_path, capsys):
    settings = ["experiment=latency", "method.clusters=[3,8]", "experiment.lengths=[24,40]", "experiment.rounds=2"]
    assert run(tmp_path, *settings) == 0
    result, rows = only(tmp_path, "latency/tiny-random/chai/none/*")
    columns = ["part", "phase", "length", "k", "implementation"]
    assert {tuple(row) for row in rows[columns].fillna({"k": 0}).itertuples(index=False)} == {
        (part, phase, length, k, name)
        for part, counts in (("attention", (3, 8)), ("layer", (3, 8)), ("model", (0,)))
        for phase in ("prefill", "decode")
        for length in (24, 40)
        for k in counts
        for name in baselines(part, phase) | {"chai"} | ({"control"} if k != 8 else set())  # at k = H it is the method
    }
    roles = rows.groupby("implementation").role.unique().map(list)
    assert roles.pop("chai") == ["method"] and roles.pop("control") == ["control"]
    assert all(found == ["baseline"] for found in roles) and (rows.baseline == (rows.role == "baseline")).all()
    assert (rows.speedup_p25 <= rows.speedup).all() and (rows.speedup <= rows.speedup_p75).all()
    assert (rows[rows.role == "control"].limit == 1).all()
    alone = rows[rows.part != "model"]
    assert set(alone.k) == {3, 8} and rows[rows.part == "model"].k.isna().all()
    assert (rows.ms > 0).all() and (rows.ms_p25 <= rows.ms).all() and (rows.ms <= rows.ms_p75).all()
    own = alone[(alone.role == "method") & (alone.part == "attention")]
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
    assert "2 to 10 rounds, too few for quartiles (at least 9)" in " ".join(printed.split())
    assert result["metrics"].keys() >= {"model_decode", "control_model_decode", "control_attention_decode_k3"}
    assert run(tmp_path, *settings) == 0 and "already complete" in capsys.readouterr().out


def test_methods_without_clusters_are_timed_as_whole_models(tmp_path, capsys):
    settings = ["method=spatten", "experiment=latency", "experiment.lengths=[24]", "experiment.rounds=2"]
    assert run(tmp_path, *settings) == 0
    _, rows = only(tmp_path, "latency/tiny-random/spatten/none/*")
    assert set(rows[~rows.baseline].part) == {"model"} and set(rows.role) == {"method", "baseline"}
    own = rows[rows.implementation == "spatten"].set_index("phase")
    assert own.ms.gt(0).all() and own.speedup.gt(0).all()
    assert own.limit["prefill"] > 1 and pd.isna(own.limit["decode"])
    assert "nan" not in capsys.readouterr().out


class Clock:
    """Seconds that pass only while something is timed, by its name; each round twice as slow as the one before."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs, self.now, self.rounds = costs, 0.0, dict.fromkeys(costs, 0)

    def timers(self):
        def work(name: str) -> None:
            self.now += self.costs[name] * 2 ** self.rounds[name] / 1e3
            self.rounds[name] += 1

        return {name: partial(work, name) for name in self.costs}

    def perf_counter(self) -> float:
        return self.now


def test_gains_are_over_the_fastest_baseline_round_by_round(monkeypatch):
    """The machine slows down from round to round, which the ratios of a round do not feel."""
    clock = Clock(
        {"eager": 12.0, "sdpa": 14.4, "sdpa_growing": 10.0, "eager_static": 11.0, "chai": 8.0, "control": 10.0}
    )
    monkeypatch.setattr(harness.time, "perf_counter", clock.perf_counter)
    times = interleave(clock.timers(), 9, torch.device("cpu"))
    case = {"part": "model", "phase": "decode", "length": 64, "k": None}
    peak = {"gflop_per_s": 1.0, "gb_per_s": 1.0}
    rows = summarize(case, times, "chai", lambda k: 80.0 if k is None else 100.0, peak, num_heads=8)
    by = pd.DataFrame(rows).set_index("implementation")
    assert set(by.best_baseline) == {"sdpa_growing"} and (by.rounds == 9).all()
    expected = {name: 10.0 / cost for name, cost in clock.costs.items()}
    for name in ("speedup", "speedup_p25", "speedup_p75"):
        assert by[name].to_dict() == pytest.approx(expected)
    assert by.ms["chai"] == pytest.approx(8.0 * 2**5) and by.ms_p75["chai"] > by.ms["chai"]
    assert by.role.to_dict() == {name: name if name == "control" else "baseline" for name in expected} | {
        "chai": "method"
    }
    assert by.limit["chai"] == pytest.approx(1.25) and set(by.limit.drop("chai")) == {1.0}


def test_the_spread_is_of_the_ratios(monkeypatch):
    """Quartiles of round-by-round ratios of 8 to 16, not those of the two times."""
    samples = [float(cost) for cost in (8, 9, 10, 11, 12, 13, 14, 15, 16)]
    times = {"eager": [16.0] * 9, "control": [16.0] * 9, "chai": samples}
    case = {"part": "model", "phase": "decode", "length": 64, "k": None}
    rows = summarize(case, times, "chai", lambda k: 1.0, {"gflop_per_s": 1.0, "gb_per_s": 1.0}, num_heads=8)
    by = pd.DataFrame(rows).set_index("implementation")
    ratios = [16 / cost for cost in samples]
    low, middle, high = statistics.quantiles(ratios, n=4)
    assert tuple(by.loc["chai", ["speedup_p25", "speedup", "speedup_p75"]]) == pytest.approx((low, middle, high))
    assert tuple(by.loc["control", ["speedup_p25", "speedup", "speedup_p75"]]) == (1, 1, 1)


def printed(tmp_path, capsys, rows: pd.DataFrame, **fields) -> str:
    """What the tables of a saved run say, without the spaces of their columns."""
    result = {"model": "llama7b", "method": "chai", "layers": 2, "heads": 8, "heads_kept": [3, 3], "dtype": "float32"}
    (tmp_path / "result.json").write_text(json.dumps(result | {"device_name": "CPU", "membership": None} | fields))
    rows.to_parquet(tmp_path / "measurements.parquet", index=False)
    show_latency(tmp_path)
    return " ".join(capsys.readouterr().out.split())


def measured(control: tuple[float, float, float], rounds: int = 9) -> pd.DataFrame:
    case = {
        "part": "model",
        "phase": "decode",
        "length": 2048,
        "k": None,
        "ms_p25": 0.0,
        "ms_p75": 0.0,
        "of_limit": 1.0,
    }
    case |= {"best_baseline": "sdpa_growing", "rounds": rounds, "rate": 1.0, "rate_unit": "GB/s", "of_peak": 0.5}
    names = {"eager": 144, "sdpa": 145, "eager_growing": 120, "sdpa_growing": 101, "sdpa_static": 102}
    names |= {"eager_static": 103, "products_static": 104, "control": 100, "chai": 84}
    roles = {"control": "control", "chai": "method"}
    gains = {"control": control, "chai": (1.18, 1.2, 1.22)}
    rows = [
        case
        | {"implementation": name, "role": roles.get(name, "baseline"), "baseline": name not in roles, "ms": float(ms)}
        | dict(zip(("speedup_p25", "speedup", "speedup_p75"), gains.get(name, (1.0, 1.0, 1.0)), strict=True))
        | {"limit": 1.17 if name == "chai" else 1.0}
        for name, ms in names.items()
    ]
    return pd.DataFrame(rows).astype({"k": "Int64"})


def test_the_tables_show_every_cache_the_control_and_the_spread(tmp_path, capsys):
    said = printed(tmp_path, capsys, measured((0.97, 1.0, 1.01)))
    assert "ms, 9 rounds Part Tokens k Stock Growing Static Products k = H chai Rate" in said
    assert "model decode 2048 3 144 101 102 104 100 84.0 1.0 GB/s" in said
    assert "Fastest Gain k = H Limit Peak" in said
    assert "sdpa growing 1.20 (1.18-1.22) 1.00 (0.97-1.01) 1.17 50 %" in said


def test_a_control_that_is_not_one_is_marked_and_few_rounds_are(tmp_path, capsys):
    said = printed(tmp_path, capsys, measured((1.02, 1.05, 1.1), rounds=3))
    assert "1.05 (1.02-1.10)*" in said and "3 rounds, too few for quartiles" in said


def test_results_of_earlier_versions_are_shown_as_such(tmp_path, capsys):
    rows = measured((1, 1, 1)).drop(columns=["role", "speedup_p25", "speedup_p75"])
    rows = rows[rows.implementation.isin(["eager", "sdpa", "chai"])].assign(best_baseline="eager")
    said = printed(tmp_path, capsys, rows)
    assert "model decode 2048 3 144 84.0" in said and "eager 1.20 1.17" in said
    assert "Measured by an earlier version, without the control" in said


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "qwen2"])
@torch.no_grad()
def test_every_baseline_decodes_what_the_stock_model_does(family):
    """Logits of the prompt and of tokens after it, on each kernel and cache; a token forgotten is no longer seen."""
    model, batch = make_model(family), make_batch([14])
    expected = [model(**batch).logits[:, -1]]
    ids = batch["input_ids"]
    for token in (3, 4):
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        expected.append(model(ids).logits[:, -1])
    for phase in ("prefill", "decode"):
        for name, entry in model_baselines(model, phase, 16).items():
            cache = entry.new_cache()
            found = [entry.model(**batch, past_key_values=cache).logits[:, -1]]
            entry.model(torch.tensor([[9]]), past_key_values=cache)
            forget_last_token(cache)
            assert int(cache.get_seq_length()) == 14
            found += [entry.model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1] for token in (3, 4)]
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=name)
            assert int(cache.get_seq_length()) == 16


@torch.no_grad()
def test_the_static_cache_is_read_whole():
    """It is as long as the sequence: stock attention reads all that is allocated, so room would be held against it."""
    model = make_model("llama")
    cache = model_baselines(model, "decode", 30)["sdpa_static"].new_cache()
    fill_cache(model, Mha(), cache, 2, 29)
    model(torch.tensor([[5], [6]]), past_key_values=cache)
    assert int(cache.get_seq_length()) == 30 and cache_bytes(cache) == 2 * LAYERS * 2 * HEADS * 30 * 8 * 4


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
    alone = rows[(rows.part == "attention") & (rows.k == 3) & (rows.role == "method")]
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


@pytest.mark.parametrize("make", [make_nested_model, make_latent_model])
def test_any_causal_model_is_measured_as_it_is(tmp_path, capsys, make):
    """What cannot be counted of latent attention is blank."""
    make().save_pretrained(tmp_path / "saved")
    model = ["method=mha", f"model.path={tmp_path}/saved", f"results_dir={tmp_path}", "device=cpu"]
    model.append("experiment.lengths=[24]")
    assert run_config(compose_config([*model, "experiment=latency", "experiment.rounds=2"])) == 0
    result, rows = only(tmp_path, "latency/saved/mha/none/*")
    is_latent = make is make_latent_model
    assert result["layers"] == LAYERS and result["heads_kept"] == [HEADS] * LAYERS
    assert set(rows.part) == {"layer", "model"} | (set() if is_latent else {"attention"})
    assert (rows.ms > 0).all() and (rows.rate.isna() == is_latent).all()
    assert run_config(compose_config([*model, "experiment=memory", "experiment.steps=4"])) == 0
    _, rows = only(tmp_path, "memory/saved/mha/none/*")
    assert (rows.formula_bytes.isna() if is_latent else rows.formula_bytes == rows.cache_bytes).all()
    assert "nan" not in capsys.readouterr().out
    alone = [*model, "experiment=latency", "experiment.parts=[attention]", "experiment.rounds=1"]
    assert run_config(compose_config(alone)) == (1 if is_latent else 0)
    if is_latent:
        assert "latent attention" in capsys.readouterr().err


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
