"""Tables of saved results, beside the paper's numbers: ``python -m analysis.tables --list``.

:mod:`.specs` defines the tables, :mod:`.cells` finds the runs and compares them, :mod:`.layout` makes text of cells,
:mod:`.formats` writes the table. To add a table of the paper, write its numbers to ``results/paper/<name>.csv`` and add
an entry to :data:`.specs.TABLES`.
"""
