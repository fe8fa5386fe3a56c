"""On a GPU, what a step costs besides its kernels: launches, and Python's time; and what they take without either."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from ..measure import CudaClock, sample_seconds

if TYPE_CHECKING:
    from .trial import Trial

ROUNDS = 5
MOST_SETS = 8  # in a graph


def launches(trial: Trial) -> int:
    """Kernels, copies and fills of a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trial.run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def host_seconds(trial: Trial) -> float:
    """The time in which Python enqueues a step, while the GPU is kept waiting: the median of some."""
    samples = []
    for _ in range(ROUNDS):
        CudaClock().begin()
        start = time.perf_counter()
        trial.prepare()
        trial.forward()
        trial.backward()
        samples.append(time.perf_counter() - start)
        trial.finish()
        torch.cuda.synchronize()
    return statistics.median(samples)


def replay_seconds(trial: Trial, sets: int) -> float:
    """The time of a step as a CUDA graph replays it, on inputs in turns, of which the trial has so many `sets`."""
    sets = min(sets, MOST_SETS)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks of what is to be captured
        trial.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(sets):
            trial.run()
    samples = sample_seconds({"replay": [graph.replay]}, ROUNDS, "cuda")["replay"][0]
    return statistics.median(samples) / sets
