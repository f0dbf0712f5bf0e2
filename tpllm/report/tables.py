"""Records → rows of every point with all that is derived from them; the same rows make figures, tables and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tpllm.report.model import Record, expected, predictions

Row = dict[str, Any]
GROUP = ("model", "dtype", "quant_algo", "backend", "device")
CASE = ("kind", *GROUP, "tp_size", "hosts", "batch_size", "input_len", "output_len", "num_requests", "concurrency",
        "request_rate")
# By how much the two best logits may differ for another order of summing to exchange them.
TIE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.15}
MODELLED = ("sizes", "peak_tflops", "bandwidth_gb_s", "all_reduce", "topology")  # what the model of the time needs
COPIED = ("kind", "tp_size", "hosts", "batch_size", "input_len", "output_len", "num_requests", "concurrency",
          "request_rate", "tokens_per_s", "ms_per_token", "ms_per_token_p50", "ms_per_token_p90", "ms_per_token_p99",
          "ttft_ms", "ttft_ms_p50", "ttft_ms_p90", "ttft_ms_p99", "seconds", "bandwidth_share", "bandwidth_gb_s",
          "peak_tflops", "joules_per_token")
COLUMNS = ("source", *GROUP, *COPIED, "spread_low", "spread_high", "tokens_per_s_per_rank", "baseline_tp_size",
           "speedup", "efficiency", "weak_baseline_tp_size", "weak_efficiency", "all_reduce_us", "all_reduce_share",
           "peak_memory_gb", "expected_ms", "measured_over_expected", "with_rest_ms", "agreement", "note")


def case_of(record: Record) -> tuple[Any, ...]:
    """What was measured, but for its result."""
    return tuple(record.get(name) for name in CASE)


def fits(record: Record, case: Record) -> bool:
    """Whether a record is one of what `case` describes, as far as it does."""
    return all(record.get(name) == value for name, value in case.items())


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each case."""
    return list({case_of(record): record for record in records}.values())


def groups(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """The measured records by model, dtype and so on: what can be compared over tp sizes."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    general = []
    for record in latest(record for record in records if record["kind"] != "error"):
        if "device" in record:
            found.setdefault(tuple(record.get(name) for name in GROUP), []).append(record)
        else:  # a conversion, whose dtype and device only later records say
            general.append(record)
    for key, group in found.items():
        group[:0] = [record for record in general if record["model"] == key[0]]
    return found


def rows_of(group: Sequence[Record]) -> list[Row]:
    """One a point of a group, by kind, lengths, batch size and tp size."""
    kinds = ("decode", "prefill", "throughput", "mixed", "build", "load", "convert")
    ordered = sorted((record for record in group if record["kind"] in kinds), key=lambda r: (
        kinds.index(r["kind"]), r.get("input_len") or 0, r.get("output_len") or 0, r.get("batch_size") or 0,
        r.get("request_rate") or 0, r["tp_size"]))
    agreed = agreements(group)
    return [basics(record) | scaling(record, ordered) | modelled(record) | {"agreement": agreed.get(record["tp_size"])}
            for record in ordered]


def basics(record: Record) -> Row:
    """What a record says itself."""
    low, high = record.get("spread") or (None, None)
    reduce = record.get("all_reduce") or {}
    rate = record.get("tokens_per_s")
    return {"source": "measured", **{name: record.get(name) for name in (*GROUP, *COPIED)},
            "spread_low": low, "spread_high": high, "all_reduce_us": reduce.get("us"),
            "all_reduce_share": reduce.get("share"), "tokens_per_s_per_rank": rate and rate / record["tp_size"],
            "peak_memory_gb": (record.get("peak_memory_bytes") or 0) / 1e9 or None}


def scaling(record: Record, group: Sequence[Record]) -> Row:
    """Against the fewest ranks that did the same (strong), or as much for each rank (weak: a step's time)."""
    if "tokens_per_s" not in record:
        return {}
    tp, rate = record["tp_size"], record["tokens_per_s"]

    def same(other: Record, *but: str) -> bool:
        return all(other.get(n) == record.get(n) for n in CASE if n not in ("tp_size", "hosts", *but))

    base = min((other for other in group if same(other)), key=lambda other: int(other["tp_size"]))
    speedup = rate / base["tokens_per_s"]
    row = {"baseline_tp_size": base["tp_size"], "speedup": speedup, "efficiency": speedup * base["tp_size"] / tp}
    share = [other for other in group if record["kind"] == "decode" and same(other, "batch_size")
             and other["batch_size"] * tp == record["batch_size"] * other["tp_size"]]
    if share:
        weak = min(share, key=lambda other: int(other["tp_size"]))
        row |= {"weak_baseline_tp_size": weak["tp_size"],
                "weak_efficiency": weak["ms_per_token"] / record["ms_per_token"]}
    return row


def can_model(record: Record) -> bool:
    """Records of bench's earlier versions lack what the model needs."""
    return record["kind"] == "decode" and all(name in record for name in MODELLED)


def modelled(record: Record) -> Row:
    """What the model of the time says of a decode record."""
    if not can_model(record):
        return {}
    total = expected(record).total * 1e3
    return {"expected_ms": total, "measured_over_expected": record["ms_per_token"] / total}


def predicted_rows(group: Sequence[Record]) -> list[Row]:
    """What the model says of ranks that were not measured, for each batch size and lengths."""
    cases: dict[tuple[int, int, int], list[Record]] = {}
    for record in group:
        if can_model(record):
            lengths = (record["input_len"], record["output_len"], record["batch_size"])
            cases.setdefault(lengths, []).append(record)
    rows = []
    for case in sorted(cases):
        for p in predictions(cases[case]):
            row = basics(p.record)
            row = {name: row[name] for name in (*GROUP, "kind", "batch_size", "input_len", "output_len")}
            row |= {"source": "prediction", "tp_size": p.tp_size, "hosts": p.hosts, "note": p.problem}
            if not p.problem:
                row |= {"expected_ms": p.model * 1e3, "with_rest_ms": p.with_rest * 1e3,
                        "tokens_per_s": p.record["batch_size"] / p.with_rest}
            rows.append(row)
    return rows


def agreements(group: Sequence[Record]) -> dict[int, str]:
    """By tp size, whether greedy answers are those of the smallest one, in words."""
    found: dict[int, str] = {}
    tokens = sorted((record for record in group if record["kind"] == "tokens"), key=lambda r: int(r["tp_size"]))
    for record in tokens:
        cases = ("input_len", "output_len", "batch_size")
        base = next(other for other in tokens if all(other[name] == record[name] for name in cases))
        if base is record:
            found[record["tp_size"]] = "baseline"
        else:
            found[record["tp_size"]] = compare_tokens(base, record)
    return found


def compare_tokens(base: Record, other: Record) -> str:
    """The first token at which answers part, of the worst one: an error where the baseline's two best logits are
    further apart than rounding explains."""
    tie, parted = TIE[base["dtype"]], []
    for number, (mine, theirs) in enumerate(zip(base["token_ids"], other["token_ids"], strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        if place is not None:
            parted.append((base["logit_gaps"][number][place], number, place))
    if not parted:
        return f"same: {len(base['token_ids'])} x {base['output_len']} tokens"
    gap, number, place = max(parted)
    return (f"{'ERROR' if gap > tie else 'tie'}: {len(parted)} of {len(base['token_ids'])} answers part, prompt "
            f"{number} at token {place}, logit gap {gap:.2g}")


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
                         for row in rows)


def against(records: Iterable[Record], others: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Cases that both have, with speeds: (this one's record, the other's)."""
    theirs = {case_of(record): record for record in others if "tokens_per_s" in record}
    return [(record, theirs[case_of(record)]) for record in latest(records)
            if "tokens_per_s" in record and case_of(record) in theirs]
