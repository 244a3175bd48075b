"""Use the library without the experiment runner: generate text with CHAI, print the bytes saved, plot the clusters.

python examples/library.py                                     the embedded model
python examples/library.py huggyllama/llama-7b --clusters llama7b_params --prompt "The capital of France is"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

from chai.methods import Chai

EMBEDDED = str(Path(__file__).resolve().parent.parent / "experiments" / "microworld" / "model")
PROMPT = "ben will wash, knit, cook, swim, walk, read, rest. iris will wash, knit,"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default=EMBEDDED, help="folder or hub id (default: the embedded model)")
parser.add_argument(
    "--clusters", default="8,6,4,4", help="a preset, one count for all layers, or one per layer: 8,6,4,4"
)
parser.add_argument("--prompt", default=PROMPT)
parser.add_argument("--out", default="results/clusters.png", type=Path)
options = parser.parse_args()

counts = [int(k) for k in options.clusters.split(",")] if options.clusters[0].isdigit() else options.clusters
method = Chai(clusters=counts[0] if len(counts) == 1 else counts)
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()

batch = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
with method(model):  # patches the model, and restores it on exit or after an exception
    cache = method.new_cache(model)
    tokens = model.generate(**batch, past_key_values=cache, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
saved = 1 - cache.nbytes / cache.nbytes_mha
print(f"KV cache: {cache.nbytes:,} bytes instead of {cache.nbytes_mha:,}, {saved:.1%} saved")

layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
figure, axes = plt.subplots(figsize=(2 + 0.3 * heads, 1.5 + 0.3 * layers), layout="constrained")
for layer in range(layers):
    clusters = cache.clusters(layer)  # None if every head is its own cluster
    representatives = clusters.representatives[0].tolist() if clusters else list(range(heads))
    assignment = clusters.assignment[0].tolist() if clusters else representatives
    axes.scatter(range(heads), [layer] * heads, s=150, c=assignment, cmap="tab20", marker="s")
    axes.scatter(representatives, [layer] * len(representatives), s=18, c="black")
axes.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers), ylim=(layers - 0.4, -0.6))
axes.set_title("One colour per cluster within a layer; dots mark the representatives", fontsize=9)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=150)
print(options.out)
