"""Times of the README's cases, for bench.csv: `python -m on_gpu.timing eager|triton|compiled`.

The cases and the way to measure are those of `selfreg-fast bench`: peers in turns, caches cold, CUDA events; and a
step's launches, Python's time, and its replay by a CUDA graph. What compiles for long is measured apart.
"""

from __future__ import annotations

import argparse
import json
import sys

from . import REHEARSAL, emit, pretend, say

if __name__ == "__main__" and "compiled" not in sys.argv:  # torch.compile would see through it
    pretend.where_there_is_no_gpu()

from selfreg_fast.commands import bench
from selfreg_fast.commands.bench import report, trial
from selfreg_fast.commands.bench.cases import FUSED, TRITON, Case, suites

ROUNDS = 2 if REHEARSAL else 10


def chosen(which: str) -> list[tuple[str, Case]]:
    """(suite, case), those that tell most first."""
    there = suites("cuda")
    if which == "eager":
        work = [(suite, case) for suite in ("interpolate", "loss", "scaling") for case in there[suite]]
        wanted = [tuple(p for p in case.peers if p != TRITON and "compiled" not in p) for _, case in work]
    else:
        work = [(suite, case) for suite in ("interpolate", "loss") for case in there[suite]]
        work = [(suite, case) for suite, case in work if any(which in peer.lower() for peer in case.peers)]
        wanted = [(FUSED, *(p for p in case.peers if which in p.lower())) for _, case in work]
    if which == "triton":  # one of each kind, for each compiles anew
        first = {
            (c.size is None, c.dtype, c.layout, c.shape[1], c.exits): i for i, (_, c) in reversed([*enumerate(work)])
        }
        work, wanted = zip(*[(work[i], wanted[i]) for i in sorted(first.values())], strict=True)
    chosen = [(suite, case._replace(peers=peers)) for (suite, case), peers in zip(work, wanted, strict=True)]
    if REHEARSAL:
        few = chosen[:1] if which == "compiled" else chosen[:: len(chosen) // 2]
        return [(suite, rehearsed(case)) for suite, case in few]
    return chosen


def rehearsed(case: Case) -> Case:
    """The case on few pixels."""
    shape = (1, min(case.shape[1], 21), 9, 12)
    return case._replace(shape=shape, size=case.size and (24, 32), exits=min(case.exits, 3))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m on_gpu.timing", description=__doc__)
    parser.add_argument("which", choices=["eager", "triton", "compiled"])
    which = parser.parse_args().which
    device = "cpu" if REHEARSAL and which == "compiled" else "cuda"
    if REHEARSAL:
        trial.MOST_SETS = 2
    common, failures = bench.setting(device, ROUNDS), 0
    for suite, case, records in bench.results(chosen(which), device, ROUNDS, float("inf")):
        say(line(case, records))
        for record in records:
            emit("bench", **json.loads(json.dumps({**common, **record, "suite": suite}, default=str)))
            if record["note"]:
                say(f"  {record['peer']}: {record['note']}")
            wrong = report.is_failure(record) and record["peer"].startswith("fused")
            failures += wrong
            emit(
                "check", name=f"timing of {case.name}, {case.dtype}, {case.layout}: {record['peer']}", passed=not wrong
            )
    return int(failures > 0)


def line(case: Case, records: list[bench.Record]) -> str:
    """A case in one line."""
    fused = next((r for r in records if r["peer"] == FUSED and r["both_ms"]), None)
    if fused is None:
        return f"{case.name}, {case.dtype}: no time"
    others = [f"{r['peer']} {r['times_fused']:.1f}x" for r in records if r["peer"] != FUSED and r["both_ms"]]
    text = f"{case.name}, {case.dtype}{', channels_last' * (case.layout != 'contiguous')}: {fused['both_ms']:.3g} ms"
    text += f", {fused['percent_of_limit']:.0f} % of {fused['limit']}; " + ", ".join(others)
    if fused["replay_ms"]:
        text += (
            f"; replay {fused['replay_ms']:.3g} ms, {fused['launches']} launches, {fused['host_us']:.0f} us of Python"
        )
    return text


if __name__ == "__main__":
    raise SystemExit(main())
