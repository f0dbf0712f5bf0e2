"""Hosts and their slots: hostfiles in every launcher's dialect, Slurm's node lists, and how ranks fill them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tpllm.errors import DataError, UsageError

EXPECTED = "expected 'NAME slots=N [max_slots=M]', 'NAME:N' or 'NAME'"
NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
MAX_HOSTS = 65536  # a node list of more is a typing error, and would fill the memory


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it has room for."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file in any dialect."""
    if not path.is_file():
        raise UsageError(f"no such --hostfile: {path}")
    try:
        return parse_hostfile(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8: {e}") from None


def parse_hostfile(text: str, place: str = "hostfile") -> list[Host]:
    """One host a line, `#` starts a comment; a wrong line is refused by its number.

    Dialects may be mixed: Open MPI's and DeepSpeed's `name slots=N`, Hydra's `name:N`. A bare name has one slot, as for
    Hydra (Open MPI would count the host's cores), and a name that comes again adds slots, as for both. The part before
    slots may be a Slurm node list: `gpu[01-04] slots=4`.
    """
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            try:
                hosts += parse_words(words)
            except ValueError as e:
                raise DataError(f"{place} line {number}: {line.strip()!r}: {e}") from None
    if not hosts:
        raise DataError(f"{place} names no host; {EXPECTED} on a line")
    return merged(hosts)


def parse_words(words: list[str]) -> list[Host]:
    """One line's words; raises a ValueError that says what is wrong."""
    if words[0].count(":") > 1:
        raise ValueError("an IPv6 address cannot be told from NAME:N; give the host's name")
    names, colon, count = words[0].rpartition(":")
    if not colon:
        names, count = words[0], "1"
    settings: dict[str, int] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        key = key.replace("-", "_")
        if key not in ("slots", "max_slots") or not equals or key in settings:
            raise ValueError(f"{word!r} is not understood; {EXPECTED}")
        settings[key] = whole(value, key)
    if colon and settings:
        raise ValueError(f"slots twice; {EXPECTED}")
    slots = settings.get("slots", whole(count, "slots"))
    if settings.get("max_slots", slots) < slots:
        raise ValueError(f"max_slots={settings['max_slots']} is less than slots={slots}")
    return [Host(name, slots) for name in expand_nodes(names)]


def parse_hosts(text: str) -> list[Host]:
    """The hosts of `--host a:4,b:4`; a bare name has one slot."""
    try:
        return merged(host for word in split_outside_brackets(text) for host in parse_words([word]))
    except ValueError as e:
        raise UsageError(f"--host {text}: {e}") from None


def whole(text: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) or int(text) < 1:
        raise ValueError(f"{what} is {text!r}; a whole number from 1 on is needed")
    return int(text)


def merged(hosts: Iterable[Host]) -> list[Host]:
    """One entry a name, slots added up, in the order of first mention."""
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return [Host(name, count) for name, count in slots.items()]


def split_outside_brackets(text: str) -> list[str]:
    """At commas, but not those in `[01,07]`."""
    return re.split(r",(?![^\[\]]*\])", text)


def expand_nodes(text: str) -> list[str]:
    """Slurm's `gpu[01-04,07],r[1-2]n[1-8],login1` as names, in Slurm's order; raises a ValueError."""
    names: list[str] = []
    for word in split_outside_brackets(text):
        if not re.fullmatch(r"([^\[\]]|\[[^\[\]]*\])*", word):
            raise ValueError(f"{word!r} has a bracket too many or too few")
        pieces = re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", word)
        parts = [[literal] if literal else expand_ranges(inside) for literal, inside in pieces]
        if len(names) + math.prod(len(part) for part in parts) > MAX_HOSTS:
            raise ValueError(f"{word!r} and what is before it are more than {MAX_HOSTS} hosts")
        names += ["".join(choice) for choice in itertools.product(*parts)]
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a host's name; {EXPECTED}")
    return names


def expand_ranges(text: str) -> list[str]:
    """`01-03,7` as 01, 02, 03, 7: a range keeps the width of its first number."""
    found: list[str] = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word, re.ASCII)
        if not match:
            raise ValueError(f"[{text}] must hold numbers and ranges, as in [01-04,07]")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise ValueError(f"the range {word} runs backwards")
        if int(last) - int(first) >= MAX_HOSTS:
            raise ValueError(f"the range {word} is more than {MAX_HOSTS} hosts")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return found


def expand_tasks(text: str) -> list[int]:
    """Slurm's tasks a node, `2(x2),1`, as [2, 2, 1]; raises a ValueError."""
    counts: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", word, re.ASCII)
        if not match:
            raise ValueError(f"{text!r} must be numbers of tasks, as in 2(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
        if len(counts) > MAX_HOSTS:
            raise ValueError(f"{text!r} is for more than {MAX_HOSTS} hosts")
    return counts


def slurm_hosts(environment: Mapping[str, str]) -> list[Host]:
    """The hosts of the Slurm allocation that this process is in, from its variables alone; none outside of one."""
    nodes = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    if not environment.get("SLURM_JOB_ID") or not nodes:
        return []
    tasks = environment.get("SLURM_TASKS_PER_NODE") or ""
    try:
        names = expand_nodes(nodes)
        counts = expand_tasks(tasks) if tasks else [1] * len(names)
    except ValueError as e:
        raise DataError(f"SLURM_JOB_NODELIST={nodes} SLURM_TASKS_PER_NODE={tasks}: {e}") from None
    # A step's counts may be of fewer nodes than its job has.
    counts += [1] * (len(names) - len(counts))
    return [Host(name, max(1, count)) for name, count in zip(names, counts, strict=False)]


def emit(hosts: Iterable[Host], dialect: str) -> str:
    """The hostfile for a launcher: "openmpi", "deepspeed" or "mpich"."""
    form = "{0.name}:{0.slots}\n" if dialect == "mpich" else "{0.name} slots={0.slots}\n"
    return "".join(form.format(host) for host in hosts)


def place(hosts: list[Host], ranks: int, nodes: int | None = None) -> list[Host]:
    """The hosts that `ranks` ranks use, with the ranks of each as slots.

    Hosts are filled in their order; with `nodes`, the ranks are spread evenly over the first `nodes` of them.
    """
    if nodes is not None:
        if nodes > len(hosts):
            raise UsageError(f"--nodes {nodes}, but there are {len(hosts)} host(s): {', '.join(h.name for h in hosts)}")
        if ranks % nodes:
            raise UsageError(f"{ranks} ranks cannot be spread evenly over --nodes {nodes}")
        hosts, share = hosts[:nodes], ranks // nodes
        if full := [h for h in hosts if h.slots < share]:
            raise UsageError(f"--nodes {nodes} puts {share} ranks on each host, but {full[0].name} has "
                             f"{full[0].slots} slot(s)")
        return [replace(host, slots=share) for host in hosts]
    if ranks > (slots := sum(host.slots for host in hosts)):
        raise UsageError(f"{ranks} ranks, but {len(hosts)} host(s) with {slots} slot(s): add hosts or slots")
    used: list[Host] = []
    for host in hosts:
        if left := ranks - sum(h.slots for h in used):
            used.append(replace(host, slots=min(host.slots, left)))
    return used
