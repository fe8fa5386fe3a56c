"""The whole training step, fused against reference on the same network: time, peak memory and, on a GPU, what fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from selfreg_fast.commands.measure import Timing, device_peak_bytes, in_fresh_process, peak_bytes, sample_seconds

from .training import ALL, CLASSES, MOMENTUM, PRESETS, VOID, Run, autocast, normalized

PEERS = ("fused", "reference")
PHASES = ("forward", "loss", "backward", "update")
ROUNDS = {"cpu": 5, "cuda": 20}
MEMORIES = (16, 24, 40)  # GiB of which the largest batch is sought, beside all that this GPU has
LIMIT_SIZE = (512, 512)


class Case(NamedTuple):
    """A network at a batch of images of a size. A list from JSON makes the same case."""

    preset: str  # whose network
    batch: int
    size: tuple[int, int]
    sr_f_on: str


CASES = {
    "cpu": [
        Case("quick", 8, (72, 96), "logits"),
        Case("quick", 8, (72, 96), "features"),
        Case("full", 1, (288, 384), "logits"),
        Case("full", 1, (288, 384), "features"),
    ],
    "cuda": [
        Case("full", 16, (288, 384), "logits"),
        Case("full", 16, (288, 384), "features"),
        Case("full", 8, LIMIT_SIZE, "logits"),
        Case("full", 8, LIMIT_SIZE, "features"),
    ],
}


class Step:
    """A training step in its phases, on random images."""

    def __init__(self, case: Case, backend: str, device: torch.device) -> None:
        torch.manual_seed(0)
        network = PRESETS[case.preset].network(len(CLASSES))
        self.model = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=MOMENTUM)
        self.run_settings = Run(ALL, 0, temperature=2.0, sr_f_on=case.sr_f_on)
        self.criterion = self.run_settings.criterion(torch.ones(len(CLASSES), device=device), backend)
        images = torch.randint(256, (case.batch, 3, *case.size), device=device, dtype=torch.uint8)
        self.images = normalized(images)
        self.labels = torch.randint(VOID + 1, (case.batch, *case.size), device=device, dtype=torch.uint8)

    def forward(self) -> None:
        with autocast(self.labels.device):
            self.exits = self.model(self.images)

    def loss(self) -> None:
        logits, image_logits, features = self.exits
        arguments = self.run_settings.arguments(image_logits, features)
        self.total = self.criterion(logits, self.labels, **arguments).total

    def backward(self) -> None:
        self.total.backward()
        del self.exits, self.total

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def phases(self) -> list[Callable[[], None]]:
        return [getattr(self, phase) for phase in PHASES]

    def run(self) -> None:
        for phase in self.phases:
            phase()


def measure(
    device: torch.device, backend: str, common: dict[str, Any], cases: Sequence[Case] | None = None
) -> list[dict[str, Any]]:
    """A row for each case and peer: milliseconds of each phase, peak memory above what there is between steps.

    The peers take turns. On a CPU the peak is the growth of the resident memory in a process of its own. On a GPU there
    are more rows: the largest batch at 512 x 512 that fits into so much memory.
    """
    backends = dict(zip(PEERS, (backend, "reference"), strict=True))
    rows = []
    for case in tqdm(cases or CASES[device.type], desc="training step", unit="case"):
        rows += [{**_row(common, case, device, peer), **own} for peer, own in _measured(case, backends, device).items()]
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
        memories = [memory for memory in MEMORIES if memory < there] + [math.floor(there)]
        for memory, sr_f_on, peer in itertools.product(memories, ("logits", "features"), PEERS):
            case = Case("full", 0, LIMIT_SIZE, sr_f_on)
            batch = largest_batch(case, backends[peer], device, memory / there)
            rows.append(_row(common, case, device, peer) | {"batch": batch, "memory_gib": memory})
    keys = list(dict.fromkeys(key for row in rows for key in (*row, "memory_gib")))
    return [{key: row.get(key) for key in keys} for row in rows]


def _measured(case: Case, backends: dict[str, str], device: torch.device) -> dict[str, dict[str, Any]]:
    """Times and peak of each peer."""
    steps = {peer: Step(case, name, device) for peer, name in backends.items()}
    samples = sample_seconds({peer: step.phases for peer, step in steps.items()}, ROUNDS[device.type], device.type)
    if device.type == "cuda":
        peaks: list[int | None] = [device_peak_bytes(step.run) for step in steps.values()]
    else:
        peaks = in_fresh_process(peaks_on_cpu, case, list(backends.values()))
    found: dict[str, dict[str, Any]] = {}
    for (peer, phases), peak in zip(samples.items(), peaks, strict=True):
        found[peer] = {}
        seconds = dict(zip(PHASES, phases, strict=True)) | {"step": [sum(s) for s in zip(*phases, strict=True)]}
        for phase, sample in seconds.items():
            for suffix, value in zip(("", "_p20", "_p80"), Timing.of(sample), strict=True):
                found[peer][f"{phase}_ms{suffix}"] = round(1e3 * value, 3)
        found[peer]["peak_bytes"] = peak
    return found


def _row(common: dict[str, Any], case: Case, device: torch.device, peer: str) -> dict[str, Any]:
    precision = "bf16 autocast" if device.type == "cuda" else "fp32"
    return {
        **common,
        "network": case.preset,
        "batch": case.batch,
        "size": "x".join(map(str, case.size)),
        "sr_f_on": case.sr_f_on,
        "precision": precision,
        "peer": peer,
    }


def peaks_on_cpu(case: Sequence[Any], backends: Sequence[str]) -> list[int | None]:
    """Peak memory of one step by each backend above what is resident between steps; meant for a fresh process."""
    peaks = []
    for backend in backends:
        step = Step(Case(*case), backend, torch.device("cpu"))
        step.run()
        peaks.append(peak_bytes(step.run))
    return peaks


def largest_batch(case: Case, backend: str, device: torch.device, fraction: float) -> int:
    """The largest batch whose step runs in this fraction of the GPU's memory, 0 if none does."""
    torch.cuda.set_per_process_memory_fraction(fraction)

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            step = Step(case._replace(batch=batch), backend, device)
            step.run()
            step.run()  # with the optimizer's momentum there
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    try:
        return largest(fits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest n >= 1 for which `fits`, which holds up to some n and not beyond; 0 if there is none."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
