"""What ``run.py`` can run: the only place that joins the library with lm-evaluation-harness and with results."""
