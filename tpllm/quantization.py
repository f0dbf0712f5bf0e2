"""Weight-only quantization: what stands for a layer's matrix in a rank's file, and how it is made.

Symmetric, round to nearest, of what the rank holds after the split, so that every rank has scales of its own:

- W8A16: `NAME.weight` int8 `[out, in]` and `NAME.per_channel_scale` float32 `[out]`; a row is weight * scale.
- W4A16: groups of 128 columns, the last one padded with zeros. `NAME.weight` int32 `[out, groups * 16]`: bits 4i to
  4i+3 of word j of a group hold column 16i + j as a number from 1 to 15, 8 is zero. So the columns of one i, like the
  words, lie side by side. `NAME.weights_scaling_factor` `[out, groups]`, in the model's dtype: there is one for 64
  bytes of weights, and float32 would add 3 % to what is read.

The embedding table, the norms and `lm_head`, to which the logits are most sensitive, stay as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tpllm.errors import DataError

if TYPE_CHECKING:
    import torch

ALGOS = {"int8": "W8A16", "int4": "W4A16"}  # by --weight-only-precision
SCALES = {"W8A16": "per_channel_scale", "W4A16": "weights_scaling_factor"}
GROUP, WORDS = 128, 16  # columns of a group, words that hold them
BLOCK = 1 << 20  # weights that are quantized at a time, which bounds what it takes beside input and result
SCRATCH = 32 * BLOCK  # that, in bytes

Spec = tuple[str, tuple[int, ...]]  # dtype and shape


def groups(columns: int) -> int:
    return -(-columns // GROUP)


def scale_name(weight: str, algo: str) -> str:
    """The name of the scales beside `NAME.weight`."""
    return f"{weight.removesuffix('weight')}{SCALES[algo]}"


def stored(name: str, shape: tuple[int, ...], dtype: str, algo: str | None) -> dict[str, Spec]:
    """The tensors of a rank's file that hold a layer's weight of that name, shape and dtype."""
    if algo is None or len(shape) != 2 or not name.endswith(".weight"):
        return {name: (dtype, shape)}
    rows, columns = shape
    if algo == "W8A16":
        return {name: ("int8", shape), scale_name(name, algo): ("float32", (rows,))}
    return {name: ("int32", (rows, groups(columns) * WORDS)),
            scale_name(name, algo): (dtype, (rows, groups(columns)))}


def quantized(weight: torch.Tensor, specs: dict[str, Spec]) -> dict[str, torch.Tensor]:
    """A weight as the tensors of `stored`; the same one where that is all there is."""
    import torch

    if len(specs) == 1:
        return dict.fromkeys(specs, weight)
    made = [torch.empty(shape, dtype=getattr(torch, dtype), device=weight.device) for dtype, shape in specs.values()]
    rows = max(1, BLOCK // weight.shape[1])
    quantize = quantize_int8 if made[0].dtype == torch.int8 else quantize_int4
    for part, values, scale in zip(weight.split(rows), made[0].split(rows), made[1].split(rows), strict=True):
        quantize(part.float(), values, scale)
    if not made[1].isfinite().all():
        raise DataError(f"{next(iter(specs))} holds a number that is not finite, so it cannot be quantized")
    return dict(zip(specs, made, strict=True))


def working_bytes(dtype: torch.dtype, shape: tuple[int, ...], item: int) -> int:
    """What making one tensor of a rank's file takes: itself, and, quantized, what it is made from, of `item` bytes."""
    count = math.prod(shape)
    weights = count * {"torch.int8": 1, "torch.int32": GROUP // WORDS}.get(str(dtype), 0)
    return dtype.itemsize * count + item * weights + bool(weights) * SCRATCH


def divided(weight: torch.Tensor, scale: torch.Tensor, largest: int) -> torch.Tensor:
    """Round numbers from -largest to largest; zeros where the scale is."""
    return (weight / scale[..., None].float()).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-largest, largest)


def quantize_int8(weight: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    scale.copy_(weight.abs().amax(-1) / 127)
    values.copy_(divided(weight, scale, 127))


def quantize_int4(weight: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    import torch
    import torch.nn.functional as F

    weight = F.pad(weight, (0, scale.shape[1] * GROUP - weight.shape[1])).view(*scale.shape, GROUP)
    scale.copy_(weight.abs().amax(-1) / 7)
    nibbles = (divided(weight, scale, 7) + 8).int().view(*scale.shape, GROUP // WORDS, WORDS)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)[:, None]
    # Nibbles do not overlap, so that their sum is their union; the highest one's sign bit is meant to overflow.
    values.copy_((nibbles << shifts).sum(-2, dtype=torch.int32).view(values.shape))


def int4_pairs(words: torch.Tensor, columns: int) -> torch.Tensor:
    """W4A16's words in two's complement and in order of columns, two a byte, the first in its low half.

    `[out, groups * 16]` int32 to `[out, columns / 2]` uint8.
    """
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
    numbers = ((words.view(len(words), -1, 1, WORDS) >> shifts) & 15) ^ 8  # 8 was zero
    nibbles = numbers.to(torch.uint8).view(len(words), -1)[:, :columns]
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4
