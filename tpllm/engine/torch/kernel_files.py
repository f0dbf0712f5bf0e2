"""Triton's compiled kernels as members of an engine file, and back into the directory where Triton looks for them.

That directory has one of its own for each key, a hash of what is compiled and with what: a kernel that does not fit any
more, as after an update, is not found and compiled anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpllm.errors import UsageError

FOLDER = "triton/"  # in an engine file, then the key's directory and the file's name
GROUP = "__grp__"  # such a file names those that belong to a kernel, with their places
NEEDED = (".cubin", ".json", ".so")  # else what the compiler went through


def pack_kernels(directory: Path) -> dict[str, bytes]:
    """Members for the kernels, and their launchers, in a directory of Triton's."""
    files = (path for path in sorted(directory.glob("*/*")) if path.suffix in NEEDED)
    return {f"{FOLDER}{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def unpack_kernels(members: Mapping[str, bytes]) -> None:
    """Put those of an engine file into Triton's directory, where it lacks them."""
    by_key: dict[str, dict[str, bytes]] = {}
    for member, data in members.items():
        if member.startswith(FOLDER):
            key, name = member.removeprefix(FOLDER).split("/")
            by_key.setdefault(key, {})[name] = data
    if not by_key:
        return
    from triton.runtime.cache import FileCacheManager

    for key, files in by_key.items():
        try:
            put(FileCacheManager(key), files)
        except OSError as e:
            raise UsageError(f"cannot put the engine's kernels where Triton looks for them: {e}; set TRITON_CACHE_DIR "
                             "to a directory that can be written") from None


def put(manager: Any, files: dict[str, bytes]) -> None:
    """Into one key's directory; a group last, which says that all is there."""
    groups = [name for name in files if name.startswith(GROUP)]
    places = {name: manager.get_file(name) or manager.put(data, name)
              for name, data in files.items() if name not in groups}
    for name in groups:
        kernel = name.removeprefix(GROUP)
        if not manager.get_group(kernel):
            named = json.loads(files[name])["child_paths"]
            manager.put_group(kernel, {child: places[child] for child in named if child in places})
