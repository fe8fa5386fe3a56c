"""The kernels of benchmarks/counted's cases, one by one: `python -m on_gpu.counters cuda|triton`.

Their times by torch's profiler go to counters.csv. `--run K` is for ncu.py: the K-th part of the cases, once each.
"""

from __future__ import annotations

import argparse
import re
import statistics

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from . import REHEARSAL, counted, emit, pretend, say

if __name__ == "__main__":
    pretend.where_there_is_no_gpu()

import selfreg_fast as srf
from benchmarks.counted.__main__ import CASES
from benchmarks.counted.kernels import Case

MAIN = re.compile("full_size_kernel|small_exits_kernel|blockwise_kernel|exit_rows_kernel|exit_blocks_kernel")
RUNS = 1 if REHEARSAL else 5
# Eight kernels, by case and dtype; in two parts, for Nsight Compute says nothing before it is through.
PROFILED = (((0, "float32"), (5, "float32"), (1, "float32"), (0, "bfloat16")),
            ((3, "float32"), (4, "float32"), (5, "bfloat16"), (1, "bfloat16")))  # fmt: skip


def step(case: Case, dtype: str, backend: str) -> None:
    """Forward and backward of a counted case, on random logits."""
    (B, C, *size), less = case.shape, 32 if REHEARSAL else 1
    H, W = (d // less for d in size)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    exits = []
    for h, w in case.sizes:
        z = torch.randn((B, C, h // less, w // less), device="cuda", dtype=getattr(torch, dtype))
        exits.append(z.contiguous(memory_format=layout).requires_grad_())
    if case.labels:
        labels = torch.randint(C, (B, H, W), device="cuda")
        options = {"seg_weight": 0.8, "temperature": case.temperature, "backend": backend}
        loss = srf.self_regulation_loss(exits, labels, **options).total
    else:
        taught = srf.sr_f_loss if case.teachers[0] == 0 else srf.sr_l_loss
        loss = taught(exits, temperature=case.temperature, backend=backend)
    loss.backward()


def profile(case: Case, dtype: str, backend: str) -> float:
    """Emits each kernel's time; returns that of the main one, the median of some runs, in ms."""
    step(case, dtype, backend)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            step(case, dtype, backend)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        ours = event.device_type == DeviceType.CUDA or (REHEARSAL and event.name.startswith("selfreg_fast::"))
        if ours and not event.name.startswith("Mem") and "at::" not in event.name:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    main = 0.0
    for kernel, samples in times.items():
        each = statistics.median(samples) * len(samples) / RUNS  # of a step, where it may run more than once
        counted(case.name, dtype, backend, kernel, "profiler", "duration", "us", round(each, 3))
        if MAIN.search(kernel):
            main = each / 1e3
    return main


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m on_gpu.counters", description=__doc__)
    parser.add_argument("backend", choices=["cuda", "triton"])
    parser.add_argument("--run", type=int, choices=range(len(PROFILED)))
    options = parser.parse_args()
    if options.run is not None:
        for number, dtype in PROFILED[options.run]:
            print(f"launch {CASES[number].name}; {dtype}", flush=True)
            step(CASES[number], dtype, options.backend)
        torch.cuda.synchronize()
        return 0
    for dtype in ("float32", "bfloat16"):
        for case in CASES[:: 3 if REHEARSAL else 1]:
            main = profile(case, dtype, options.backend)
            say(f"{case.name}, {dtype}: main kernel {main:.3f} ms")
            emit("check", name=f"profile of {case.name}, {dtype}, {options.backend}", passed=main > 0)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
