"""Time, peak memory, and this machine's limits: how fast it copies, how fast it computes exponentials."""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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


class CpuClock:
    """Seconds between marks."""

    def begin(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [end - start for start, end in itertools.pairwise(marks)]


class CudaClock:
    """Seconds between marks by the GPU's own clock: kernels, not the Python that feeds them."""

    HEAD_START = 5_000_000  # clock cycles, some ms, for which the GPU waits while Python enqueues

    def begin(self) -> None:
        torch.cuda._sleep(self.HEAD_START)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


def sample_seconds(
    functions: Mapping[str, Sequence[Callable[[], object]]],
    repeats: int,
    device: str,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Seconds of each step of each function, `repeats` times, after one round of warm-up.

    The functions take turns, so that whatever else the machine does meets all alike, and samples of one round can be
    compared pairwise. On the CPU a turn begins with a call that is not timed, as training is a loop: what the others
    leave behind, be it memory that a virtual machine's host takes back within seconds, is not this function's to pay.

    Args:
        functions: name -> steps, which are called one after the other and timed each.
        repeats: number of rounds.
        device: "cpu" or "cuda", where they compute.
        advance: called, untimed, after each function's turn (`(repeats + 1) * len(functions)` times).

    Returns:
        name -> a list of `repeats` samples for each step.
    """
    clock: Any = CudaClock() if device == "cuda" else CpuClock()
    samples: dict[str, list[list[float]]] = {name: [[] for _ in steps] for name, steps in functions.items()}
    gc.collect()
    for turn in range(repeats + 1):
        for name, steps in functions.items():
            if turn and device == "cpu":
                for step in steps:
                    step()
            clock.begin()
            marks = [clock.mark()]
            for step in steps:
                step()
                marks.append(clock.mark())
            if turn:
                for sample, seconds in zip(samples[name], clock.seconds(marks), strict=True):
                    sample.append(seconds)
            advance()
    return samples


def median_seconds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time of each function on the CPU: median and percentiles of `repeats` calls in turns, after one of warm-up."""
    samples = sample_seconds({name: [function] for name, function in functions.items()}, repeats, "cpu")
    return {name: Timing.of(steps[0]) for name, steps in samples.items()}


def device_peak_bytes(function: Callable[[], object]) -> int:
    """By how much PyTorch's memory on the GPU grew, at most, while `function` ran."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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


# What glibc's malloc reads when a process begins. By default it maps blocks of more than 32 MiB anew each time, whose
# pages the kernels then are the first to touch; smaller ones come from a heap of which it gives back the end.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # blocks from 64 KiB on come and go one by one, which peak_bytes sees
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # all come from a heap that is never given back


def in_fresh_process(function: Callable[..., T], *arguments: object, malloc: Mapping[str, str] = MAPPED) -> T:
    """`function(*arguments)` in a new Python process with a malloc of its own settings.

    Args:
        function: importable by its module and name.
        arguments: they and the result must survive JSON.
        malloc: environment variables, :data:`MAPPED` or :data:`KEPT`.

    Raises:
        RuntimeError: the process failed; the text is its last line of output.
    """
    call = json.dumps([sys.path, function.__module__, function.__qualname__, arguments])
    # -I: nothing of the working directory or of PYTHONPATH comes in before the parent's own path.
    child = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD, call],
        env={**os.environ, **malloc},
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


class Limit(NamedTuple):
    """Something that the machine can do only so fast: a function that does it, and how often a call does."""

    function: Callable[[], object]
    amount: int


def copying(device: str) -> Limit:
    """A copy from one tensor to another, both larger than the caches hold; counted in bytes read and written."""
    source = torch.ones(max(2**26, cache_bytes(device) // 4), device=device)
    target = torch.zeros_like(source)
    return Limit(lambda: target.copy_(source), 2 * source.nbytes)


def exponentials(device: str) -> Limit:
    """Exponentials of float32 numbers that are near: in the caches of the CPU, in the registers of the GPU."""
    if device == "cuda":
        code = "template <typename T> T chain(T x) { for (int i = 0; i < 64; ++i) x = __expf(-x); return x; }"
        chain = torch.cuda.jiterator._create_jit_fn(code)
        numbers = torch.rand(2**24, device=device)
        return Limit(lambda: chain(numbers), 64 * numbers.numel())
    # On one thread, source and target in its second-level cache: a rate that holds on a busy machine too, where threads
    # wait for each other. The machine's is taken to be that of as many as there are.
    threads = torch.get_num_threads()
    source = torch.linspace(-10, 0, 2**15)
    target = torch.empty_like(source)

    def compute() -> None:
        torch.set_num_threads(1)
        for _ in range(512):
            torch.exp(source, out=target)
        torch.set_num_threads(threads)

    return Limit(compute, 512 * source.numel() * threads)


def cache_bytes(device: str) -> int:
    """What the caches hold, or 256 MiB where they hold less or do not say."""
    if device == "cuda":
        return max(2**28, torch.cuda.get_device_properties().L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return max(2**28, int(text.removesuffix("K")) * 1024)
    except (OSError, ValueError):
        return 2**28


def _resident_bytes(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
