"""The report's figures, which can be read without colours: lines have markers and dashes, bars are hatched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tpllm.report.model import Record, expected, is_crowded, measured_parts, work_of
from tpllm.report.tables import Row, can_model

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))
GREY = "#777777"
LINEAR = 8  # an axis whose values differ by less than this factor begins at 0
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "tpllm", "font.size": 9, "axes.grid": True, "grid.color": "#dddddd",
    "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 5, "legend.frameon": False,
    "hatch.linewidth": 0.6}


def style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % 7], "marker": MARKERS[number % 7], "linestyle": DASHES[number % 7]}


def save(figure: Figure, path: Path) -> None:
    """As PNG and as SVG, whose bytes depend on nothing but the figure."""
    figure.savefig(path.with_suffix(".png"), dpi=100, pil_kwargs={"optimize": True})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def panels(count: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.2 + 3.7 * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, whose lines are the same."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * len(figure.axes) - 1))


def powers(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic x axis that names the values there are, and nothing between."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def decimals(axes: Axes, *names: str) -> None:
    """Axes "x" or "y" from 0 on or, where their values span much, logarithmic with plain numbers."""
    for name in names:
        low, high = sorted(getattr(axes.dataLim, f"interval{name}"))
        if high < LINEAR * low:
            axes.set(**{f"{name}lim": (0, 1.08 * high)})
            continue
        axes.set(**{f"{name}scale": "log"})
        axis: Axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def lines(axes: Axes, rows: Sequence[Row], by: str, x: str, y: str, label: Callable[[Any], str]) -> None:
    """One line of (x, y) for each value of `by`, in the order of tp and batch sizes."""
    ordered = sorted(rows, key=lambda row: (row["tp_size"], row["batch_size"]))
    for number, value in enumerate(sorted({row[by] for row in rows})):
        found = [(row[x], row[y]) for row in ordered if row[by] == value]
        axes.plot(*zip(*found, strict=True), label=label(value), **style(number))


def batch_label(batch: int) -> str:
    return f"batch {batch}"


def tp_label(tp: int) -> str:
    return f"tp {tp}"


def strong_scaling(rows: Sequence[Row]) -> Figure:
    figure, (rate, speedup, efficiency) = panels(3)
    rows = [row | {"efficiency": 100 * row["efficiency"]} for row in rows]
    sizes = sorted({row["tp_size"] for row in rows})
    for axes, name, label in ((rate, "tokens_per_s", "output tokens/s"), (speedup, "speedup", "speed-up"),
                              (efficiency, "efficiency", "parallel efficiency (%)")):
        lines(axes, rows, "batch_size", "tp_size", name, batch_label)
        axes.set(xlabel="tensor-parallel ranks (tp)", ylabel=label)
        powers(axes, sizes)
    decimals(rate, "y")
    base = min(row["baseline_tp_size"] for row in rows)
    speedup.plot(sizes, [tp / base for tp in sizes], color=GREY, linewidth=0.9, label="ideal")
    efficiency.plot(sizes, [100] * len(sizes), color=GREY, linewidth=0.9)
    efficiency.set_ylim(0, 1.08 * efficiency.dataLim.y1)
    speedup.set_yscale("log", base=2)  # where the ideal is a straight line
    speedup.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend_below(figure, speedup)
    return figure


def latency(rows: Sequence[Row]) -> Figure:
    figure, (token, first) = panels(2)
    for axes, name, label in ((token, "ms_per_token", "time per output token (ms)"),
                              (first, "ttft_ms", "time to first token (ms)")):
        lines(axes, rows, "tp_size", "batch_size", name, tp_label)
        axes.set(xlabel="batch size (sequences)", ylabel=label)
        powers(axes, (row["batch_size"] for row in rows))
        decimals(axes, "y")
    legend_below(figure, token)
    return figure


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both: less x, more y; by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def pareto(rows: Sequence[Row]) -> Figure:
    figure, both = panels(2)
    for axes, name, label in zip(both, ("tokens_per_s", "tokens_per_s_per_rank"),
                                 ("output tokens/s", "output tokens/s per rank"), strict=True):
        lines(axes, rows, "tp_size", "ms_per_token", name, tp_label)
        front = pareto_front((row["ms_per_token"], row[name]) for row in rows)
        axes.plot(*zip(*front, strict=True), color=GREY, linewidth=5, alpha=0.35, zorder=1, label="Pareto front",
                  solid_capstyle="round", marker="o", markersize=9, markeredgewidth=0)
        axes.set(xlabel="time per output token (ms)", ylabel=label)
        decimals(axes, "x", "y")
    legend_below(figure, both[0])
    return figure


PARTS = (("weights, GEMMs (derived)", COLOURS[2], "//"), ("cache, attention (derived)", COLOURS[6], "--"),
         ("all-reduce (measured)", COLOURS[1], "xx"), ("other (the rest)", "#eeeeee", ""))


def ends(values: Iterable[int]) -> list[int]:
    """The smallest and the largest."""
    found = sorted(set(values))
    return found[:1] + found[1:][-1:]


def time_per_token(records: Sequence[Record]) -> Figure:
    batches = ends(record["batch_size"] for record in records)
    figure, panes = panels(len(batches))
    for axes, batch in zip(panes, batches, strict=True):
        found = sorted((r for r in records if r["batch_size"] == batch), key=lambda r: int(r["tp_size"]))
        base = [0.0] * len(found)
        times = [(parts.weights, parts.cache, parts.all_reduce, rest) for parts, rest in map(measured_parts, found)]
        for (label, colour, hatch), seconds in zip(PARTS, zip(*times, strict=True), strict=True):
            heights = [s * 1e3 for s in seconds]
            axes.bar([str(r["tp_size"]) for r in found], heights, 0.6, base, label=label, color=colour, hatch=hatch,
                     edgecolor="black", linewidth=0.6)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        axes.set(xlabel="tensor-parallel ranks (tp)", ylabel="time per output token (ms)", title=batch_label(batch))
        axes.grid(visible=False, axis="x")
    legend_below(figure, panes[0])
    return figure


def weak_scaling(rows: Sequence[Row]) -> Figure | None:
    """None where no batch sizes grew with the ranks."""
    rows = [row | {"each": row["batch_size"] / row["tp_size"], "weak": 100 * row["weak_efficiency"]} for row in rows
            if row.get("weak_efficiency")]
    least = min((row["tp_size"] for row in rows), default=1)
    rows = [row for row in rows if row["weak_baseline_tp_size"] == least
            and sum(other["each"] == row["each"] for other in rows) > 1]
    if not rows:
        return None
    figure, (axes,) = panels(1, 3.6)
    lines(axes, rows, "each", "tp_size", "weak", lambda each: f"batch {each:g} a rank")
    axes.axhline(100, color=GREY, linewidth=0.9)
    axes.set(xlabel="tensor-parallel ranks (tp)", ylabel="weak-scaling efficiency (%)",
             ylim=(0, 1.08 * max(100, *(row["weak"] for row in rows))))
    powers(axes, (row["tp_size"] for row in rows))
    legend_below(figure, axes)
    return figure


def roofline(records: Sequence[Record], prefills: Sequence[Record]) -> Figure:
    figure, (axes,) = panels(1, 4.2)
    figure.set_size_inches(6.2, 4.2)
    sizes = sorted({record["tp_size"] for record in records})
    unit, prefix = (1e12, "T") if max(record["peak_tflops"] for record in records) > 10 else (1e9, "G")
    points = []
    for number, tp in enumerate(sizes):
        look, mine = style(number), [record for record in records if record["tp_size"] == tp]
        done = [(work_of(r), r["ms_per_token"] / 1e3) for r in mine]
        done += [(work_of(r), r["seconds"]) for r in prefills if r["tp_size"] == tp]
        found = sorted((work.flops / work.bytes, work.flops / seconds / unit) for work, seconds in done)
        axes.plot(*zip(*found, strict=True), label=tp_label(tp), **look | {"linestyle": "none"})
        points += [(x, tp) for x, _ in found]
    low, high = min(points)[0] / 2, max(points)[0] * 2
    for number, tp in enumerate(sizes):
        roof = max((r for r in records if r["tp_size"] == tp), key=lambda r: float(r["bandwidth_gb_s"]))
        bandwidth, peak = roof["bandwidth_gb_s"] * 1e9 / unit, roof["peak_tflops"] * 1e12 / unit
        corners = sorted({low, min(max(peak / bandwidth, low), high), high})
        axes.plot(corners, [min(peak, bandwidth * x) for x in corners], label=f"roof of a rank at tp {tp}",
                  linewidth=1, **style(number) | {"marker": ""})
    axes.set(xlabel="arithmetic intensity (FLOP/byte)", ylabel=f"{prefix}FLOP/s of a rank")
    decimals(axes, "x", "y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def model_and_measured(records: Sequence[Record], predicted: Sequence[Row]) -> Figure:
    batches = ends(record["batch_size"] for record in records)
    figure, panes = panels(len(batches), 3.7)
    for axes, batch in zip(panes, batches, strict=True):
        mine = sorted((r for r in records if r["batch_size"] == batch), key=lambda r: int(r["tp_size"]))
        tps = [r["tp_size"] for r in mine]
        axes.plot(tps, [r["ms_per_token"] for r in mine], label="measured", **style(0))
        axes.plot(tps, [expected(r).total * 1e3 for r in mine], label="expected by the model", **style(1))
        rows = [row for row in predicted if row["batch_size"] == batch and not row["note"]]
        for number, hosts in enumerate(sorted({row["hosts"] for row in rows}), 2):
            found = [row for row in rows if row["hosts"] == hosts]
            where = "1 host" if hosts == 1 else f"{hosts} hosts"
            for field, fill, words in (("with_rest_ms", "full", "model + the rest"), ("expected_ms", "none", "model")):
                axes.plot([row["tp_size"] for row in found], [row[field] for row in found],
                          label=f"prediction, {where}: {words}", fillstyle=fill, **style(number))
        axes.set(xlabel="tensor-parallel ranks (tp)", ylabel="time per output token (ms)", title=batch_label(batch))
        powers(axes, [*tps, *(row["tp_size"] for row in rows)])
        decimals(axes, "y")
    handles, labels = panes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure


def draw_all(rows: Sequence[Row], records: Sequence[Record], predicted: Sequence[Row], directory: Path,
             prefix: str) -> list[str]:
    """Save a group's figures; returns their names. Rows and records are of decode, of one pair of lengths."""
    explained = [record for record in records if can_model(record)]
    calm = [record for record in explained if not is_crowded(record)] or explained
    prefills = [record for record in records if record["kind"] == "prefill" and "sizes" in record]
    decode = [row for row in rows if row["kind"] == "decode"]
    made: dict[str, Callable[[], Figure | None]] = {}
    if decode:
        made |= {"strong-scaling": lambda: strong_scaling(decode), "latency": lambda: latency(decode),
                 "pareto": lambda: pareto(decode), "weak-scaling": lambda: weak_scaling(decode)}
    if explained:
        made |= {"time-per-token": lambda: time_per_token(calm),
                 "roofline": lambda: roofline(explained, prefills),
                 "model": lambda: model_and_measured(explained, predicted)}
    names = []
    with matplotlib.rc_context(STYLE):
        for name, make in made.items():
            if (figure := make()) is not None:
                save(figure, directory / f"{prefix}{name}")
                names.append(name)
    return names
