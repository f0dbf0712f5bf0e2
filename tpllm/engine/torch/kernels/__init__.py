"""Triton kernels; these modules are imported only when an engine runs on CUDA."""
