"""Tables of saved results, beside the paper's numbers: ``python -m analysis.tables --list``.

:mod:`._specs` says what each table holds, :mod:`._cells` finds the runs and compares them, :mod:`._layout` lays the
cells out, :mod:`._formats` writes them. A table of the paper is its numbers in ``results/paper/<name>.csv`` and an
entry in :data:`._specs.TABLES`.
"""
