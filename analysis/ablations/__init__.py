"""The tables of docs/ablations.md, from saved results of ``experiment=ablations``."""
