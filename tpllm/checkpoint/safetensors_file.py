"""Writing a safetensors file tensor by tensor, in any order, by any number of writers, without holding it in memory.

The safetensors library saves a whole dictionary at once; sizes are known before the first weight is read, so
the header can be written first and every tensor put at its place (format: huggingface/safetensors README).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from tpllm.checkpoint.journal import Journal
from tpllm.errors import PreflightError
from tpllm.files import digest

ALIGNMENT = 64  # of the data's start, so that mapped weights suit vector loads
PIECE = 1 << 20  # bytes a write: of more, ext4 makes large folios, and the kernel may take ten times as long
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}


class SafetensorsFile:
    """A file of the given tensors `{name: (dtype, shape)}`: one process has to `allocate` it; `write`, then `close`.

    Threads and processes may write different tensors at the same time.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], journal: Journal) -> None:
        self.path, self._journal = path, journal
        self.digests: dict[str, str] = {}  # of the tensors that are written
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
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end
        path.touch()
        self._file = open(path, "r+b", buffering=0)

    def allocate(self) -> None:
        """Take the whole file's space; what is there already stays."""
        try:
            os.posix_fallocate(self._file.fileno(), 0, self.size)
        except OSError as e:
            raise PreflightError(f"{self.path} needs {self.size} bytes: {e.strerror}") from None
        self._pwrite(self._header, 0)

    def nbytes(self, name: str) -> int:
        dtype, shape, _ = self._specs[name]
        return dtype.itemsize * torch.Size(shape).numel()

    def holds(self, name: str) -> bool:
        """Whether the journal has the tensor and its bytes are those; it then counts as written."""
        if claim := self._journal.claims.get((self.path.name, name)):
            place = np.memmap(self.path, np.uint8, "r", len(self._header) + self._specs[name][2], self.nbytes(name))
            if digest(place.data) == claim:
                self.digests[name] = claim
        return name in self.digests

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place and keep its digest."""
        dtype, shape, offset = self._specs[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == shape, (name, tensor.dtype, tensor.shape, shape)
        data = tensor_bytes(tensor)
        self._pwrite(data, len(self._header) + offset)
        self.digests[name] = digest(data)
        self._journal.add(self.path.name, name, self.digests[name])

    def sync(self) -> None:
        """Have all that this process wrote on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file.fileno(), view[:PIECE], offset)
            view, offset = view[done:], offset + done


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; no copy when it is contiguous."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
