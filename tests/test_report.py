"""The scaling report: every column computed by hand from hand-made records, and the figures made of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from tpllm.report import page, plots
from tpllm.report.model import (
    expected,
    is_crowded,
    latency_by_ranks,
    measured_parts,
    predictions,
    step_work,
    work_of,
)
from tpllm.report.page import write_report
from tpllm.report.tables import agreements, groups, predicted_rows, rows_of
from tpllm.settings import DEFAULTS

Record = dict[str, Any]

# 2 layers of 4 * 160 * 160 + 3 * 160 * 320 = 256,000 elements and a head of 160 * 800: 640,000, in float32 2.56 MB.
# A token's keys and values: 2 layers * 2 * 16 heads * 10 elements * 4 bytes = 2,560 bytes.
SIZES = {"vocab_size": 800, "hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 16,
         "num_key_value_heads": 16, "head_size": 10, "intermediate_size": 320, "dtype": "float32"}
COMMON = {"model": "m", "weights": "w", "dtype": "float32", "quant_algo": None, "backend": "eager", "device": "CPU",
          "hosts": 1, "sizes": SIZES, "ranks_per_host": 1, "threads_per_rank": 1, "cores_per_host": 4,
          "topology": None, "peak_memory_bytes": 3_000_000_000, "versions": {"tpllm": "1", "torch": "2"},
          "commit": "c0ffee", "date": "2026-01-02T03:04:05+0000"}


def decode(tp: int, batch: int, ms: float, reduce_us: float | None = None, **more: Any) -> Record:
    """60 tokens in, 80 out: 100 in the cache in the middle. The ceilings are 1 GB/s and 1 GFLOP/s a rank."""
    rate = batch / ms * 1e3
    reduce = None if reduce_us is None else {"path": "mpi", "us": reduce_us, "share": 4 * reduce_us / 1e3 / ms}
    return COMMON | {
        "kind": "decode", "tp_size": tp, "batch_size": batch, "input_len": 60, "output_len": 80, "tokens_per_s": rate,
        "ms_per_token": ms, "ms_per_token_p50": ms, "ms_per_token_p90": 2 * ms, "ms_per_token_p99": 3 * ms,
        "ttft_ms": 10 * ms, "spread": [0.9 * rate, 1.1 * rate], "bandwidth_share": 0.5, "bandwidth_gb_s": 1.0,
        "peak_tflops": 1e-3, "all_reduce": reduce, "ranks_per_host": tp, "joules_per_token": None, "repeats": 3, **more}


def tokens(tp: int, ids: list[list[int]], gaps: list[list[float]], **more: Any) -> Record:
    return COMMON | {"kind": "tokens", "tp_size": tp, "batch_size": len(ids), "input_len": 5, "output_len": 4,
                     "token_ids": ids, "logit_gaps": gaps, **more}


IDS = [[1, 2, 3, 4], [5, 6, 7, 8]]
RECORDS = [
    decode(1, 1, 9.9),  # measured again below
    decode(1, 1, 4.0), decode(2, 1, 2.5, 10.0), decode(4, 1, 2.0, 20.0),
    decode(1, 2, 5.0), decode(2, 2, 3.2, 10.0), decode(4, 2, 2.5, 20.0),
    decode(1, 4, 8.0), decode(2, 4, 5.0, 10.0), decode(4, 4, 3.2, 20.0),
    tokens(1, IDS, [[1.0] * 4, [1.0, 1.0, 0.0004, 1.0]]), tokens(2, IDS, [[1.0] * 4] * 2),
    tokens(4, [[1, 2, 3, 4], [5, 6, 9, 9]], [[1.0] * 4] * 2),
    COMMON | {"kind": "prefill", "tp_size": 1, "batch_size": 1, "input_len": 200, "output_len": 1, "repeats": 3,
              "tokens_per_s": 1000.0, "ttft_ms": 200.0, "seconds": 0.2, "spread": [900.0, 1100.0]},
    COMMON | {"kind": "prefill", "tp_size": 2, "batch_size": 1, "input_len": 200, "output_len": 1, "repeats": 3,
              "tokens_per_s": 1500.0, "ttft_ms": 133.3, "seconds": 0.1333, "spread": [1400.0, 1600.0]},
    COMMON | {"kind": "throughput", "tp_size": 2, "batch_size": 4, "input_len": 60, "output_len": 80,
              "num_requests": 9, "concurrency": 4, "request_rate": 2.5, "tokens_per_s": 321.0, "seconds": 2.0,
              "ttft_ms": 7.0, **{f"{name}_p{p}": float(p) for name in ("ttft_ms", "ms_per_token")
                                 for p in (50, 90, 99)}},
    {"kind": "convert", "model": "m", "tp_size": 2, "backend": "eager", "seconds": 1.5, "date": "2026-01-02"},
]  # fmt: skip


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    monkeypatch.delenv("TPLLM_ALLREDUCE_US", raising=False)
    assert DEFAULTS["TPLLM_ALLREDUCE_US"] == "50"  # the predictions below are computed with it
    [found] = groups(RECORDS).values()
    return found


def row_of(group: list[Record], tp: int, batch: int, kind: str = "decode") -> Record:
    [found] = [row for row in rows_of(group) if (row["kind"], row["tp_size"], row["batch_size"]) == (kind, tp, batch)]
    return found


def test_strong_scaling_is_against_the_smallest_tp_of_the_same_case(group: list[Record]) -> None:
    row = row_of(group, 2, 1)
    assert (row["tokens_per_s"], row["baseline_tp_size"]) == (400.0, 1)
    assert (row["speedup"], row["efficiency"], row["tokens_per_s_per_rank"]) == (1.6, 0.8, 200.0)
    row = row_of(group, 4, 1)
    assert (row["speedup"], row["efficiency"], row["tokens_per_s_per_rank"]) == (2.0, 0.5, 125.0)
    assert (row["peak_memory_gb"], row["spread_low"], row["spread_high"]) == (3.0, 450.0, 550.0)
    assert row_of(group, 1, 1)["tokens_per_s"] == 250.0  # the later record of the same case
    only = [record for record in group if record["tp_size"] != 1]
    row = row_of(only, 4, 1)  # where tp 1 does not fit
    assert (row["baseline_tp_size"], row["speedup"], row["efficiency"]) == (2, 1.25, 0.625)
    prefill = row_of(group, 2, 1, "prefill")
    assert (prefill["speedup"], prefill["efficiency"]) == (1.5, 0.75)


def test_weak_scaling_compares_the_step_of_as_many_sequences_a_rank(group: list[Record]) -> None:
    row = row_of(group, 2, 2)  # beside batch 1 at tp 1: 4 ms against 3.2 ms
    assert (row["weak_baseline_tp_size"], row["weak_efficiency"]) == (1, 1.25)
    row = row_of(group, 4, 4)
    assert (row["weak_baseline_tp_size"], row["weak_efficiency"]) == (1, 1.25)
    row = row_of(group, 4, 2)  # batch 1 at tp 2; half a sequence at tp 1 there is not
    assert (row["weak_baseline_tp_size"], row["weak_efficiency"]) == (2, 1.0)


def test_the_model_is_bytes_over_bandwidth_or_operations_over_their_rate_and_all_reduces(group: list[Record]) -> None:
    work = work_of(decode(2, 1, 2.5))
    assert (work.weight_bytes, work.cache_bytes) == (1_280_000, 128_000)
    assert (work.weight_flops, work.cache_flops) == (640_000, 64_000)  # 2 * 320,000; 4 * 100 * 2 layers * 8 heads * 10
    parts = expected(decode(2, 1, 2.5, 10.0))
    assert (parts.weights, parts.cache, parts.all_reduce) == pytest.approx((1.28e-3, 0.128e-3, 0.04e-3))
    row = row_of(group, 2, 1)
    assert row["expected_ms"] == pytest.approx(1.448)
    assert row["measured_over_expected"] == pytest.approx(2.5 / 1.448)
    # Four sequences: 5.12 MFLOP take longer than 2.56 MB; 4 * 100 tokens of cache are 1.024 MB.
    assert row_of(group, 1, 4)["expected_ms"] == pytest.approx(5.12 + 1.024)
    # Two key/value heads over four ranks: one on each. 10 tokens * 2 layers * 2 * 10 elements * 4 bytes.
    assert step_work(SIZES | {"num_key_value_heads": 2}, 4, 1, 10).cache_bytes == 1600
    # A prefill reads the weights and its keys once; each of its 200 tokens attends to 100 on the average.
    prefill = work_of(next(record for record in group if record["kind"] == "prefill"))
    assert (prefill.weight_bytes, prefill.cache_bytes) == (2_560_000, 256_000)
    assert (prefill.weight_flops, prefill.cache_flops) == (200 * 1_280_000, 200 * 128_000)


def test_where_the_time_goes_adds_up_to_what_was_measured() -> None:
    parts, rest = measured_parts(decode(2, 1, 2.5, 10.0))
    assert (parts.weights, parts.cache, parts.all_reduce) == pytest.approx((1.28e-3, 0.128e-3, 0.04e-3))
    assert rest == pytest.approx(1.052e-3)
    parts, rest = measured_parts(decode(2, 1, 1.04, 10.0))  # faster than the ceilings: 1 ms for 1.408 ms of reading
    assert (parts.weights, parts.cache, rest) == pytest.approx((1.28e-3 / 1.408, 0.128e-3 / 1.408, 0.0))


def test_all_reduces_of_more_ranks_lie_on_a_line_over_the_logarithm() -> None:
    latency = latency_by_ranks([(2, 10e-6), (4, 20e-6)])
    assert [latency(n) for n in (1, 2, 8, 16)] == pytest.approx([0.0, 20e-6, 30e-6, 40e-6])
    assert latency_by_ranks([(2, 7e-6)])(16) == 7e-6
    assert latency_by_ranks([])(16) == pytest.approx(50e-6)
    assert latency_by_ranks([(2, 20e-6), (4, 10e-6)])(16) == 20e-6  # a falling line is noise


def test_predictions(group: list[Record]) -> None:
    rows = {(row["tp_size"], row["hosts"]): row for row in predicted_rows(group) if row["batch_size"] == 1}
    assert all(row["source"] == "prediction" for row in rows.values())
    # Ceilings and rest are tp 4's, whose step took 2 ms where the model says 0.64 + 0.064 + 4 * 0.02 = 0.784.
    model = {(8, 1): 0.32 + 0.032 + 4 * 0.03, (16, 1): 0.16 + 0.016 + 4 * 0.04,
             (8, 2): 0.32 + 0.032 + 4 * (0.02 + 0.05), (16, 2): 0.16 + 0.016 + 4 * (0.03 + 0.05)}
    for key, ms in model.items():
        assert rows[key]["expected_ms"] == pytest.approx(ms) and rows[key]["with_rest_ms"] == pytest.approx(ms + 1.216)
        assert rows[key]["tokens_per_s"] == pytest.approx(1e3 / (ms + 1.216))
    assert set(rows) == set(model)


def test_what_cannot_be_split_or_was_measured_is_not_predicted() -> None:
    few = decode(1, 1, 4.0) | {"sizes": SIZES | {"num_attention_heads": 12, "num_key_value_heads": 12}}
    assert {p.problem for p in predictions([few])} == {f"its 12 attention heads are not divisible by {n}"
                                                       for n in (8, 16)}
    found = predictions([decode(1, 1, 4.0), decode(8, 1, 2.0, 5.0, cores_per_host=8)])
    assert [(p.tp_size, p.hosts) for p in found] == [(16, 1), (8, 2), (16, 2)]


def test_points_whose_ranks_took_turns_are_left_out_of_predictions() -> None:
    crowded = decode(4, 1, 9.0, 5000.0, cores_per_host=2)
    assert is_crowded(crowded) and not is_crowded(decode(4, 1, 9.0)) and not is_crowded(crowded | {"topology": {}})
    p = predictions([decode(2, 1, 2.5, 10.0), crowded])[0]
    assert p.model == pytest.approx((0.32 + 0.032 + 4 * 0.01) / 1e3) and p.record["tp_size"] == 2


def test_a_report_says_where_other_work_disturbed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "have_matplotlib", lambda: False)
    write_report(tmp_path, [decode(1, 1, 2.5, cpu_pressure=5.0), decode(2, 1, 2.5, 10.0, cpu_pressure=40.0),
                            decode(4, 1, 2.5, 10.0, cpu_pressure=90.0, cores_per_host=2)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "At tp 2 processes waited" in text and "At tp 4 there were more threads" in text


def test_agreement_tells_ties_from_errors() -> None:
    assert agreements([record for record in RECORDS if record["kind"] == "tokens"]) == {
        1: "baseline", 2: "same: 2 x 4 tokens",
        4: "tie: 1 of 2 answers part, prompt 1 at token 2, logit gap 0.0004"}
    base = tokens(1, IDS, [[0.5] * 4, [1.0, 1.0, 0.0004, 1.0]])
    other = tokens(2, [[1, 9, 9, 9], [5, 6, 9, 9]], [[1.0] * 4] * 2)
    assert agreements([base, other])[2] == "ERROR: 2 of 2 answers part, prompt 0 at token 1, logit gap 0.5"
    wide = [record | {"dtype": "bfloat16"} for record in (base, tokens(2, [IDS[0], [5, 6, 9, 9]], [[1.0] * 4] * 2))]
    assert agreements(wide)[2].startswith("tie")


def test_the_pareto_front_is_what_no_other_beats() -> None:
    points = [(4.0, 100.0), (2.0, 50.0), (3.0, 40.0), (4.0, 120.0), (1.0, 10.0), (5.0, 119.0)]
    assert plots.pareto_front(points) == [(1.0, 10.0), (2.0, 50.0), (4.0, 120.0)]


def test_figures_name_what_their_axes_show_and_its_unit(group: list[Record]) -> None:
    rows = [row for row in rows_of(group) if row["kind"] == "decode"]
    records = [record for record in group if record["kind"] == "decode"]
    tp, token, batch = "tensor-parallel ranks (tp)", "time per output token (ms)", "batch size (sequences)"
    weak = plots.weak_scaling(rows)
    assert weak is not None
    labels = {
        plots.strong_scaling(rows): [(tp, "output tokens/s"), (tp, "speed-up"), (tp, "parallel efficiency (%)")],
        plots.latency(rows): [(batch, token), (batch, "time to first token (ms)")],
        plots.pareto(rows): [(token, "output tokens/s"), (token, "output tokens/s per rank")],
        weak: [(tp, "weak-scaling efficiency (%)")], plots.time_per_token(records): [(tp, token)] * 2,
        plots.roofline(records, []): [("arithmetic intensity (FLOP/byte)", "GFLOP/s of a rank")],
        plots.model_and_measured(records, predicted_rows(group)): [(tp, token)] * 2,
    }
    for figure, expected_labels in labels.items():
        assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == expected_labels
        [legend] = figure.legends
        assert all(text.get_text() for text in legend.get_texts())
    assert plots.weak_scaling([row for row in rows if row["batch_size"] == 1]) is None  # the batch does not grow


def test_figures_show_the_numbers_of_the_table(group: list[Record]) -> None:
    rows = [row for row in rows_of(group) if row["kind"] == "decode"]
    _, speedup, efficiency = plots.strong_scaling(rows).axes
    first = speedup.lines[0]
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 2, 4], [1.0, 1.6, 2.0])
    assert list(efficiency.lines[0].get_ydata()) == [100.0, 80.0, 50.0]
    bars = plots.time_per_token([record for record in group if record["kind"] == "decode"]).axes[0].patches
    heights = [bar.get_height() for bar in bars]  # three bars of each of four parts
    assert [sum(heights[tp::3]) for tp in range(3)] == pytest.approx([4.0, 2.5, 2.0])
    # Every line is told apart by its marker and its dashes, too.
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in speedup.lines}) == len(speedup.lines)


def test_a_report_of_everything(tmp_path: Path, group: list[Record]) -> None:
    error = {"kind": "error", "tp_size": 8, "case": {"kind": "load", "tp_size": 8, "model": "m"}, "exit_code": 22,
             "error": "tpllm: no | memory", "date": ""}
    mended = error | {"case": {"kind": "decode", "tp_size": 4, "batch_size": 4}, "error": "mended later"}
    other = [decode(2, 1, 5.0, 10.0, commit="0ld"), decode(2, 32, 5.0, 10.0)]
    assert write_report(tmp_path, [mended, *RECORDS, error], tmp_path / "other", other) == []
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in page.CAPTIONS:
        assert f"![{name}]({name}.png)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert "| 2 | 1 | 60 / 80 | 400 (360 to 440) | 1.6 | 80 % | – | 2.5 / 5 / 7.5 | 25 | – | same |" in text  # noqa: RUF001
    assert "| 2 | 1 | 60 / 80 | 2.5 | 1.45 | 1.73 | 50 % | 1 | 10 | 2 % | 3 |" in text
    assert "| 2 | 9 | 60 / 80 | 4 | 2.5 | 321 |" in text and "| 2 | convert | 1.5 |" in text
    assert "| 8 | 1 | 1 | 60 / 80 | 0.472 | 1.69 | 592.4 |" in text
    assert "| kind load, tp_size 8, model m | 22 | tpllm: no \\| memory |" in text and "mended later" not in text
    assert "| decode | m | 2 | 1 | 60 / 80 | 400 | 200 | 2 | 0ld |" in text and "| m | 2 | 32 |" not in text
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if (row["kind"], row["tp_size"], row["batch_size"]) == (
            "decode", "4", "1")]
    [row] = found
    numbers = {"tokens_per_s": 500, "speedup": 2, "efficiency": 0.5, "expected_ms": 0.784, "all_reduce_us": 20,
               "weak_baseline_tp_size": 4, "weak_efficiency": 1, "measured_over_expected": 2 / 0.784}
    assert (row["source"], row["agreement"][:3], row["joules_per_token"]) == ("measured", "tie", "")
    assert {name: float(row[name]) for name in numbers} == pytest.approx(numbers, rel=1e-5)


def test_two_models_in_one_directory_have_a_section_and_figures_each(tmp_path: Path) -> None:
    one = decode(1, 1, 4.0)
    del one["sizes"]
    later = one | {"batch_size": 4, "commit": "later"}
    write_report(tmp_path, [one, later, one | {"model": "n/n", "quant_algo": "W8A16"}])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for model, prefix in (("m, float32", "m-float32"), ("n/n, float32, W8A16", "n_n-float32-W8A16")):
        assert f"# {model}, eager" in text and f"({prefix}-eager-latency.png)" in text
        assert (tmp_path / f"{prefix}-eager-latency.png").is_file()
    assert text.count("; commit c0ffee, later; ") == text.count("; commit c0ffee; ") == 1


def test_without_matplotlib_there_are_tables_and_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "have_matplotlib", lambda: False)
    [note] = write_report(tmp_path, RECORDS)
    assert "pip install 'tpllm[report]'" in note
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.csv"}
    assert ".png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_records_of_earlier_versions_lack_only_what_needs_their_missing_fields(tmp_path: Path) -> None:
    old = {name: value for name, value in decode(2, 1, 2.5, 10.0).items() if name not in (
        "sizes", "peak_tflops", "topology", "cores_per_host", "joules_per_token")}
    write_report(tmp_path, [old])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 2 | 1 | 60 / 80 | 400 (360 to 440) | 1 | 100 % |" in text and "smallest that was measured" in text
    assert (tmp_path / "pareto.png").is_file() and not (tmp_path / "roofline.png").exists()
