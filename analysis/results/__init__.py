"""Finished runs, read back from a results folder without the code that made them (fields: docs/results.md).

:mod:`.files` reads single files, :mod:`.runs` finds the runs of an experiment, :mod:`.scores`, :mod:`.profiles` and
:mod:`.benchmarks` read those of accuracy, profile, and memory and latency.
"""
