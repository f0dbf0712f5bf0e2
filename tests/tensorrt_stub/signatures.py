"""Checks of calls against the signatures that the genuine bindings carry in their docstrings."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import tensorrt_bindings as trt

PREFIX = "tensorrt_bindings.tensorrt."


@dataclass(frozen=True)
class Parameter:
    name: str
    annotation: str
    optional: bool


def split_top(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[(<{") - (char in "])>}")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [part.strip() for part in [*parts, current] if part.strip()]


@cache
def overloads(owner: str, method: str) -> list[list[Parameter]]:
    """Each overload's parameters without self; empty when there is no such method."""
    doc = getattr(getattr(trt, owner), method).__doc__ or ""
    found = []
    for arguments in re.findall(rf"^(?:\d+\. )?{method}\((.*)\) -> ", doc, re.MULTILINE):
        parameters = []
        for part in split_top(arguments)[1:]:
            name, annotation = part.split(":", 1)
            parameters.append(Parameter(name.strip(), annotation.split(" = ")[0].strip(), " = " in annotation))
        found.append(parameters)
    assert found, f"{owner}.{method} has no signature that can be read: {doc[:200]!r}"
    return found


def accepts(annotation: str, value: Any) -> bool:
    """Whether pybind would convert the value to the parameter's type."""
    name = annotation.removeprefix(PREFIX).split("::")[-1]
    if name == "object":
        return True
    if name in ("str", "bool", "tuple", "list"):
        return isinstance(value, {"str": str, "bool": bool, "tuple": tuple, "list": list}[name])
    if name == "typing.SupportsInt":
        return not isinstance(value, bool | float) and hasattr(value, "__index__")
    if name == "typing_extensions.Buffer":
        memoryview(value)
        return True
    if name == "typing_extensions.CapsuleType":
        return type(value).__name__ == "PyCapsule"
    if name.startswith("collections.abc.Sequence["):
        inner = name[name.index("[") + 1:-1]
        return isinstance(value, list | tuple) and all(accepts(inner, item) for item in value)
    genuine = getattr(trt, name)  # a type that does not exist is a hole in this function
    if genuine in (trt.Dims, trt.Permutation) and isinstance(value, list | tuple):
        genuine([operator.index(n) for n in value])  # the implicit conversion
        return True
    stands_for = getattr(type(value), "stands_for", None)
    return isinstance(value, genuine) or (stands_for is not None and issubclass(getattr(trt, stands_for(value)),
                                                                                genuine))


def bind(owner: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the genuine parameter names; a TypeError when no overload takes them."""
    for parameters in overloads(owner, method):
        names = [p.name for p in parameters]
        if len(args) > len(names) or not kwargs.keys() <= set(names[len(args):]):
            continue
        values = dict(zip(names, args, strict=False)) | kwargs
        if all(p.optional if p.name not in values else accepts(p.annotation, values[p.name]) for p in parameters):
            return values
    raise TypeError(f"{owner}.{method}() takes {overloads(owner, method)}; called with {args} {kwargs}")


def check_property(owner: str, name: str, value: Any) -> None:
    """An AttributeError or TypeError, as setting it on the genuine object would give."""
    found = getattr(getattr(trt, owner), name, None)
    if not isinstance(found, property) or found.fset is None:
        raise AttributeError(f"{owner} has no property {name!r} that can be set")
    match = re.search(r"arg1: (.*)\) -> ", found.fset.__doc__ or "")
    assert match, f"{owner}.{name} has no signature that can be read"
    if not accepts(match[1], value):
        raise TypeError(f"{owner}.{name} takes {match[1]}, not {value!r}")


class Recorded:
    """Stands for a genuine object: has no method or property that it lacks, and takes what it takes.

    Subclasses write methods in the genuine parameter names; a property's value is kept in `_values`.
    """

    _owner = ""

    def __init_subclass__(cls, owner: str = "") -> None:
        cls._owner = owner
        for name, function in list(vars(cls).items()):
            if callable(function) and not name.startswith("_") and name != "stands_for":
                setattr(cls, name, checked(name, function))

    def __init__(self, owner: str = "") -> None:
        self.__dict__["_values"] = {}
        if owner:
            self.__dict__["_owner"] = owner

    def stands_for(self) -> str:
        return self._owner

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            self.__dict__[name] = value
            return
        check_property(self._owner, name, value)
        self._values[name] = value
        self._changed(name)

    def _changed(self, name: str) -> None:
        """A property was set."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if not hasattr(getattr(trt, self._owner), name):
            raise AttributeError(f"{self._owner} has no attribute {name!r}")
        if name not in self._values:
            raise NotImplementedError(f"the recorder does not know {self._owner}.{name}")
        return self._values[name]


def checked(name: str, function: Any) -> Any:
    def call(self: Recorded, *args: Any, **kwargs: Any) -> Any:
        return function(self, **bind(self._owner, name, args, kwargs))

    return call
