"""Figures of saved results: ``python -m analysis.figures --list``.

A figure is one file here, named as it is asked for, with ``TITLE``, ``EXPERIMENT`` (whose runs it reads), ``COMMAND``
(that makes such a run) and ``draw``, which takes :class:`analysis.saved.Results` and returns the matplotlib figure and
the plotted data. Files whose name starts with an underscore are what the figures share.
"""
