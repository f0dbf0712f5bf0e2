"""The report itself: `report.md`, `report.csv` and, with matplotlib, the figures, from records alone."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tpllm.report.model import Record, is_crowded, is_disturbed
from tpllm.report.tables import GROUP, TIE, Row, against, fits, groups, predicted_rows, rows_of, write_csv
from tpllm.settings import setting

NO_FIGURES = "figures need matplotlib: pip install 'tpllm[report]', then tpllm scale --report-only"
CAPTIONS = {
    "strong-scaling": "Strong scaling: decode speed, speed-up and parallel efficiency of the same work on more ranks, "
                      "against {base}. Medians of repeats.",
    "latency": "Latency against batch size: time per output token and time to the first token (of the last sequence to "
               "get one).",
    "pareto": "Throughput against latency: along each line the batch grows. The grey line joins the points that no "
              "other beats in both.",
    "weak-scaling": "Weak scaling: the batch grows with the ranks. 100 % means that a step takes as long as on {base}.",
    "time-per-token": "Where a token's time goes, smallest and largest batch. Measured: the whole, and all-reduces "
                      "(their number times the time of one, measured alone in the same run). Derived: weights and "
                      "cache, from bytes over the bandwidth and operations over the rate that were measured in the "
                      "same run, cut where that is more than the whole. Other: what is left. Points whose ranks took "
                      "turns are left out.",
    "roofline": "Roofline of one rank: markers are decode steps and prefills (operations and bytes derived from the "
                "model's sizes, time measured), lines what the machine gave to a plain read and to a matrix product "
                "while all ranks did the same.",
    "model": "Time per output token: measured, expected by the model, and **predicted** for ranks that were not "
             "measured (see Predictions).",
}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Markdown; what there is not shows as a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join("–" if cell in (None, "") else str(cell) for cell in line) + " |"  # noqa: RUF001
            for line in lines] + [""]


def number(value: float | None, digits: int = 3) -> str | None:
    """To so many significant digits, without an exponent."""
    if value is None:
        return None
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def spread(row: Row) -> str | None:
    return number(row["tokens_per_s"], 4) and (
        f"{number(row['tokens_per_s'], 4)} ({number(row['spread_low'], 4)} to {number(row['spread_high'], 4)})"
        if row["spread_low"] is not None else number(row["tokens_per_s"], 4))


def tp_of(row: Row) -> str:
    return f"{row['tp_size']}" if row["hosts"] in (None, 1) else f"{row['tp_size']} on {row['hosts']} hosts"


def write_report(directory: Path, records: Sequence[Record], other: Path | None = None,
                 others: Sequence[Record] = ()) -> list[str]:
    """Write the report of `records` into `directory`, with a comparison against `others` of another one.

    Returns notes for the console.
    """
    found, everything, text = groups(records), [], []
    for key, group in found.items():
        prefix = "" if len(found) == 1 else "-".join(str(part).replace(" ", "_").replace("/", "_")
                                                     for part in key[:4] if part) + "-"
        rows, predicted = rows_of(group), predicted_rows(group)
        everything += [*rows, *predicted]
        text += section(group, rows, predicted, figures(group, rows, predicted, directory, prefix), prefix)
    text += failures(records)
    if other is not None:
        text += comparison(against(records, others), other)
    partial = directory / "report.md.partial"
    partial.write_text("\n".join(text), encoding="utf-8")
    write_csv(directory / "report.csv", everything)
    partial.replace(directory / "report.md")
    return [] if have_matplotlib() else [NO_FIGURES]


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def main_lengths(rows: Sequence[Row]) -> tuple[int, int] | None:
    """The pair of lengths that most decode rows have; figures are of those."""
    counts = Counter((row["input_len"], row["output_len"]) for row in rows if row["kind"] == "decode")
    return counts.most_common(1)[0][0] if counts else None


def figures(group: Sequence[Record], rows: Sequence[Row], predicted: Sequence[Row], directory: Path,
            prefix: str) -> list[str]:
    if not have_matplotlib():
        return []
    from tpllm.report.plots import draw_all

    def shown(data: Iterable[Record]) -> list[Record]:
        return [one for one in data if one["kind"] == "prefill" or (
            one["kind"] == "decode" and (one["input_len"], one["output_len"]) == main_lengths(rows))]

    return draw_all(shown(rows), shown(group), shown(predicted), directory, prefix)


def section(group: Sequence[Record], rows: Sequence[Row], predicted: Sequence[Row], drawn: Sequence[str],
            prefix: str) -> list[str]:
    """A group's part of the page."""
    last = group[-1]
    about = dict(zip(GROUP, (last.get(name) for name in GROUP), strict=True))
    decode = [row for row in rows if row["kind"] == "decode"]
    bases = sorted({row["baseline_tp_size"] for row in decode})
    base = " or ".join(f"tp {tp}" for tp in bases) or "–"  # noqa: RUF001
    smallest = bases != [1] and bool(bases)
    lengths = main_lengths(rows)
    commits = ", ".join(dict.fromkeys(str(record.get("commit")) for record in group))
    weights = "random weights" if last.get("weights") == "random" else "weights of a checkpoint"
    lines = [f"# {about['model']}, {about['dtype']}{', ' + about['quant_algo'] if about['quant_algo'] else ''}, "
             f"{about['backend']}", "",
             f"{about['device']}; {weights}; "
             + ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items())
             + f"; commit {commits}; {min(r['date'] for r in group)} to {max(r['date'] for r in group)}.",
             f"The baseline is {base}{', the smallest that was measured' if smallest else ''}."]
    lines += [f"Figures are of {lengths[0]} tokens in, {lengths[1]} out." if lengths else ""]
    if crowded := sorted({r["tp_size"] for r in group if "cores_per_host" in r and is_crowded(r)}):
        lines += [f"**At tp {', '.join(map(str, crowded))} there were more threads than cores, so that ranks took "
                  "turns: these points say little of scaling, and predictions leave them out.**"]
    largest = max(group, key=lambda r: int(r["tp_size"]))
    if links := largest.get("topology"):
        sm = (largest.get("clocks") or {}).get("sm_mhz") or ["not told"]
        lines += [f"At tp {largest['tp_size']} each GPU reached {min(links['peers'])} others' memory, with NVLinks: "
                  f"{links['nvlinks'][0] or 'not told'}; SM clocks in MHz: {', '.join(map(str, sm))}."]
    if disturbed := sorted({r["tp_size"] for r in group if "cores_per_host" in r and is_disturbed(r)}):
        lines += [f"**At tp {', '.join(map(str, disturbed))} processes waited for cores that others used: measure "
                  "again on an idle machine.**"]
    lines += ["", *decode_tables(decode)]
    for name in drawn:
        lines += [f"![{name}]({prefix}{name}.png)", "", CAPTIONS[name].format(base=base), ""]
    return [*lines, *other_tables(rows, str(about["dtype"])), *prediction_table(predicted)]


def decode_tables(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    return ["## Decode", "", *table(
        ("tp", "batch", "in / out", "tokens/s (spread)", "speed-up", "efficiency", "weak efficiency",
         "ms/token p50 / p90 / p99", "first token, ms", "J/token", "tokens against the baseline"),
        [(tp_of(r), r["batch_size"], f"{r['input_len']} / {r['output_len']}", spread(r), number(r["speedup"]),
          percent(r["efficiency"]),
          percent(r["weak_efficiency"]) if r["weak_baseline_tp_size"] != r["tp_size"] else None,
          " / ".join(number(r[f"ms_per_token_p{p}"]) or "?" for p in (50, 90, 99)), number(r["ttft_ms"]),
          number(r["joules_per_token"]), (r["agreement"] or "").partition(":")[0]) for r in rows]),
        "Measured and expected: the model of a step is bytes over bandwidth (or operations over their rate, if that is "
        "longer) plus all-reduces, all as measured in the same run.", "", *table(
        ("tp", "batch", "in / out", "ms/token", "expected, ms", "measured / expected", "bandwidth share",
         "GB/s of a rank", "all-reduce, us", "share of time", "peak memory of a rank, GB"),
        [(tp_of(r), r["batch_size"], f"{r['input_len']} / {r['output_len']}", number(r["ms_per_token"]),
          number(r.get("expected_ms")), number(r.get("measured_over_expected")), percent(r["bandwidth_share"]),
          number(r["bandwidth_gb_s"]), number(r["all_reduce_us"]), percent(r["all_reduce_share"]),
          number(r["peak_memory_gb"])) for r in rows])]


def other_tables(rows: Sequence[Row], dtype: str) -> list[str]:
    lines = []
    if agreed := sorted({(r["tp_size"], r["agreement"]) for r in rows if r["agreement"]}):
        lines += ["## Greedy tokens", "", *table(("tp", "against the smallest tp"), agreed),
                  f"Prompts and tokens count from 0. For {dtype} a difference is a tie where the baseline's two best "
                  f"logits are up to {TIE[dtype]:g} apart.", ""]
    if found := [r for r in rows if r["kind"] == "prefill"]:
        lines += ["## Prefill", "", *table(
            ("tp", "tokens", "tokens/s (spread)", "ms", "speed-up", "efficiency"),
            [(tp_of(r), r["input_len"], spread(r), number(r["ttft_ms"]), number(r["speedup"]),
              percent(r["efficiency"])) for r in found])]
    if found := [r for r in rows if r["kind"] in ("throughput", "mixed")]:
        lines += ["## Requests", "", *table(
            ("tp", "requests", "lengths in / out", "at a time", "asked, requests/s", "output tokens/s", "speed-up",
             "efficiency", "first token p50 / p90 / p99, ms", "ms/token p50 / p90 / p99", "J/token"),
            [(tp_of(r), r["num_requests"],
              f"{'up to ' if r['kind'] == 'mixed' else ''}{r['input_len']} / {r['output_len']}", r["concurrency"],
              r["request_rate"] or "all at once", number(r["tokens_per_s"], 4), number(r["speedup"]),
              percent(r["efficiency"]),
              *(" / ".join(number(r[f"{name}_p{p}"]) or "?" for p in (50, 90, 99))
                for name in ("ttft_ms", "ms_per_token")), number(r["joules_per_token"])) for r in found])]
    if found := [r for r in rows if r["kind"] in ("build", "load", "convert")]:
        lines += ["## Convert, build, load", "", *table(
            ("tp", "what", "s"), [(tp_of(r), r["kind"], number(r["seconds"])) for r in found])]
    return lines


def prediction_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    latency = setting("TPLLM_ALLREDUCE_US")
    none = [f"- None for tp {tp}: {why}." for tp, why in sorted({(r["tp_size"], r["note"]) for r in rows if r["note"]})]
    if all(row["note"] for row in rows):
        return ["## Predictions", "", *none, ""]
    return ["## Predictions", "",
            "**Not measured.** Each rank has a device or core of its own, with the ceilings of the measured point with "
            "the most ranks that had theirs. All-reduces: a straight line over log2 of the ranks through the measured "
            f"ones, never below the longest; between hosts {latency} us more (TPLLM_ALLREDUCE_US, an assumption). The "
            "second time adds what that measured step took beyond the model.", "",
            *none, "",
            *table(("tp", "hosts", "batch", "in / out", "model alone, ms/token", "with the rest, ms/token",
                    "tokens/s with the rest"),
                   [(r["tp_size"], r["hosts"], r["batch_size"], f"{r['input_len']} / {r['output_len']}",
                     number(r["expected_ms"]), number(r["with_rest_ms"]), number(r["tokens_per_s"], 4))
                    for r in rows if not r["note"]])]


def failures(records: Sequence[Record]) -> list[str]:
    """Points that failed and were not measured afterwards."""
    left: dict[str, Record] = {}
    for record in records:
        if record["kind"] == "error":
            left[str(record["case"])] = record
        else:
            left = {name: failed for name, failed in left.items() if not fits(record, failed["case"])}
    if not left:
        return []
    return ["## Failed", "", *table(
        ("what", "exit code", "why"),
        [(", ".join(f"{name} {value}" for name, value in r["case"].items() if value is not None), r["exit_code"],
          r["error"].replace("|", "\\|")) for r in left.values()])]


def comparison(pairs: Sequence[tuple[Record, Record]], other: Path) -> list[str]:
    """This report's speeds beside another's."""
    return ["## Against " + os.path.relpath(other), "", *table(
        ("kind", "model", "tp", "batch", "in / out", "tokens/s", "theirs", "ratio", "their commit"),
        [(mine["kind"], mine["model"], mine["tp_size"], mine["batch_size"],
          f"{mine['input_len']} / {mine['output_len']}", number(mine["tokens_per_s"], 4),
          number(theirs["tokens_per_s"], 4), number(mine["tokens_per_s"] / theirs["tokens_per_s"]),
          theirs.get("commit")) for mine, theirs in pairs])] if pairs else [
        "## Against " + os.path.relpath(other), "", "No case was measured in both.", ""]
