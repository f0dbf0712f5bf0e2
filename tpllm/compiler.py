"""The C++ compiler that backend `inductor` needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tpllm.errors import PreflightError

# What compiled graphs use of the C++ library: with a copy of their own of it, they crash while they are loaded.
SAMPLE = "#include <stdexcept>\n#include <string>\nstd::string f(std::string s) { throw std::runtime_error(s + s); }\n"


def find_compiler(say: Callable[[str], None] = print) -> str:
    """The command of a C++ compiler that works: $CXX or g++, else another one, saying so; refused where none does."""
    wanted = os.environ.get("CXX") or "g++"
    problem = compiler_problem(wanted)
    if problem is None:
        return wanted
    others = ("g++", "/usr/bin/g++", "clang++") if shutil.which(wanted.split()[0]) else ()
    for command in others:
        if command != wanted and compiler_problem(command) is None:
            say(f"build: {problem}; compiling with {command}")
            return command
    raise PreflightError(f"backend inductor needs a C++ compiler and {problem}: install g++, set CXX, or build with "
                         "--backend eager")


def compiler_problem(command: str) -> str | None:
    """Why a compiler cannot make what Inductor needs, or None; it is asked to compile a small library."""
    if shutil.which(command.split()[0]) is None:
        return f"there is no {command}"
    with tempfile.TemporaryDirectory(prefix="tpllm-") as scratch:
        source, library = Path(scratch, "sample.cpp"), Path(scratch, "sample.so")
        source.write_text(SAMPLE, encoding="utf-8")
        done = subprocess.run([*command.split(), "-std=c++17", "-fPIC", "-shared", "-o", str(library), str(source)],
                              capture_output=True, text=True)
        if done.returncode != 0 or not library.is_file():
            return f"{command} does not compile a small library ({(done.stderr.strip() or 'no message')[-200:]})"
        # The name of each library that is needed stands in the file as text.
        if not any(name in library.read_bytes() for name in (b"libstdc++.so", b"libc++.so")):
            return f"{command} links the C++ library statically, which PyTorch cannot load"
    return None
