"""The tables printed at the end of a run."""
