"""What TensorRT says while it builds and runs: errors for one sentence to the user, progress for the console."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from typing import Any

import tensorrt as trt
from tqdm import tqdm

from tpllm.distributed import World
from tpllm.errors import OutOfMemory, RankError, TpllmError

Severity = trt.ILogger.Severity


class Logger(trt.ILogger):  # type: ignore[misc]
    """Keeps errors for `refusal` and writes warnings to the rank's log; must outlive all that is made with it."""

    def __init__(self, world: World) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self._world = world

    def log(self, severity: Any, msg: str) -> None:
        if severity in (Severity.INTERNAL_ERROR, Severity.ERROR):
            self.errors.append(msg)
        if severity != Severity.VERBOSE:
            self._world.log.write(f"TensorRT {severity.name}: {msg}")

    def refusal(self, what: str) -> TpllmError:
        """The error to raise when TensorRT refused `what`: its own first reason, which names the layer it is about."""
        reason = self.errors[0] if self.errors else "it gave no reason"
        self.errors.clear()
        kind = OutOfMemory if re.search(r"out ?of ?memory|insufficient memory", reason, re.IGNORECASE) else RankError
        # "[file.cpp::function::line] Error Code 4: Internal Error (the reason)"
        if found := re.search(r"Error Code \d+: [^(]*\((.*)\)[^)]*$", reason, re.DOTALL):
            reason = found[1]
        return kind(f"TensorRT refused {what}: {' '.join(reason.split()).rstrip('.')}")

    def start(self, kind: Any) -> Any:
        """A builder or a runtime.

        Where CUDA does not work, the bindings have none to wrap and raise a TypeError, or they wrap one that says so,
        and that ends the process when it is used or deleted (TensorRT 11.4's lean runtime).
        """
        self.errors.clear()
        with suppress(TypeError):
            started = kind(self)
            if not self.errors:
                return started
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(started))  # never to be deleted
        raise self.refusal(f"to start its {kind.__name__}")

    def deserialize(self, plan: bytes | memoryview, remedy: str = "") -> Any:
        """A plan's engine, which keeps its runtime; where it is refused, the error ends with `remedy`."""
        runtime = self.start(trt.Runtime)
        runtime.error_recorder = ErrorRecorder(self)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.refusal(f"the plan of {len(plan)} bytes{remedy}")
        return engine


class ErrorRecorder(trt.IErrorRecorder):  # type: ignore[misc]
    """Hands errors to the logger's list: with a recorder set, TensorRT may not log them."""

    def __init__(self, logger: Logger) -> None:
        trt.IErrorRecorder.__init__(self)
        self._logger = logger
        self._found: list[tuple[Any, str]] = []

    def num_errors(self) -> int:
        return len(self._found)

    def get_error_code(self, index: int) -> Any:
        return self._found[index][0]

    def get_error_desc(self, index: int) -> str:
        return self._found[index][1]

    def has_overflowed(self) -> bool:
        return False

    def clear(self) -> None:
        self._found.clear()

    def report_error(self, code: Any, desc: str) -> bool:
        self._found.append((code, desc))
        self._logger.errors.append(desc)
        return False  # nothing here is so bad that TensorRT should not go on to its own end


class Progress(trt.IProgressMonitor):  # type: ignore[misc]
    """A bar for each phase of the build that is not part of another."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self._bars: dict[str, Any] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if not parent_phase:
            self._bars[phase_name] = tqdm(total=num_steps, desc=f"build: {phase_name}", leave=False,
                                          disable=None)

    def step_complete(self, phase_name: str, step: int) -> bool:
        if phase_name in self._bars:
            self._bars[phase_name].update(1)
        return True  # go on

    def phase_finish(self, phase_name: str) -> None:
        if phase_name in self._bars:
            self._bars.pop(phase_name).close()
