"""Clusters on one machine, for tests: hosts with ssh between them, and a Slurm."""
