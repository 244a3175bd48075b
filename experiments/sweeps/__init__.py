"""Sweeps: expansion, record, launch here, in local processes, or on Slurm."""
