"""Command line of all experiments.

python run.py                                            CHAI on the embedded model and its five tasks
python run.py method=chai model=llama7b task=piqa        one method, one model, one task
python run.py -m method=mha,chai task=piqa,boolq         a sweep
"""

from __future__ import annotations

import sys

from experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
