"""Time, peak memory and copy bandwidth on this machine's CPU."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds a call took: the median, and the percentiles 20 and 80."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        fifths = statistics.quantiles(seconds if len(seconds) > 1 else [*seconds, *seconds], n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[3])


def sample_seconds(
    functions: Mapping[str, Sequence[Callable[[], object]]],
    repeats: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Seconds of each step of each function, `repeats` times, after one round of warm-up.

    The functions take turns, so that whatever else the machine does meets all alike, and samples of one round can be
    compared pairwise.

    Args:
        functions: name -> steps, which are called one after the other and timed each.
        repeats: number of rounds.
        advance: called, untimed, after each function's turn (`(repeats + 1) * len(functions)` times).

    Returns:
        name -> a list of `repeats` samples for each step.
    """
    samples: dict[str, list[list[float]]] = {name: [[] for _ in steps] for name, steps in functions.items()}
    gc.collect()
    for turn in range(repeats + 1):
        for name, steps in functions.items():
            times = [time.perf_counter()]
            for step in steps:
                step()
                times.append(time.perf_counter())
            if turn:
                for sample, start, end in zip(samples[name], times, times[1:], strict=False):
                    sample.append(end - start)
            advance()
    return samples


def median_seconds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time of each function: median and percentiles of `repeats` calls that take turns, after one of warm-up."""
    samples = sample_seconds({name: [function] for name, function in functions.items()}, repeats)
    return {name: Timing.of(steps[0]) for name, steps in samples.items()}


def peak_bytes(function: Callable[[], object]) -> int | None:
    """By how much this process's resident memory grew, at most, while `function` ran; None if the system cannot tell.

    Call `function` once before, so that libraries and thread pools are loaded. What malloc holds in its free lists is
    resident already and hides as much of the growth, and what it keeps after a free adds to it: the figure is crisp
    only where malloc maps every large block by itself and returns it at once, as in :func:`in_fresh_process`.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = _resident_bytes("VmHWM")
        function()
        return max(0, _resident_bytes("VmHWM") - before)
    except (OSError, LookupError):
        return None


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """`function(*arguments)` in a new Python process in which malloc maps every block from 64 KiB on by itself.

    There, :func:`peak_bytes` sees each tensor come and go. By default glibc raises that threshold up to 32 MiB as
    blocks are freed, and then serves them from a heap that it seldom gives back.

    Args:
        function: importable by its module and name.
        arguments: they and the result must survive JSON.

    Raises:
        RuntimeError: the process failed; the text is its last line of output.
    """
    call = json.dumps([sys.path, function.__module__, function.__qualname__, arguments])
    # -I: nothing of the working directory or of PYTHONPATH comes in before the parent's own path.
    child = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD, call],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeError(lines[-1])
    result: T = json.loads(child.stdout.splitlines()[-1])
    return result


_CHILD = """
import json, sys
sys.path[:], module, name, arguments = json.loads(sys.argv[1])
from selfreg_fast.commands.measure import call_by_name
print(json.dumps(call_by_name(module, name, arguments)))
"""


def call_by_name(module: str, name: str, arguments: Sequence[object]) -> object:
    """The other end of :func:`in_fresh_process`."""
    return getattr(import_module(module), name)(*arguments)


def copying() -> tuple[Callable[[], object], int]:
    """A function that copies a large tensor to another with all threads, and the bytes it reads and writes."""
    source = torch.ones(2**26)  # 256 MiB: more than the caches hold
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def _resident_bytes(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
