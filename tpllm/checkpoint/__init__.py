"""Checkpoints: reading Meta's weights, cutting them for any number of ranks, TensorRT-LLM's files on disk."""
