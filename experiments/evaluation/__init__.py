"""Accuracy of a method on tasks of lm-evaluation-harness."""
