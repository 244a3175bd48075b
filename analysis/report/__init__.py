"""The reproduction report: one page of what the paper says, what was measured, how surely, and at what cost.

``_claims`` reads the paper's claims, ``_measures`` finds our number for each, ``_verdict`` compares the two; ``_checks``
are the embedded model's known answers; ``_overview``, ``_tables``, ``_figures``, ``_plots``, ``_layers`` and
``_provenance`` collect what is shown, and ``_page`` writes it.
"""
