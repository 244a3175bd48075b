"""Where the jobs of a sweep run: here one after the other, in processes of this machine, or on a Slurm cluster."""
