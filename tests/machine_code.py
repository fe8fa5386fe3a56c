"""Runs the CUDA backend's machine code for sm_90 without a GPU: the kernels of a launch, one after the other."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # last: selfreg_fast is the installed one

from benchmarks.counted import sass
from benchmarks.counted.kernels import EXITS, GRADS, LABELS, LOSSES, TOTAL, UNIT, WORKSPACE, Case, Compiled


def exit_loss(
    compiled: Compiled, case: Case, exits: list[torch.Tensor], labels: torch.Tensor
) -> tuple[torch.Tensor, float, list[torch.Tensor]]:
    """The exit-loss matrix, the weighted total and the gradients, of contiguous exits and int64 labels."""
    launches, workspace = compiled.launches(case, multiprocessors=1)
    entries = (len(case.teachers) + 1) * len(exits)
    memory = {place: bytearray(size) for place, size in ((WORKSPACE, workspace), (LOSSES, 4 * entries), (TOTAL, 4))}
    memory[LABELS] = bytearray(labels.numpy().tobytes())
    for e, z in enumerate(exits):
        memory[EXITS + e] = bytearray(z.view(torch.uint8).numpy().tobytes())
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
    gradients = [torch.frombuffer(memory[GRADS + e], dtype=z.dtype).view(z.shape) for e, z in enumerate(exits)]
    return losses, struct.unpack("<f", memory[TOTAL])[0], gradients
