"""A captured step of one request may be replayed in the next: it reads the same memory, whatever the clusters are."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

import chai
from chai.attention.fastest import FASTEST
from chai.engine import plain
from chai.methods import Chai, ChaiQkv
from tests.models import HEADS, make_batch, make_model


class Memory(TorchDispatchMode):
    """Lists the tensors that operations and kernels read or write and that existed before."""

    def __init__(self):
        super().__init__()
        self.found, self._made, self._kept = set(), set(), []

    def note(self, arguments):
        """Return the storages of the tensors among the arguments."""
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        self._kept += tensors  # memory that is freed could be that of a later tensor
        old = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in self._made]
        self.found |= {(tensor.untyped_storage().data_ptr(), *tensor.shape) for tensor in old}
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = self.note((args, kwargs or {}))
        result = function(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._kept += results
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in results} - read
        return result


@pytest.fixture
def memory_of_step(monkeypatch):
    """A function that runs a decode step of an engine and returns the memory that it reads, scratch excepted."""
    run = GridExecutor.__call__

    def measure(engine):
        memory = Memory()

        def interpreted(self, *args, **kwargs):
            memory.note((args, kwargs))
            with _disable_current_modes():
                return run(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", interpreted)
            with memory:
                engine.decode_step()
        return memory.found

    return measure


def run_prompt(engine, first, lengths, kernels=True):
    """Run a prompt that begins with the token ``first``, by plain torch, which is not slow; ``kernels``: in steps."""
    batch = make_batch(lengths)
    batch["input_ids"][:, -lengths[-1] :] = torch.arange(first, first + lengths[-1])
    decoder, operations = engine.decoder, engine.decoder.operations
    decoder.kernels, decoder.operations = False, plain
    engine.prefill(batch["input_ids"], batch["attention_mask"])
    decoder.kernels, decoder.operations = kernels, operations


@pytest.mark.parametrize(
    ("family", "method", "rows", "chosen"),
    [
        ("llama", Chai(clusters=[HEADS, 2, 2]), 1, "one kernel"),
        ("llama", Chai(clusters=[HEADS, 2, 2]), 1, "products"),
        ("qwen3", Chai(clusters=[2, 2, HEADS]), 2, "one kernel"),
        ("qwen2", ChaiQkv(clusters=3), 1, "one kernel"),
    ],
    ids=["kernel", "products", "grouped and padded", "chai_qkv"],
)
def test_a_step_reads_the_same_memory_in_each_request(family, method, rows, chosen, memory_of_step, monkeypatch):
    """With the kernel, and with the products of torch."""

    def name(key, runs, device):
        names = list(runs())
        return chosen if chosen in names else names[0]

    monkeypatch.setattr(FASTEST, "name", name)
    found, clusters = [], []
    with chai.Engine(make_model(family), method, rows, 64, kernels=True) as engine:
        for first in (5, 60):
            run_prompt(engine, first, [9, 7][:rows])
            if not found:
                engine.decode_step()  # as it is; the next one would be captured
            found.append(memory_of_step(engine))
            clusters.append([layer.clusters.assignment.clone() for layer in engine.decoder.layers if layer.clusters])
        keys = {layer.keys.data_ptr() for layer in engine.decoder.layers}
    assert found[0] == found[1] and keys <= {place[0] for place in found[0]}
    assert not all(torch.equal(one, other) for one, other in zip(*clusters, strict=True))


def test_memory_that_moves_would_be_seen(memory_of_step):
    with chai.Engine(make_model("llama"), max_length=64) as engine:
        run_prompt(engine, 5, [8], kernels=False)
        engine.decode_step()
        first = memory_of_step(engine)
        run_prompt(engine, 60, [9], kernels=False)
        assert memory_of_step(engine) == first
        engine.decoder.layers[2].values = engine.decoder.layers[2].values.clone()
        run_prompt(engine, 60, [9], kernels=False)
        assert memory_of_step(engine) != first
