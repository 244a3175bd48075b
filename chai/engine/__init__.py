"""Generation without host reads, over a KV cache of reserved length, with the decode step in a CUDA graph."""
