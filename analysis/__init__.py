"""Figures and tables from ``results/`` alone; never loads a model."""
