"""The CUDA kernels without a GPU: they compile without spills, their machine code computes the losses, and sanitizers
find nothing in them on the CPU."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import machine_code
import on_host
import pytest
from machine_code import Case, Compiled

from benchmarks.counted.__main__ import MAIN
from benchmarks.counted.kernels import GPUS, Gpu

NVCC = shutil.which("nvcc")
# One front end for both architectures: the second line is the PTX that newer GPUs compile for themselves.
ARCHS = ["-gencode", "arch=compute_80,code=[sm_80,sm_90,compute_80]"]
UNITS = [("launch.cu", [])] + [("exit_loss.cu", [f"-DSELFREG_STORAGE={s}"]) for s in on_host.STORAGE_TYPES]
STORAGE = {"0": "float", "1": "double", "2": "half", "3": "bfloat16"}


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_kernels_compile_and_compute(tmp_path: Path) -> None:
    """Every kernel for sm_80 and sm_90: registers are printed, nothing goes to local memory. And what has been compiled
    for sm_90 in float32 is executed, instruction by instruction."""

    def compile_one(unit: tuple[str, list[str]]) -> str:
        name, defines = unit
        output = tmp_path / f"{name}{''.join(defines)}.fatbin"
        command = [NVCC, "-std=c++17", "-O3", *ARCHS, "-Xptxas", "-v", *defines, "-fatbin", name, "-o", str(output)]
        done = subprocess.run(command, cwd=on_host.SOURCES, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert output.stat().st_size > 0
        return done.stderr

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reports = list(pool.map(compile_one, UNITS))
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.S,
    )
    table, spilling = [], []
    for (_, defines), report in zip(UNITS, reports, strict=True):
        found = entry.findall(report)
        assert {arch for _, arch, *_ in found} == {"sm_80", "sm_90"}
        for kernel, arch, stack, stores, loads, registers in found:
            table.append(f"{arch} {STORAGE[defines[0][-1]] if defines else '':9} {_shape(kernel):60} {registers:>4}")
            if (stack, stores, loads) != ("0", "0", "0"):
                spilling.append(f"{table[-1]}, {stack} bytes of stack, {stores} + {loads} bytes of spills")
    print("\n".join(table))
    assert len(table) > 2 * 100
    assert not spilling, "\n".join(spilling)

    for name, unit in (("exit_loss", UNITS[1]), ("launch", UNITS[0])):
        (tmp_path / f"{unit[0]}{''.join(unit[1])}.fatbin").rename(tmp_path / f"{name}.cubin")
    compiled = Compiled("float32", tmp_path)
    for case in MACHINE_CODE:
        machine_code.check(case, partial(machine_code.of_cuda, compiled, case))
    for gpu, case in itertools.product(GPUS, SHAPES):
        warps = _resident_warps(compiled, case, gpu)
        assert warps >= FEW_WARPS[gpu].get(case.name, 8), (gpu, case.name, warps)


def _resident_warps(compiled: Compiled, case: Case, gpu: Gpu) -> int:
    """Of the main kernel, on a multiprocessor."""
    launches, _ = compiled.launches(case, 100, gpu)
    (main,) = (launch for launch in launches if MAIN.search(launch.kernel.symbol))
    return main.resident_blocks(gpu) * main.block[0] * main.block[1] // 32


# Twenty-one classes, five exits, two teachers; each layout and kind of kernel.
_VOC = (8, 21, 512, 512)
SHAPES = (
    Case("planes", _VOC, ((512, 512),) * 5, (0, 4)),
    Case("planes, odd", (8, 21, 321, 321), ((321, 321),) * 5, (0, 4)),
    Case("staged", _VOC, ((512, 512),) * 5, (0, 4), channels_last=True),
    Case("warps", (8, 150, 512, 512), ((512, 512),) * 5, (0, 4)),
    Case("lanes", (8, 150, 512, 512), ((512, 512),) * 5, (0, 4), channels_last=True),
    *(Case(f"1/{n}", _VOC, ((512 // n, 512 // n),) * 5, (0, 4)) for n in (2, 4, 8, 16)),
    Case("mixed", _VOC, ((64, 64),) * 4 + ((512, 512),), (0, 4)),
    Case("larger", _VOC, ((64, 64),) * 4 + ((1024, 1024),), (0, 4)),
)
# What has fewer than eight. Small exits keep the rows that tiles still add to in shared memory, for every target and
# exit, as wide as the exit under a strip: the finer an exit, the more. Of 150 channels on five warps, there is room for
# one block.
FEW_WARPS: dict[Gpu, dict[str, int]] = {
    GPUS[0]: {"warps": 5, "1/2": 2, "1/4": 4, "1/8": 4, "1/16": 6, "mixed": 4},
    GPUS[1]: {"1/2": 4, "1/4": 6},
    GPUS[2]: {"1/2": 4},
}


# A tile and a part of one; a pixel a thread, over lanes, over warps; resized, all smaller, beside one of the output's
# size, or larger; and what most launches do without.
MACHINE_CODE = (
    Case("planes", (2, 21, 8, 32), ((8, 32),) * 3, (0, 2)),
    Case("staged", (1, 21, 7, 19), ((7, 19),) * 2, (1,), channels_last=True),
    Case("lanes", (1, 40, 4, 9), ((4, 9),) * 2, (0,), channels_last=True),
    Case("warps", (1, 150, 3, 11), ((3, 11),) * 3, (2,)),
    Case("mixed", (1, 21, 12, 20), ((6, 10), (3, 5), (12, 20)), (0, 2)),
    Case("smaller", (1, 21, 14, 20), ((6, 10), (3, 5), (6, 10)), (0, 2)),
    Case("smaller, warps", (1, 40, 9, 20), ((3, 5),) * 2, (1,)),
    Case("larger", (1, 5, 6, 10), ((6, 10), (9, 21)), (0, 1)),
    Case("two rates", (1, 19, 4, 16), ((4, 16),) * 2, (1,), target="renormalized", label_smoothing=0.1),
    Case("two rates, mixed", (1, 19, 6, 8), ((3, 4), (6, 8)), (0, 1), target="renormalized", label_smoothing=0.1),
    Case("argmax", (1, 9, 4, 16), ((4, 16),) * 2, (0, 1), target="argmax"),
    Case("argmax, mixed", (1, 12, 6, 8), ((3, 4), (6, 8)), (0, 1), target="argmax"),
)


def _shape(kernel: str) -> str:
    """The name of a kernel and its template arguments, as they are mangled."""
    named = re.search(r"\d(\w+?)_kernelI(.*?)EEvNS", kernel)
    if named is None:
        return kernel[-60:]
    arguments = re.search(r"(Planes|Staged|Lanes|SmallShape)I\w+?((?:L[ib]\d+E)+)", named[2])
    if arguments is None:
        return named[1]
    return " ".join([named[1], arguments[1], *re.findall(r"L[ib](\d+)E", arguments[2])])


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_sanitizers_find_nothing(mode: str) -> None:
    """Every number of channels and layout, aligned in float32 and odd in bfloat16; exits that are resized: accesses out
    of bounds, races."""
    few = "cuda and (every_way and (aligned and float32 or odd and bfloat16) or every_number or masked)"
    # In tests/, since `-m` puts the working directory on sys.path: from the root it would import ./selfreg_fast, which
    # has no kernels where the package is installed and not editable.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", few]
    files = ("test_kernel_shapes.py", "test_resize.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [*on_host.same_places(), *command, *(str(Path(__file__).with_name(f)) for f in files)],
        env={**environment, **on_host.environment(mode)},
        cwd=on_host.ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=1800,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    assert "Sanitizer" not in said and "runtime error" not in said, said[-8000:]
    assert re.search(r"\b1\d\d passed", said), said[-2000:]
