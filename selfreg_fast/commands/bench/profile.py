"""Where the time of a fused step goes: a trace by torch.profiler, and the recipe for NVIDIA's profiler of kernels."""

from __future__ import annotations

import itertools
from pathlib import Path

from rich.console import Console
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from .cases import FUSED, Case
from .peers import CannotRun, build
from .trial import Trial, make_inputs

STEPS = 3
NCU = (  # the main kernel, once it is warm
    "ncu --set full --kernel-name 'regex:exit_loss' --launch-skip 2 --launch-count 3 -o {report} "
    "selfreg-fast bench --cases {case} --repeats 1"
)


def profile(case: Case, device: str, folder: Path, console: Console) -> None:
    """Writes FOLDER/CASE-DTYPE-LAYOUT.json, to be opened in https://ui.perfetto.dev, and prints what took longest."""
    try:
        peer = build(FUSED, case, device)
    except CannotRun as why:
        console.print(f"{case.name}: nothing to profile: {why}", style="yellow")
        return
    made, labels = make_inputs(case, device, 2)
    trial = Trial(peer, case, itertools.cycle(made), labels)
    trial.run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch_profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(STEPS):
            trial.run()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.name}-{case.dtype}-{case.layout}.json"
    profiler.export_chrome_trace(str(path))
    console.print(f"{case.name}: {STEPS} steps in {path}", soft_wrap=True)
    print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=8, max_name_column_width=50))
    if device == "cuda":
        console.print(NCU.format(report=folder / case.name, case=case.name), soft_wrap=True, markup=False)
