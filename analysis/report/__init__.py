"""The reproduction report: the paper's claims and tables beside our numbers, with intervals, verdicts and commands.

:mod:`.claims` reads the paper's claims and judges our number for each, which :mod:`.measures` finds. :mod:`.checks` are
the embedded model's known answers. :mod:`.content` collects these and everything else that :mod:`.page` writes.
"""
