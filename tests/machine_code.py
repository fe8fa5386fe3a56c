"""Runs machine code for sm_90 without a GPU, the kernels of a launch one after the other, and checks the results."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from support import RELATIVE, assert_close, make_exits, make_labels, smallest

sys.path.append(str(Path(__file__).parents[1]))  # last: selfreg_fast is the installed one

from benchmarks.counted import sass
from benchmarks.counted.kernels import EXITS, GRADS, LABELS, LOSSES, TOTAL, UNIT, WORKSPACE, Case, Compiled
from selfreg_fast import reference

Computed = tuple[torch.Tensor, float, list[torch.Tensor]]


def check(case: Case, compute: Callable[[list[torch.Tensor], torch.Tensor], Computed]) -> None:
    """Compares compute(exits, labels), the matrix, its weighted total and the gradients, with the reference."""
    B, C, H, W = case.shape
    exits = [make_exits(1, (B, C, h, w), seed=e)[0] for e, (h, w) in enumerate(case.sizes)]
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    exits = [z.contiguous(memory_format=layout) for z in exits]
    labels = make_labels((B, H, W), C)
    losses, total, actual = compute(exits, labels)
    inputs = [z.double().requires_grad_() for z in exits]
    exact = reference.exit_loss_matrix(
        inputs,
        labels,
        teachers=case.teachers,
        temperature=case.temperature,
        renormalize=case.target == "renormalized",
        target="argmax" if case.target == "argmax" else "soft",
        label_smoothing=case.label_smoothing,
        size=(H, W),
    )
    weights = torch.ones_like(exact)
    weights[0] = 0.8
    exact_total = (weights * exact).sum()
    assert_close(losses, exact.detach(), RELATIVE[torch.float32], smallest(torch.float32), f"{case.name}: losses")
    assert abs(total - float(exact_total.detach())) < RELATIVE[torch.float32] * float(exact_total.detach())
    for e, (g, z) in enumerate(zip(actual, torch.autograd.grad(exact_total, inputs), strict=True)):
        pixels = B * H * W
        assert_close(g * pixels, z * pixels, RELATIVE[torch.float32], smallest(torch.float32), f"{case.name}: exit {e}")


def of_cuda(compiled: Compiled, case: Case, exits: list[torch.Tensor], labels: torch.Tensor) -> Computed:
    """Computes it, of int64 labels."""
    launches, workspace = compiled.launches(case, multiprocessors=1)
    entries = (len(case.teachers) + 1) * len(exits)
    memory = {place: bytearray(size) for place, size in ((WORKSPACE, workspace), (LOSSES, 4 * entries), (TOTAL, 4))}
    memory[LABELS] = bytearray(labels.numpy().tobytes())
    for e, z in enumerate(exits):
        rows = z.movedim(1, -1) if case.channels_last else z
        memory[EXITS + e] = bytearray(rows.contiguous().numpy().tobytes())
        memory[GRADS + e] = bytearray(b"\xff" * len(memory[EXITS + e]))  # NaN

    def load(at: int, size: int) -> int:
        begin = at % UNIT
        place = memory[at // UNIT]
        assert begin + size <= len(place), f"read beyond place {at // UNIT}"
        return int.from_bytes(place[begin : begin + size], "little")

    def store(at: int, size: int, value: int) -> None:
        begin = at % UNIT
        place = memory[at // UNIT]
        assert begin + size <= len(place), f"write beyond place {at // UNIT}"
        place[begin : begin + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    for launch in launches:
        program = sass.Program(launch.kernel, launch.parameters, launch.grid, launch.block, load, store)
        for y in range(launch.grid[1]):
            for x in range(launch.grid[0]):
                program.run((x, y))
    losses = torch.frombuffer(memory[LOSSES], dtype=torch.float32).view(-1, len(exits))
    flat = [torch.frombuffer(memory[GRADS + e], dtype=z.dtype) for e, z in enumerate(exits)]
    gradients = [g.as_strided(z.shape, z.stride()) for g, z in zip(flat, exits, strict=True)]
    return losses, struct.unpack("<f", memory[TOTAL])[0], gradients
