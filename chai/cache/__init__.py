"""KV caches that keep fewer heads or tokens; all state of a request lives here."""

from chai.cache.base import (
    PrunedCache,
    PrunedLayer,
    allocated_bytes,
    append_random,
    cache_bytes,
    cache_bytes_mha,
    stored_kv_heads,
    vector_bytes,
)
from chai.cache.clustered import ClusteredCache, ClusteredLayer
from chai.cache.growing import GrowingCache

__all__ = [
    "ClusteredCache",
    "ClusteredLayer",
    "GrowingCache",
    "PrunedCache",
    "PrunedLayer",
    "allocated_bytes",
    "append_random",
    "cache_bytes",
    "cache_bytes_mha",
    "stored_kv_heads",
    "vector_bytes",
]
