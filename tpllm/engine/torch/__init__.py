"""Engines made with PyTorch: the same program run as it is (`eager`) or compiled ahead of time (`inductor`)."""
