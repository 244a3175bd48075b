"""``python -m analysis.overview``: the same as ``python -m analysis.diagrams overview``."""

from analysis.diagrams import main

if __name__ == "__main__":
    main(["overview"])
