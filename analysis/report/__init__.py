"""The reproduction report: one page of what the paper says, what was measured, how surely, and at what cost.

``_claims`` reads the paper's claims, ``_measures`` finds our number for each, and ``_verdict`` compares the two.
``_checks`` are the embedded model's known answers. ``_overview``, ``_tables``, ``_figures``, ``_plots``, ``_layers``
and ``_provenance`` make what is shown, ``_content`` collects it, and ``_page`` writes it.
"""
