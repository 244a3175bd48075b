"""``python -m analysis.diagram``: the same as ``python -m analysis.diagrams method``."""

from analysis.diagrams import main

if __name__ == "__main__":
    main()
