"""Nothing is read on the host from the first token to the last."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from chai.clustering.assignment import kmeans_clusters
from chai.engine import plain
from chai.engine.engine import Engine
from chai.heads import HeadClusters
from chai.methods import Chai, ChaiQkv, Random
from tests.engine.requests import COUNTS
from tests.models import HEADS, make_batch, make_model

#: Operations whose result, or the shape of whose result, a device must hand to the host.
READING = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2")
METHODS = ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")


class HostReads(TorchDispatchMode):
    """Counts what a device would have to hand to the host; kernels that are interpreted run on the device."""

    def __init__(self):
        super().__init__()
        self.counts, self.counting = Counter(), True

    def count(self, name):
        if self.counting:
            self.counts[name] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READING:
            self.count(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.count(f"{name} with a mask")
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads():
    """Count the reads inside the block."""
    reads, run = HostReads(), GridExecutor.__call__

    def interpreted(*args, **kwargs):
        reads.counting = False
        try:
            return run(*args, **kwargs)
        finally:
            reads.counting = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", interpreted)
        for name in METHODS:
            own = getattr(torch.Tensor, name)

            def counted(self, *args, name=name, own=own, **kwargs):
                reads.count(name)
                return own(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        with reads:
            yield reads.counts


class OnDevice:
    """Clusters that depend on the tokens, by operations without a host read."""

    def cluster_heads(self, layers, num_clusters, query, key, scaling, softcap=None):
        found = []
        for k, queries in zip(num_clusters, query, strict=True):
            order = queries.flatten(2).sum(-1).argsort(1)  # [B, H]
            representatives = order[:, :k].sort(1).values
            assignment = order % k
            own = torch.arange(k).expand_as(representatives)
            found.append(HeadClusters(assignment.scatter(1, representatives, own), representatives))
        return found


class DeviceChai(OnDevice, Chai):
    """Chai with such clusters."""


class DeviceChaiQkv(OnDevice, ChaiQkv):
    """ChaiQkv with such clusters."""


@pytest.mark.parametrize(
    ("family", "method", "lengths", "kernels"),
    [
        ("llama", None, [7], False),
        ("qwen2", DeviceChai(clusters=COUNTS), [7, 3], False),
        ("llama", Chai(clusters=[HEADS, HEADS, 2]), [6], True),
        ("qwen3", DeviceChaiQkv(clusters=2), [7, 6], False),
        ("llama", Random(clusters=2), [7], False),
    ],
    ids=["mha", "chai, padded and short", "chai", "chai_qkv", "random"],
)
def test_the_host_reads_nothing_between_the_first_and_the_last_token(family, method, lengths, kernels, monkeypatch):
    """With ``kernels``, all of them: also K-means and, in half precision, attention. Else the same passes without."""
    model, batch = make_model(family), make_batch(lengths)
    if kernels:
        model = model.to(torch.bfloat16)
        monkeypatch.setattr("chai.methods.chai.kmeans_clusters", partial(kmeans_clusters, kernels=True))
    inside = {}

    def note(name):
        own = getattr(Engine, name)

        def run(engine, *args):
            with host_reads() as counts:
                result = own(engine, *args)
            inside.setdefault(name, Counter()).update(counts)
            return result

        monkeypatch.setattr(Engine, name, run)

    for name in ("_run_prompt", "_advance", "_choose"):
        note(name)
    options = {"attention_mask": batch["attention_mask"], "temperature": 1.0, "top_k": 5, "top_p": 0.9}
    with Engine(model, method, len(lengths), 64, kernels=True) as engine:
        if not kernels:
            engine.decoder.operations = plain
        with host_reads() as whole:
            engine.generate(batch["input_ids"], 2, stop_tokens=96, **options)
    assert set(inside) == {"_run_prompt", "_advance", "_choose"}
    assert not any(inside.values()), inside
    assert {"tolist", "cpu"} <= set(whole)  # the prompt's ids and mask, before the first token


def test_a_read_would_be_counted():
    """Of each kind; and the paths of the CPU, which read the clusters, do."""
    x = torch.arange(4)
    with host_reads() as counts:
        x.tolist(), x[0].item(), bool(x[1]), x[x > 1], torch.equal(x, x), x.nonzero(), int(x[2])
    assert {"tolist", "item", "__bool__", "index with a mask", "equal", "nonzero", "__int__"} <= set(counts)
    model, ids = make_model("llama"), make_batch([9])["input_ids"]
    with Engine(model, Random(clusters=2)) as engine:
        engine._begin(ids, None, 1)
        with host_reads() as counts, torch.no_grad():
            engine._run_prompt()
    assert counts
