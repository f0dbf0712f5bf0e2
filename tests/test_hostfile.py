"""Hosts: every dialect read and written, Slurm's node lists, wrong lines named by number, ranks placed on slots."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpllm.errors import DataError, UsageError
from tpllm.launch.hostfile import (
    Host,
    emit,
    expand_nodes,
    expand_tasks,
    parse_hostfile,
    parse_hosts,
    place,
    read_hostfile,
    slurm_hosts,
)

HOSTFILES = Path(__file__).parents[1] / "hostfiles"

names = st.from_regex(r"[a-z]([a-z0-9.-]{0,10}[a-z0-9])?", fullmatch=True)
hosts = st.lists(st.builds(Host, names, st.integers(1, 999_999)), min_size=1, max_size=8, unique_by=lambda h: h.name)


@given(hosts, st.sampled_from(["openmpi", "mpich", "deepspeed"]))
def test_what_is_written_is_read_back(found: list[Host], dialect: str) -> None:
    assert parse_hostfile(emit(found, dialect)) == found


@given(hosts, st.randoms(use_true_random=False))
def test_spaces_comments_and_dialects_may_be_mixed(found: list[Host], rng: random.Random) -> None:
    forms = ["{0.name} slots={0.slots}", "  {0.name}   slots={0.slots} max_slots={0.slots} # {0.name}:9",
             "{0.name}:{0.slots}", "{0.name} max-slots=999999\tslots={0.slots}", "{0.name}:{0.slots}#x"]  # fmt: skip
    lines = []
    for host in found:
        lines += rng.choice([[], ["# gpu01 slots=2"], ["", "   "]]) + [rng.choice(forms).format(host)]
    assert parse_hostfile(rng.choice(["\n", "\r\n"]).join(lines)) == found


def test_a_bare_host_has_one_slot_and_the_same_host_again_adds() -> None:
    assert parse_hostfile("a\nb:2\na\na slots=3\n") == [Host("a", 5), Host("b", 2)]


@pytest.mark.parametrize(("line", "why"), [
    ("gpu02 4", "'4' is not understood; expected 'NAME slots=N"),
    ("gpu02 slots=four", "slots is 'four'; a whole number from 1 on is needed"),
    ("gpu02 slots=0", "slots is '0'"),
    ("gpu02 slots=-1", "slots is '-1'"),
    ("gpu02 slots=", "slots is ''"),
    ("gpu02 slots", "'slots' is not understood"),
    ("gpu02 slots=2 slots=3", "'slots=3' is not understood"),
    ("gpu02 slots=2 cpus=4", "'cpus=4' is not understood"),
    ("gpu02 slots=4 max_slots=2", "max_slots=2 is less than slots=4"),
    ("gpu02:", "slots is ''"),
    ("gpu02:x", "slots is 'x'"),
    ("gpu02:4 slots=4", "slots twice"),
    ("gpu02,", "'' is not a host's name"),
    ("slots=4", "'slots=4' is not a host's name"),
    ("-gpu02 slots=4", "'-gpu02' is not a host's name"),
    ("gpu[1-2 slots=4", "bracket too many or too few"),
    ("gpu1-2] slots=4", "bracket too many or too few"),
    ("gpu[4-2] slots=4", "the range 4-2 runs backwards"),
    ("gpu[] slots=4", "must hold numbers and ranges"),
    ("gpu[a-b]", "must hold numbers and ranges"),
    ("gpu[1-99999999]", "more than 65536 hosts"),
    ("gpu[1-999][1-999]", "more than 65536 hosts"),
    ("fe80::1 slots=2", "give the host's name"),
    ("gpu٣ slots=2", "is not a host's name"),
])  # fmt: skip
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"# two hosts\ngpu01 slots=4\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"{path} line 4: {line!r}: ")) as e:
        read_hostfile(path)
    assert why in str(e.value)


@given(st.text(alphabet="ab01:=[]-,# \tslots_max", max_size=40))
def test_any_line_is_read_or_refused(line: str) -> None:
    try:
        found = parse_hostfile(line)
    except DataError as e:
        assert "line 1" in str(e) or "names no host" in str(e)
    else:
        assert found and all(host.slots >= 1 and re.fullmatch(r"[\w.-]+", host.name) for host in found)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such --hostfile"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(DataError, match="names no host"):
        read_hostfile(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_hostfile(tmp_path / "binary")


@st.composite
def brackets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One bracket of a node list: numbers and ranges of one width, with its expansion made by counting."""
    width = draw(st.integers(1, 4))
    words, found = [], []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, 10**width - 1))
        last = min(first + draw(st.integers(0, 5)), 10**width - 1)
        words.append(f"{first:0{width}d}" + (f"-{last:0{width}d}" if last > first else ""))
        found += [f"{n:0{width}d}" for n in range(first, last + 1)]
    return "[" + ",".join(words) + "]", found


@st.composite
def node_words(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One word of a node list with up to two brackets, and its expansion."""
    text = draw(st.from_regex(r"[a-z]{1,5}", fullmatch=True))
    found = [text]
    for _ in range(draw(st.integers(0, 2))):
        more, numbers = draw(brackets())
        tail = draw(st.sampled_from(["", "n", "-x"]))
        text += more + tail
        found = [head + number + tail for head in found for number in numbers]
    return text, found


@given(st.lists(node_words(), min_size=1, max_size=3))
def test_node_lists(words: list[tuple[str, list[str]]]) -> None:
    assert expand_nodes(",".join(text for text, _ in words)) == [name for _, names in words for name in names]


def test_node_lists_as_slurm_writes_them() -> None:
    assert expand_nodes("gpu[01-04,07],login1") == ["gpu01", "gpu02", "gpu03", "gpu04", "gpu07", "login1"]
    assert expand_nodes("r[1-2]n[08-10]") == ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]
    assert expand_nodes("node[8-11]") == ["node8", "node9", "node10", "node11"]  # no padding
    assert expand_nodes("node[098-101]-ib") == ["node098-ib", "node099-ib", "node100-ib", "node101-ib"]


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 4)), min_size=1, max_size=5), st.booleans())
def test_tasks_of_nodes(runs: list[tuple[int, int]], short: bool) -> None:
    text = ",".join(f"{n}(x{k})" if k > 1 or not short else str(n) for n, k in runs)
    assert expand_tasks(text) == [n for n, k in runs for _ in range(k)]


def test_the_allocation() -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[01-02],login1", "SLURM_TASKS_PER_NODE": "2(x2),1"}
    assert slurm_hosts(variables) == [Host("gpu01", 2), Host("gpu02", 2), Host("login1", 1)]
    assert slurm_hosts({**variables, "SLURM_TASKS_PER_NODE": "4"})[0] == Host("gpu01", 4)
    del variables["SLURM_TASKS_PER_NODE"]
    assert [host.slots for host in slurm_hosts(variables)] == [1, 1, 1]
    del variables["SLURM_JOB_ID"]
    assert slurm_hosts(variables) == []
    with pytest.raises(DataError, match=r"SLURM_JOB_NODELIST=gpu\[1 "):
        slurm_hosts({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1", "SLURM_TASKS_PER_NODE": "1"})
    with pytest.raises(DataError, match=r"2\(x2, must be numbers|'2\(x2' must be numbers"):
        slurm_hosts({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu1", "SLURM_TASKS_PER_NODE": "2(x2"})


def test_hosts_of_the_command_line() -> None:
    assert parse_hosts("a:4,b:4") == [Host("a", 4), Host("b", 4)]
    assert parse_hosts("gpu[01-02]:4,login1") == [Host("gpu01", 4), Host("gpu02", 4), Host("login1", 1)]
    for wrong in ("", "a:4,,b", "a:x", "a slots=4"):
        with pytest.raises(UsageError, match="--host"):
            parse_hosts(wrong)


@given(hosts, st.data())
def test_ranks_fill_hosts_in_order(found: list[Host], data: st.DataObject) -> None:
    slots = sum(host.slots for host in found)
    ranks = data.draw(st.integers(1, slots))
    placed = place(found, ranks)
    assert sum(host.slots for host in placed) == ranks
    assert [h.name for h in placed] == [h.name for h in found[:len(placed)]]
    assert all(p.slots == h.slots for p, h in zip(placed[:-1], found, strict=False)) and 1 <= placed[-1].slots
    with pytest.raises(UsageError, match=f"{slots + 1} ranks, but {len(found)} host"):
        place(found, slots + 1)


def test_ranks_spread_over_nodes() -> None:
    found = [Host("a", 4), Host("b", 4), Host("c", 1)]
    assert place(found, 4, 2) == [Host("a", 2), Host("b", 2)]
    for ranks, nodes, why in ((4, 4, "there are 3 host"), (3, 2, "cannot be spread evenly"), (6, 3, "c has 1 slot")):
        with pytest.raises(UsageError, match=why):
            place(found, ranks, nodes)


@pytest.mark.parametrize("path", sorted(HOSTFILES.iterdir()), ids=lambda p: p.name)
def test_the_examples(path: Path) -> None:
    found = read_hostfile(path)
    assert found and all(host.slots == 4 for host in found)
    dialect = "mpich" if path.name == "mpich" else "openmpi"
    if path.name != "slurm":
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
        assert emit(found, dialect).splitlines() == [line.replace(" max_slots=4", "") for line in lines]
