"""Writing a safetensors file tensor by tensor, in any order, without holding it in memory.

The safetensors library saves a whole dictionary at once; sizes are known before the first weight is read, so
the header can be written first and every tensor put at its place (format: huggingface/safetensors README).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from tpllm.errors import PreflightError
from tpllm.files import digest

ALIGNMENT = 64  # of the data's start, so that mapped weights suit vector loads
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}


class SafetensorsFile:
    """A preallocated file of the given tensors `{name: (dtype, shape)}`; `write` each once, then `close`.

    Threads may write different tensors at the same time.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = path
        self.digests: dict[str, str] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._specs: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._specs[name] = (dtype, shape, end)
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._data_start = len(text) + 8
        self.size = self._data_start + end
        self._file = open(path, "wb")
        try:
            os.posix_fallocate(self._file.fileno(), 0, self.size)
        except OSError as e:
            self._file.close()
            raise PreflightError(f"{path} needs {self.size} bytes: {e.strerror}") from None
        self._pwrite(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place and keep its digest."""
        dtype, shape, offset = self._specs[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == shape, (name, tensor.dtype, tensor.shape, shape)
        data = tensor_bytes(tensor)
        self._pwrite(data, self._data_start + offset)
        self.digests[name] = digest(data)

    def close(self) -> None:
        assert self.digests.keys() == self._specs.keys(), "a tensor was never written"
        self.digests = {name: self.digests[name] for name in self._specs}  # not in the order of several writers
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            # One write call takes at most 2 GiB on Linux.
            done = os.pwrite(self._file.fileno(), view[:1 << 30], offset)
            view, offset = view[done:], offset + done


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; no copy when it is contiguous."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
