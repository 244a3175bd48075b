"""The reproduction report: the paper's claims and tables beside our numbers, with intervals, verdicts and commands.

:mod:`.claims` reads the paper's claims and judges our number for each. The functions of :mod:`.measures` find it, in
:mod:`.accuracy`, :mod:`.costs` and :mod:`.heads`, among the runs that count by :mod:`.conditions`. :mod:`.checks` are
the embedded model's known answers. :mod:`.content` collects these and everything else that :mod:`.page` writes.
"""
