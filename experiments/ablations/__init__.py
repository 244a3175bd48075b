"""Choices that the paper leaves open, each measured on the same texts against multi-head attention."""
