"""Whether kernels and engine compute what they should, on the GPU or under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chai.attention.fastest import FASTEST
from chai.attention.gpu import implementations
from chai.clustering.assignment import kmeans_clusters
from chai.engine import Engine
from chai.methods import Chai, ChaiQkv, Random, load_method
from chai.methods.base import Method
from experiments.gpu.problems import is_exact, large_problem, random_problem
from experiments.gpu.report import Outcome

PROBLEMS = 100  # of each kernel
KINDS = 10  # of problems: each compiles kernels of its own
CLUSTERINGS = 200
TOKENS = 24  # generated
PROMPTS = 3
VOCABULARY = 512


def check_kernels(device: torch.device, problems: int = PROBLEMS) -> Iterator[Outcome]:
    """Compare the attention kernels with the equation in fp64 over random shapes."""
    for one_token, name in ((True, "decode kernel"), (False, "prefill kernel")):
        wrong = []
        for seed in range(problems):
            kind = seed % KINDS
            problem = random_problem(seed, one_token, KINDS).to(device)
            runs = [(name, run) for name, run in implementations(problem.inputs).items() if is_ours(name)]
            setting, run = runs[0 if problem.query.dtype == torch.float32 else kind % len(runs)]
            wrong += [] if is_exact(problem, run()) else [f"problem {seed}, {setting}"]
        asked = f"error as of stock attention, {problems} random shapes"
        yield Outcome(name, f"{len(wrong)} wrong" + (f" ({wrong[0]})" if wrong else ""), asked, not wrong)


def check_settings(device: torch.device) -> Iterator[Outcome]:
    """Compare every implementation that may be chosen, at LLaMA-7B's heads and lengths of several blocks."""
    for q_len, size in ((1, 5000), (1000, 1000), (700, 2049)):
        for k in (4, 18):
            for padded in (False, True):
                problem = large_problem(device, k, q_len, size, padded=padded)
                wrong, missing, computed = [], [], 0
                for name, run in implementations(problem.inputs).items():
                    try:
                        result = run()
                    except RuntimeError:  # torch refuses the shape: then it is not chosen
                        if is_ours(name):
                            raise
                        missing.append(name)
                        continue
                    computed += 1
                    wrong += [] if is_exact(problem, result) else [name]
                rows = "padded rows" if padded else "whole rows"
                found = f"{len(wrong)} of {computed} wrong" + (f" ({', '.join(wrong)})" if wrong else "")
                found += f", {len(missing)} not available" if missing else ""
                yield Outcome(f"k = {k}, {q_len} of {size} tokens, {rows}", found, "every implementation", not wrong)


def check_generate(device: torch.device) -> Iterator[Outcome]:
    """Compare ``generate()`` of transformers under each method on the device and on the CPU."""
    model = small_model()
    ids = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0] * 6 + [1] * 14, [1] * 20])
    methods = {"chai": Chai(clusters=2), "chai_qkv": ChaiQkv(clusters=2), "random": Random(clusters=2)}
    for name, method in methods.items():
        wanted = by_transformers(model, method, ids, mask, TOKENS)
        with FASTEST.unmeasured():
            found = by_transformers(model.to(device), method, ids.to(device), mask.to(device), TOKENS).cpu()
        model.to("cpu")
        same = bool((found == wanted).all())
        yield Outcome(f"generate(), {name}", "equal" if same else "not equal", "tokens of generate() on the CPU", same)


def is_ours(name: str) -> bool:
    """Whether an implementation is one of this project's kernels."""
    return name.startswith(("split-KV", "one score"))


def check_clustering(device: torch.device, problems: int = CLUSTERINGS) -> Iterator[Outcome]:
    """Compare the K-means of the device with that of the CPU."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    scores = torch.randn(1, problems, 32, 5, 5, generator=generator) * 2
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    features = scores.softmax(-1).flatten(3)
    for k in (4, 18, 28):
        (wanted,) = kmeans_clusters(features, [k])
        (found,) = kmeans_clusters(features.to(device), [k])
        same = (found.assignment.cpu() == wanted.assignment).all(1)
        same &= (found.representatives.cpu() == wanted.representatives).all(1)
        wrong += int((~same).sum())
    yield Outcome("clusters", f"{wrong} differ", f"those of the CPU, {3 * problems} problems", wrong == 0)


def check_engine(
    device: torch.device, tokens: int = TOKENS, names: Sequence[str] = ("mha", "chai", "chai_qkv", "random")
) -> Iterator[Outcome]:
    """Compare the engine's tokens with those of transformers' ``generate()`` on the CPU."""
    model = small_model()
    methods = {"mha": load_method("mha")(), "chai": Chai(clusters=2), "random": Random(clusters=2)}
    methods["chai_qkv"] = ChaiQkv(clusters=2)
    for name in names:
        for kind, mask in (("one row", None), ("padded rows", torch.tensor([[0] * 6 + [1] * 14, [1] * 20]))):
            rows = 1 if mask is None else 2
            # Several prompts: what a CUDA graph has captured for the first must serve the others.
            draw = torch.Generator().manual_seed(1)
            prompts = [torch.randint(1, VOCABULARY, (rows, 20), generator=draw) for _ in range(PROMPTS)]
            wanted = [by_transformers(model, methods[name], ids, mask, tokens) for ids in prompts]
            with FASTEST.unmeasured(), Engine(model.to(device), methods[name], rows, 64, kernels=True) as engine:
                options = {"attention_mask": mask, "stop_tokens": ()}
                found = [engine.generate(ids.to(device), tokens, **options).cpu() for ids in prompts]
            model.to("cpu")
            equal = sum(int((one == other).all()) for one, other in zip(found, wanted, strict=True))
            asked = "tokens of generate() on the CPU"
            yield Outcome(f"engine, {name}, {kind}", f"{equal} of {PROMPTS} equal", asked, equal == PROMPTS)


def by_transformers(
    model: PreTrainedModel, method: Method, ids: torch.Tensor, mask: torch.Tensor | None, tokens: int
) -> torch.Tensor:
    """Generate greedily under a method by ``generate()``."""
    mask = torch.ones_like(ids) if mask is None else mask
    with method(model), torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )


def small_model() -> PreTrainedModel:
    """Build a small LLaMA of random weights, with logits far enough apart to be the same on every device."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes)).eval()
    model.lm_head.weight.data *= 20
    for layer in model.model.layers:  # heads that attend differently
        layer.self_attn.q_proj.weight.data *= 8
    return model
