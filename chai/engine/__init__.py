"""Generation over a KV cache of reserved length, of which the host reads tokens at most, with steps in CUDA graphs."""

from chai.engine.engine import Engine, generate

__all__ = ["Engine", "generate"]
