"""Patch transformers models: the only code that knows the internals of transformers and accelerate."""
