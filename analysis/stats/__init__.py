"""Compare a method with multi-head attention on the same items, and our numbers with the paper's.

Both runs answer the same questions, so differences are taken item by item (a paired comparison). Their uncertainty
comes from the items on which the runs differ, and is much smaller than that of either score.

:mod:`.score_interval` has the interval of one paired difference, :mod:`.paired` compares runs, several seeds and
several tasks, :mod:`.families` corrects many comparisons, :mod:`.verdicts` judges our numbers.
"""

from analysis.stats.families import holm
from analysis.stats.intervals import ALPHA, EQUAL_LEVEL, LEVEL, Interval
from analysis.stats.paired import Comparison, Flips, Unpaired, compare, compare_seeds, mcnemar, mean_over_tasks
from analysis.stats.verdicts import BOUNDS, MARGIN, RULES, VERDICTS, Bound, Verdict, judge

__all__ = [
    "ALPHA", "BOUNDS", "EQUAL_LEVEL", "LEVEL", "MARGIN", "RULES", "VERDICTS", "Bound", "Comparison", "Flips",
    "Interval", "Unpaired", "Verdict", "compare", "compare_seeds", "holm", "judge", "mcnemar", "mean_over_tasks",
]  # fmt: skip
