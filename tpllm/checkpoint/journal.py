"""What a conversion has written so far, so that after a kill the next one can go on."""

from __future__ import annotations

from pathlib import Path


class Journal:
    """A line `digest file tensor` for each tensor, appended once its bytes are written; each rank appends to its own.

    Nothing is synchronised to the disk for it: a line is a claim, which the reader compares with the tensor's bytes.
    So neither a kill nor a loss of power does harm, at the price of reading what is there.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.claims: dict[tuple[str, str], str] = {}  # digests by file and tensor
        for path in directory.glob(".journal-*"):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if len(words := line.split()) == 3:
                    self.claims[words[1], words[2]] = words[0]
        self._path = directory / f".journal-{rank}"

    def add(self, file: str, tensor: str, digest: str) -> None:
        with open(self._path, "ab") as journal:  # one write: threads append too, and a last line may be cut off
            journal.write(f"\n{digest} {file} {tensor}\n".encode())

    @staticmethod
    def remove(directory: Path) -> None:
        """All ranks' journals."""
        for path in directory.glob(".journal-*"):
            path.unlink()
