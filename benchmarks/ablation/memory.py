"""Peak memory by the number of pixels, measured on the CPU; what fits into a GPU follows from it by division."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from selfreg_fast.commands.bench.cases import FUSED, TUNED, WRITTEN
from selfreg_fast.commands.bench.cases import Case as LossCase
from selfreg_fast.commands.bench.trial import measure_peaks
from selfreg_fast.commands.measure import in_fresh_process

from .step import LIMIT_SIZE, PEERS, Case, Step, peaks_on_cpu

# Images and their sizes: three batches, and larger images, as memory should follow the pixels however they come.
STEPS = [(1, LIMIT_SIZE), (2, LIMIT_SIZE), (3, LIMIT_SIZE), (1, (768, 768))]
# The loss alone, of five exits of an eighth of the output: classes and output. Quarters of it, which fit here, and all.
LOSSES = [(21, (512, 512)), (19, (1024, 2048)), (150, (512, 512))]


def measure(backend: str, common: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each step or loss, number of pixels and peer.

    `held_bytes` is what a step finds there (weights, momentum, images, labels), `peak_bytes` what comes on top of it;
    of the loss alone, on top of exits and labels. Each is measured in a process of its own.
    """
    total = 4 * len(STEPS) + 9 * len(LOSSES)
    rows = tqdm(itertools.chain(_steps(backend), _losses()), "peak memory", total, unit="peak")
    return [{**common, **row} for row in rows]


def _steps(backend: str) -> Iterator[dict[str, Any]]:
    for sr_f_on, (batch, size) in itertools.product(("logits", "features"), STEPS):
        case = Case("full", batch, size, sr_f_on)
        for peer, name in zip(PEERS, (backend, "reference"), strict=True):
            [peak] = in_fresh_process(peaks_on_cpu, case, [name])
            what = f"step of `{case.preset}`, SR-F on {sr_f_on}"
            yield _row(what, LIMIT_SIZE, batch, size, peer) | {"held_bytes": held_bytes(case), "peak_bytes": peak}


def _losses() -> Iterator[dict[str, Any]]:
    for classes, image in LOSSES:
        part = image[0] // 2, image[1] // 2
        for batch, size in ((1, part), (2, part), (1, image)):
            shape = batch, classes, size[0] // 8, size[1] // 8
            case = LossCase("memory", "objective", 5, shape, size)
            for peer in (FUSED, TUNED, WRITTEN):
                peak = in_fresh_process(measure_peaks, case, [peer])[peer]
                yield _row(f"loss, {classes} classes", image, batch, size, peer) | {"held_bytes": 0, "peak_bytes": peak}


def _row(what: str, image: tuple[int, int], batch: int, size: tuple[int, int], peer: str) -> dict[str, Any]:
    """`image`: the size for which the README has it."""
    sizes = {"image": "x".join(map(str, image)), "batch": batch, "size": "x".join(map(str, size))}
    return {"what": what, **sizes, "precision": "fp32", "peer": peer}


def held_bytes(case: Case) -> int:
    """What there is between steps: weights with their momentum, buffers, images and labels."""
    step = Step(case, "reference", torch.device("cpu"))
    weights = list(step.model.parameters())
    tensors = [*weights, *weights, *step.model.buffers(), step.images, step.labels]
    return sum(tensor.nbytes for tensor in tensors)
