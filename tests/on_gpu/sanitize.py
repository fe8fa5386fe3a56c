"""compute-sanitizer over the tiny cases: `python -m on_gpu.sanitize TOOL BACKEND`.

Findings are told as they come. Torch gives freed memory back at once here: each tensor is an allocation of its own,
beyond whose end nothing else lies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from . import emit, say

# A report is a line of "========= WHAT" and lines further in, one of which names the kernel.
HEAD, MORE = re.compile(r"={9} (\S.*)"), re.compile(r"={9}\s{2,}(\S.*)")
NO_FINDING = re.compile(
    r"COMPUTE-SANITIZER|.*SUMMARY:|Target application|Error: (?!Race)|Internal Sanitizer|.*not supported"
)
OURS = re.compile(r"selfreg|(?:exit_rows|exit_blocks|axes|collect|count|norms|finish|total|scale)_kernel")


def command(tool: str, backend: str) -> list[str]:
    options = [f"--tool={tool}", "--error-exitcode=9", "--print-limit=1000", "--show-backtrace=device"]
    options += ["--target-processes=application-only", "--launch-timeout=0", "--destroy-on-device-error=kernel"]
    if tool == "memcheck":  # torch asks CUDA for what it may not have, and goes on: no error of a kernel
        options += ["--report-api-errors=no"]
    return ["compute-sanitizer", *options, sys.executable, "-m", "on_gpu.cases", backend, "--tiny"]


def reports(lines: Iterable[str]) -> Iterator[list[str]]:
    """The reports among the lines, each as soon as it is over."""
    report: list[str] = []
    for line in lines:
        head, more = HEAD.match(line), MORE.match(line)
        if more and report:
            report.append(more[1])
            continue
        if report:
            yield report
        report = [head[1]] if head else []
    if report:
        yield report


def main() -> int:
    tool, backend = sys.argv[1:]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        process = subprocess.Popen(
            command(tool, backend), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        emit("check", name=f"{tool}, {backend}", passed=False, wrong=[str(error)])
        say(f"{tool}: not run: {error}")
        return 1
    assert process.stdout is not None
    cases = ours = others = 0
    trouble = ""

    def told() -> Iterator[str]:
        nonlocal cases
        for line in process.stdout or ():
            print(line, end="", flush=True)
            cases += line.startswith("@check")
            yield line

    for report in reports(told()):
        if NO_FINDING.match(report[0]):
            trouble = trouble or ("" if "SUMMARY" in report[0] or "COMPUTE" in report[0] else report[0])
        elif any(map(OURS.search, report)):
            ours += 1
            say(f"{tool}: {'; '.join(report[:3])[:300]}")
        else:
            others += 1
    rc = process.wait()
    # Findings in torch's kernels are told, and fail nothing.
    passed = ours == 0 and cases > 0 and (rc == 0 or (rc == 9 and others > 0))
    emit("check", name=f"{tool}, {backend}", passed=passed, findings=ours, elsewhere=others, cases=cases, rc=rc)
    more = f", {others} in kernels of torch" if others else ""
    if not passed and not ours:
        more += f"; it ended with status {rc}{f': {trouble}' if trouble else ''}"
    say(f"{tool}, {backend}: {ours} findings in {cases} cases{more}")
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
