"""tests/test_on_gpu.py for one backend: `python -m on_gpu.run_tests BACKEND`. Each outcome is told as it comes."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

from . import REHEARSAL, ROOT, emit, pretend, say

BACKEND = "SELFREG_TESTED_BACKEND"  # how this module, loaded as a plugin by every worker, knows it


def pytest_configure(config: pytest.Config) -> None:
    pretend.where_there_is_no_gpu()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Those of the backend; the largest last."""
    of = os.environ[BACKEND]
    items[:] = [item for item in items if item.callspec.params.get("backend") == of]
    if REHEARSAL:
        # Labels on the CPU are always looked at, and what Triton's interpreter runs goes into no pretended graph.
        left_out = ("bad_label", *(("graph", "captured") if of == "triton" else ()))
        items[:] = [item for item in items if not any(name in item.name for name in left_out)]
        items[:] = items[:: 12 if of == "triton" else 1]
    items.sort(key=lambda item: "32_bits" in item.name)


class Recorder:
    """Tells outcomes; where there are several workers, the process that starts them does."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "failed" if report.outcome == "failed" else report.outcome
        self.counts[outcome] += 1
        text = "" if outcome == "passed" else report.longreprtext
        name = report.nodeid.rpartition("/")[2]
        emit("test", name=name, outcome=outcome, seconds=round(report.duration, 3), text=text[-8000:])
        emit("check", name=name, passed=outcome != "failed", outcome=outcome)
        if outcome == "failed":
            last = [line for line in text.splitlines() if line.startswith("E ")]
            say(f"FAILED {name}: {' '.join((last or [text[-200:]])[0].split()[1:])}")


def main() -> int:
    backend = os.environ[BACKEND] = sys.argv[1]
    arguments = [str(ROOT / "tests" / "test_on_gpu.py"), "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    arguments += [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-p",
        "on_gpu.run_tests",
        "--require-backend",
        backend,
    ]
    # Triton's kernels are compiled by the processor, one at a time: so several at a time.
    if backend == "triton" and not REHEARSAL and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(max(1, len(os.sched_getaffinity(0)) // 2)), "--dist", "worksteal"]
    recorder = Recorder()
    status = pytest.main(arguments, plugins=[recorder])
    say(f"{backend}: " + ", ".join(f"{count} {outcome}" for outcome, count in recorder.counts.items()))
    return int(status != 0 or recorder.counts["passed"] == 0)


if __name__ == "__main__":
    raise SystemExit(main())
