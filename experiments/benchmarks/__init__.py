"""Latency and memory benchmarks of a method on a model."""
