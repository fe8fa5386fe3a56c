"""Counts, for one block of each case, what its warps issue; no GPU is needed. `--help` says the rest.

The CUDA kernels are compiled by nvcc, the Triton kernels by what Triton brings along.

From the counts, with the numbers of an H200, follow three times that the kernel cannot beat: `issue_ms` of the
instructions, four of which a multiprocessor issues a cycle, `shared_ms` of shared memory, where a wavefront is a cycle
(shared_memory.py; loads and stores of global memory, which go the same way, are not counted), and `memory_ms`, each
exit read and each gradient written once. All three are as if every multiprocessor were busy to the end. A launch takes
`rounds` of the blocks that are resident at a time; `tail` is by how much it is longer because the last round is not
full, nor all blocks have the same to do. The launch's other kernels, before and after, take `others_ms` of issue slots,
if all their blocks take what one in the middle does; of Triton's they are not counted.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import kernels, on_triton, sass
from .kernels import Case
from .values import to_bf16, u32, u64

# Of an H200: multiprocessors, clock under load in Hz, and what a copy reaches of its 4.8 TB/s in bytes/s. The clock and
# the copy are assumptions.
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.3e12


def _same(name: str, shape: tuple[int, int, int, int], exits: int, teachers: tuple[int, ...], **kwargs: Any) -> Case:
    return Case(name, shape, (shape[2:],) * exits, teachers, **kwargs)


def _part(
    part: int, name: str, shape: tuple[int, int, int, int], exits: int, teachers: tuple[int, ...], **kwargs: Any
) -> Case:
    return Case(name, shape, ((shape[2] // part, shape[3] // part),) * exits, teachers, **kwargs)


# Those that tests/on_gpu/counters.py measures, too, in a time that has no room for more.
CASES = (
    _same("objective, 5 exits", (8, 21, 512, 512), 5, (0, 4)),
    _same("objective, 5 exits, channels_last", (8, 21, 512, 512), 5, (0, 4), channels_last=True),
    _same("objective, 2 exits", (4, 19, 1024, 2048), 2, (0, 1)),
    _same("SR-F on features, 4 exits", (2, 256, 128, 128), 4, (0,), labels=False),
    _same("SR-L, 4 exits", (8, 150, 128, 128), 4, (3,), labels=False),
    _part(8, "objective, 5 exits of 1/8", (8, 21, 512, 512), 5, (0, 4)),
    _part(8, "objective, 3 exits of 1/8", (4, 19, 1024, 2048), 3, (0, 2)),
)
FURTHER_CASES = (
    _part(2, "objective, 5 exits of 1/2", (8, 21, 512, 512), 5, (0, 4)),
    _part(4, "objective, 5 exits of 1/4", (8, 21, 512, 512), 5, (0, 4)),
    _part(16, "objective, 5 exits of 1/16", (8, 21, 512, 512), 5, (0, 4)),
    _part(8, "objective, 5 exits of 1/8, channels_last", (8, 21, 512, 512), 5, (0, 4), channels_last=True),
    Case("objective, 4 exits of 1/8 and 1 full", (8, 21, 512, 512), ((64, 64),) * 4 + ((512, 512),), (0, 4)),
    # Of odd sizes: in planes, nothing is read two at a time.
    _same("objective, 5 exits, 321 x 321", (8, 21, 321, 321), 5, (0, 4)),
    _same("objective, 5 exits, 321 x 321, channels_last", (8, 21, 321, 321), 5, (0, 4), channels_last=True),
    _same("objective, 5 exits, 41 x 41", (8, 21, 41, 41), 5, (0, 4)),
    _same("objective, 5 exits, 81 x 81", (8, 21, 81, 81), 5, (0, 4)),
    _same("SR-F on features, 4 exits, 81 x 81", (8, 256, 81, 81), 4, (0,), labels=False),
)
MAIN = re.compile("(full_size|small_exits|blockwise)_kernel")  # of a launch's CUDA kernels, the one that is counted
TITLE = "instructions, wavefronts: of a warp, per 32 of output pixels x channels x exits; barriers: of a warp, in all"
FIELDS = (
    "commit,compiler,case,dtype,shape,exits,kernel,registers,shared_bytes,blocks,warps_per_sm,rounds,tail,"
    "instructions,wavefronts,barriers,issue_ms,shared_ms,others_ms,memory_ms,mix"
)


class Memory:
    """Numbers made up from their address: logits between -2 and 2, labels, and counts of pixels."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.itemsize = case, kernels.ITEMSIZE[dtype]
        self.loaded: dict[int, int] = {}  # bytes, by address
        self.labels: set[int] = set()

    def load(self, at: int, size: int) -> int:
        place = at // kernels.UNIT
        if place == kernels.LABELS:
            self.labels.add(at // 8)
            return (at // 8 * 2654435761 >> 8) % self.case.shape[1] if at % 8 == 0 else 0
        if place == kernels.WORKSPACE:  # a sum of phase 0
            return u64(1000.0)[at // 4 % 2]
        self.loaded[at] = size
        if self.itemsize == 4:
            return u32((at // 4 * 2654435761 >> 12 & 255) / 64 - 2)
        halves = [to_bf16(((at // 2 + k) * 2654435761 >> 12 & 255) / 64 - 2) for k in range(size // 2)]
        return halves[0] | (halves[1] << 16 if len(halves) > 1 else 0)

    def store(self, at: int, size: int, value: int) -> None:
        pass

    def elements(self) -> int:
        """Output pixels x channels x exits that were computed."""
        _, C, H, W = self.case.shape
        if all(size == (H, W) for size in self.case.sizes):
            return sum(self.loaded.values()) // self.itemsize
        return len(self.labels) * C * len(self.case.sizes)


def count(compiled: kernels.Compiled, case: Case) -> dict[str, Any]:
    launches, _ = compiled.launches(case, MULTIPROCESSORS)
    main = next(launch for launch in launches if MAIN.search(launch.kernel.symbol))
    memory = Memory(case, compiled.dtype)
    program = sass.Program(main.kernel, main.parameters, main.grid, main.block, memory.load, memory.store)
    executed = program.run((0, 0))  # none has more to do: blocks take parts in turns
    (version,) = re.findall(r"V([\d.]+)", kernels.printed(["nvcc", "--version"]))
    name = kernels.key(main.kernel.symbol)
    elements, others = memory.elements(), 0.0
    for other in launches:
        if other is not main:
            program = sass.Program(other.kernel, other.parameters, other.grid, other.block, memory.load, memory.store)
            each = sum(program.run((other.grid[0] // 2, other.grid[1] // 2)).issued.values())
            others += each * other.block[0] * other.block[1] / 32 * other.grid[0] * other.grid[1]
    row = _row(case, compiled.dtype, f"nvcc {version}", name, main, executed, elements)
    return row | {"others_ms": round(others / (4 * MULTIPROCESSORS * CLOCK) * 1e3, 4)}


def count_triton(launches: on_triton.Counted, case: Case, dtype: str) -> dict[str, Any]:
    import triton

    name, main, memory, elements = launches.launch(case, dtype)
    program = sass.Program(main.kernel, main.parameters, main.grid, main.block, memory.load, memory.store)
    executed = program.run((main.grid[0] // 2,))
    return _row(case, dtype, f"triton {triton.__version__}", name, main, executed, elements)


def rounds_of(blocks: int, resident: int) -> tuple[float, float]:
    """Of blocks, `resident` a multiprocessor: how many rounds they take, and by how much the last one adds to these."""
    resident = min(resident, -(-blocks // MULTIPROCESSORS))  # few are spread over all multiprocessors
    rounds = blocks / (resident * MULTIPROCESSORS)
    return rounds, math.ceil(rounds) / rounds


def _row(
    case: Case,
    dtype: str,
    compiler: str,
    name: str | None,
    main: kernels.Launch,
    executed: sass.Executed,
    elements: int,
) -> dict[str, Any]:
    """Of what a block has `executed` for so many `elements`, output pixels x channels x exits."""
    warps = main.block[0] * main.block[1] // 32
    per_element = warps * 32 / elements
    instructions, wavefronts = sum(executed.issued.values()) * per_element, executed.wavefronts * per_element
    B, C, H, W = case.shape
    virtual = B * C * H * W * len(case.sizes)
    cycles = virtual / 32 / MULTIPROCESSORS  # times those for 32 elements
    moved = 2 * sum(B * C * h * w for h, w in case.sizes) * kernels.ITEMSIZE[dtype]
    resident = main.resident_blocks()
    rounds, last_round = rounds_of(main.grid[0], resident)
    most_elements = elements * main.grid[0] / virtual  # of the block, over the average
    mix = {operation: round(n * per_element, 2) for operation, n in executed.issued.most_common(12)}
    return {
        "commit": kernels.printed(["git", "-C", str(kernels.ROOT), "describe", "--always", "--dirty"]).strip(),
        "compiler": compiler,
        "case": case.name,
        "dtype": dtype,
        "shape": "x".join(map(str, case.shape)),
        "exits": len(case.sizes),
        "kernel": name,
        "registers": main.kernel.registers,
        "shared_bytes": main.shared_bytes,
        "blocks": main.grid[0],
        "warps_per_sm": resident * warps,
        "rounds": round(rounds, 2),
        "tail": round(last_round * most_elements, 3),
        "instructions": round(instructions, 1),
        "wavefronts": round(wavefronts, 2),
        "barriers": round(executed.issued["BAR"]),
        "issue_ms": round(cycles * instructions / 4 / CLOCK * 1e3, 4),
        "shared_ms": round(cycles * wavefronts / CLOCK * 1e3, 4),
        "others_ms": "",
        "memory_ms": round(moved / BANDWIDTH * 1e3, 4),
        "mix": " ".join(f"{operation}:{n:g}" for operation, n in mix.items()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counted", description=__doc__)
    parser.add_argument("--cases", default="", help="those whose names contain this")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], choices=["cuda", "triton"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(kernels.DTYPES))
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    parser.add_argument("--build", type=Path, default=kernels.ROOT / "build" / "counted", help="where to compile")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 240)
    rows = []
    cases = [case for case in CASES + FURTHER_CASES if options.cases in case.name]
    triton_launches = on_triton.Counted() if "triton" in options.backends else None

    def counted(counts: Callable[[], dict[str, Any]]) -> None:
        begin = time.perf_counter()
        rows.append(row := counts())
        said = f"{row['case']}, {row['dtype']}, {row['compiler']}: {row['instructions']}"
        console.print(f"{said} ({time.perf_counter() - begin:.0f} s)")

    for dtype in options.dtypes:
        if "cuda" in options.backends:
            console.print(f"compiling {dtype}, if it has not been: some minutes")
            compiled = kernels.Compiled(dtype, options.build / f"{dtype}-{kernels.sources()}")
            for case in cases:
                counted(partial(count, compiled, case))
        if triton_launches:
            for case in cases:
                counted(partial(count_triton, triton_launches, case, dtype))
    table = Table(title=TITLE)
    fields = FIELDS.split(",")
    shown = [name for name in fields if name not in ("commit", "kernel", "mix")]
    for name in shown:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    console.print(table)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
