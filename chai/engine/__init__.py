"""Generation without host reads, over a KV cache of reserved length, with the decode step in a CUDA graph."""

from chai.engine.engine import Engine, generate

__all__ = ["Engine", "generate"]
