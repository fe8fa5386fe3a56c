"""What got slower since the last commit's record: `make bench-compare`.

The records are those of `pytest benchmarks --benchmark-only --benchmark-autosave`, in .benchmarks: the newest is
compared with the newest before it of another commit, or of the same one without changes. Compared are ratios of the
fused loss's time to its peer's in the same run. A case is slower if its ratio grew by a tenth and beyond both spreads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parents[1] / ".benchmarks"
MORE = 1.1

Record = dict[str, Any]


def records(folder: Path) -> list[Record]:
    """All of this machine's records, oldest first. The newest's machine is this one."""
    found = [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    found.sort(key=lambda record: str(record["datetime"]))
    return [r for r in found if machine(r) == machine(found[-1])]


def machine(record: Record) -> tuple[str, ...]:
    info = record["machine_info"]
    return str(info["node"]), str(info.get("cpu", {}).get("brand_raw"))


def baseline(found: Sequence[Record]) -> Record | None:
    """The record to compare the newest with."""
    now = found[-1]["commit_info"]
    for record in reversed(found[:-1]):
        then = record["commit_info"]
        if then["id"] != now["id"] or (now["dirty"] and not then["dirty"]):
            return record
    return None


def ratios(record: Record) -> dict[str, Record]:
    return {b["name"]: b["extra_info"] for b in record["benchmarks"] if "ratio" in b["extra_info"]}


def is_slower(then: Record, now: Record) -> bool:
    return bool(now["ratio"] > MORE * then["ratio"] and now["ratio_p20"] > then["ratio_p80"])


def main(folder: Path = FOLDER) -> int:
    """Prints the comparison; 1 if anything got slower."""
    found = records(folder)
    before = baseline(found) if found else None
    if before is None:
        print("No record of an earlier commit: this run is the first, and will be compared with.")
        return 0
    commits = [record["commit_info"]["id"][:12] for record in (before, found[-1])]
    table = Table("case", "peer", f"ratio at {commits[0]}", f"ratio at {commits[1]}", "change", "")
    slower = 0
    old = ratios(before)
    for name, now in ratios(found[-1]).items():
        case = name.partition("[")[2].rstrip("]") or name  # of "test_step[case]"; brackets would be taken for markup
        if name not in old:
            table.add_row(case, now["peer"], "-", f"{now['ratio']:.3f}", "", "new")
            continue
        then, worse = old[name], is_slower(old[name], now)
        slower += worse
        change = f"{100 * (now['ratio'] / then['ratio'] - 1):+.0f} %"
        verdict = "SLOWER" if worse else ""
        table.add_row(case, now["peer"], f"{then['ratio']:.3f}", f"{now['ratio']:.3f}", change, verdict)
    Console().print(table)
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
