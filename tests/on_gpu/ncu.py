"""What Nsight Compute counts of eight main kernels, for counters.csv: `python -m on_gpu.ncu`."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from . import counted, emit, say

KERNELS = "full_size_kernel|small_exits_kernel|blockwise_kernel|exit_rows_kernel|exit_blocks_kernel"
PARTS = range(2)  # of counters.py's cases
STALLS = (
    "barrier branch_resolving dispatch_stall drain imc_miss lg_throttle long_scoreboard math_pipe_throttle membar "
    "mio_throttle misc no_instruction not_selected selected short_scoreboard sleeping wait"
).split()
METRICS = [
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "smsp__inst_executed_op_local_ld.sum",
    "smsp__inst_executed_op_local_st.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    *(f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in STALLS),
]


def read(lines: Iterable[str]) -> list[dict[str, tuple[str, str]]]:
    """What `ncu --csv` says of each kernel, in the order in which they ran: metric -> (unit, value)."""
    rows = list(lines)
    begin = next((i for i, line in enumerate(rows) if line.startswith('"ID"')), len(rows))
    kernels: dict[str, dict[str, tuple[str, str]]] = {}
    for row in csv.DictReader(line for line in rows[begin:] if line.startswith('"')):
        metrics = kernels.setdefault(row["ID"], {"kernel": ("", row["Kernel Name"])})
        metrics[row["Metric Name"]] = row["Metric Unit"], row["Metric Value"].replace(",", "")
    return list(kernels.values())


def run(part: int, metrics: Sequence[str]) -> tuple[int, list[str]]:
    """ncu's exit status, and what it and the program print. The clocks stay as they are."""
    command = ["ncu", "--csv", "--print-units=base", "--clock-control=none", f"--metrics={','.join(metrics)}"]
    command += [f"--kernel-name=regex:{KERNELS}", sys.executable, "-m", "on_gpu.counters", "cuda", f"--run={part}"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return 127, [f"==ERROR== {error}"]
    print(done.stdout, flush=True)
    return done.returncode, done.stdout.splitlines()


def count(part: int) -> bool:
    """Counts a part of the cases; whether each had its kernel."""
    status, lines = run(part, METRICS)
    if not read(lines) and any("metric" in line for line in lines if line.startswith("==ERROR==")):
        status, lines = run(part, METRICS[:4])  # of another version's names the common ones will do
    cases = [match.groups() for line in lines if (match := re.match(r"launch (.*); (\w+)$", line))]
    kernels = read(lines)
    passed = 0 < len(kernels) == len(cases)
    for (case, dtype), metrics in zip(cases, kernels if passed else [], strict=False):  # else whose is whose is unknown
        kernel = metrics.pop("kernel")[1]
        for metric, (unit, value) in metrics.items():
            counted(case, dtype, "cuda", kernel, "ncu", metric, unit, value)
        time, issue, memory = (metrics.get(METRICS[i], ("", "?"))[1] for i in (0, 3, 7))
        say(f"{case}, {dtype}: {time} ns, issue slots {issue} %, memory {memory} %")
    emit("check", name=f"ncu, part {part + 1}", passed=passed, kernels=len(kernels), rc=status)
    if not passed:
        error = next((line for line in lines if line.startswith("==ERROR==")), "")
        say(f"ncu: {len(kernels)} kernels were counted, exit status {status} {error}")
    return passed


if __name__ == "__main__":
    counts = [count(part) for part in PARTS]
    raise SystemExit(not all(counts))
