"""What `.ci/gpu OUT` found, into this repository: `python benchmarks/gpu_results.py OUT`.

Times become benchmarks/results/DEVICE.csv, checks and counters benchmarks/results/gpu/DEVICE.json and -counters.csv,
and README and figures are written anew. Measured times are printed beside those that benchmarks/counted has counted.
With --print nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import readme
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ROOT / "benchmarks" / "counted" / "sm_90.csv"
# Of the kernels of a step, which one benchmarks/counted counts as the main one.
MAIN = re.compile("full_size_kernel|small_exits_kernel|blockwise_kernel|exit_rows_kernel|exit_blocks_kernel")
Row = dict[str, Any]


def rows(path: Path) -> list[Row]:
    """The lines of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(counters: list[Row], case: str, dtype: str, backend: str) -> dict[str, float]:
    """`main_ms`, `others_ms` by the profiler, and what Nsight Compute says of the main kernel, by metric."""
    found: dict[str, float] = {}
    for row in counters:
        if (row["case"], row["dtype"], row["backend"]) != (case, dtype, backend):
            continue
        if row["source"] == "profiler":
            key = "main_ms" if MAIN.search(row["kernel"]) else "others_ms"
            found[key] = found.get(key, 0.0) + float(row["value"]) / 1e3
        else:
            found[row["metric"]] = _number(row["value"])
    return found


def beside(counters: list[Row], counted: list[Row]) -> Table:
    """A line for each case that is counted, of those kernels that ran."""
    table = Table(title="main kernels: counted by benchmarks/counted, measured", title_justify="left")
    for heading in ("case", "dtype", "kernels", "counted: issue", "memory", "others", "measured", "others", "x counted",
                    "issue slots", "of memory", "instructions"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("case", "dtype", "kernels") else "right")
    for row in counted:
        backend = "triton" if row["compiler"].startswith("triton") else "cuda"
        found = measured(counters, row["case"], row["dtype"], backend)
        if "main_ms" not in found:
            continue
        bound = max(float(row["issue_ms"]), float(row["memory_ms"]))
        issued = found.get("smsp__inst_executed.sum")
        batch, channels, height, width = map(int, row["shape"].split("x"))
        elements = batch * channels * height * width * int(row["exits"])
        table.add_row(
            row["case"], row["dtype"], backend, row["issue_ms"], row["memory_ms"], row["others_ms"] or "-",
            f"{found['main_ms']:.4f}", f"{found.get('others_ms', 0):.4f}", f"{found['main_ms'] / bound:.2f}",
            _percent(found.get("smsp__issue_active.avg.pct_of_peak_sustained_active")),
            _percent(found.get("dram__throughput.avg.pct_of_peak_sustained_elapsed")),
            f"{32 * issued / elements:.1f} ({row['instructions']})" if issued else "-",
        )  # fmt: skip
    table.caption = "ms; instructions of a thread per output pixel, channel and exit, and in brackets as counted"
    return table


def _number(text: str) -> float:
    """NaN for what could not be counted."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def merged(bench: list[Row]) -> list[Row]:
    """Peers are measured in several passes, each beside the fused loss: its first line with figures stands."""
    chosen: dict[tuple[str, ...], Row] = {}
    for row in bench:
        key = tuple(row[k] for k in ("suite", "case", "dtype", "layout", "peer"))
        if key not in chosen or (row["both_ms"] and not chosen[key]["both_ms"]):
            chosen[key] = row
    return list(chosen.values())


def write(out: Path, checks: Row, root: Path) -> list[Path]:
    """The files in benchmarks/results."""
    name = re.sub(r"[^a-z0-9]+", "-", checks["device"].lower()).strip("-")
    results = root / "benchmarks" / "results"
    (results / "gpu").mkdir(parents=True, exist_ok=True)
    for old in results.glob(f"{name}-*.png"):  # a run that was cut off has fewer figures
        old.unlink()
    written = [results / "gpu" / f"{name}.json"]
    written[0].write_text(json.dumps(checks, indent=1) + "\n")
    tables = (
        (results / f"{name}.csv", merged(rows(out / "bench.csv"))),
        (
            results / "gpu" / f"{name}-counters.csv",
            rows(out / "counters.csv"),
        ),
    )
    for path, lines in tables:
        if lines:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
            written.append(path)
    return written


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that .ci/gpu filled")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    checks = json.loads((options.out / "checks.json").read_text())
    console.print(beside(rows(options.out / "counters.csv"), rows(COUNTED)))
    for name, stage in checks["stages"].items():
        failed = [check["name"] for check in stage["checks"] if not check["passed"]]
        console.print(f"{name}: {stage['state']}, {len(stage['checks'])} checks", *(f"\n  FAILED {n}" for n in failed))
    if options.print:
        return 0
    # Numbers from anything but a commit on a GPU belong nowhere.
    reason = (
        "it is a rehearsal" if checks["rehearsal"] else "its commit is not known" if checks["dirty"] is None else ""
    )
    if reason or checks["dirty"]:
        console.print(f"nothing written: {reason or 'its sources were not those of a commit'}", style="red")
        return 1
    for path in write(options.out, checks, root):
        console.print(f"wrote {path.relative_to(root)}")
    return readme.main([], root)


if __name__ == "__main__":
    sys.exit(main())
