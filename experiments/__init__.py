"""Experiments of ``run.py``: joins the library with lm-evaluation-harness, configurations and results."""
