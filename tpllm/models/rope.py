"""Inverse frequencies of rotary embedding, with Llama 3.1's scaling."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tpllm.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """`[head_size / 2]` in radians a position, computed in float32 as Meta and Hugging Face do.

    Scaling is Meta's `apply_scaling`: long wavelengths are divided by the factor, short ones kept, and the
    band between is interpolated.
    """
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    freqs = (np.float32(1.0) / np.float32(config.rotary_base) ** exponents).astype(np.float32)
    s = config.rotary_scaling
    if s is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    low = s.original_max_position_embeddings / s.low_freq_factor
    high = s.original_max_position_embeddings / s.high_freq_factor
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor)
    between = (1 - smooth) * freqs / s.factor + smooth * freqs
    scaled = np.where(wavelength > low, freqs / s.factor, np.where(wavelength < high, freqs, between))
    return scaled.astype(np.float32)
