"""The CUDA kernels without a GPU: they compile without spills, their machine code computes the losses, and sanitizers
find nothing in them on the CPU."""

from __future__ import annotations

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
    assert len(table) > 2 * 60
    assert not spilling, "\n".join(spilling)

    for name, unit in (("exit_loss", UNITS[1]), ("launch", UNITS[0])):
        (tmp_path / f"{unit[0]}{''.join(unit[1])}.fatbin").rename(tmp_path / f"{name}.cubin")
    compiled = Compiled("float32", tmp_path)
    for case in MACHINE_CODE:
        machine_code.check(case, partial(machine_code.of_cuda, compiled, case))


# A tile and a part of one; a pixel a thread, over lanes, over warps; resized, all smaller or not.
MACHINE_CODE = (
    Case("planes", (2, 21, 8, 32), ((8, 32),) * 3, (0, 2)),
    Case("staged", (1, 21, 7, 19), ((7, 19),) * 2, (1,), channels_last=True),
    Case("lanes", (1, 40, 4, 9), ((4, 9),) * 2, (0,), channels_last=True),
    Case("warps", (1, 150, 3, 11), ((3, 11),) * 3, (2,)),
    Case("resized", (1, 21, 12, 20), ((6, 10), (3, 5), (12, 20)), (0, 2)),
    Case("smaller", (1, 21, 14, 20), ((6, 10), (3, 5), (6, 10)), (0, 2)),
    Case("smaller, warps", (1, 40, 9, 20), ((3, 5),) * 2, (1,)),
)


def _shape(kernel: str) -> str:
    """The name of a kernel, or the template arguments of the main one, as they are mangled."""
    shape = re.search(r"ShapeILNS_6LayoutE(\d)ELi(\d+)ELi(\d+)ELi(\d+)ELb(\d)ELb(\d)EE", kernel)
    if small := re.search(r"SmallShapeI\w+?Li(\d+)ELb(\d)E", kernel):
        return f"small exits, K {small[1]}{', warps' if small[2] == '1' else ''}"
    if shape is None:
        return kernel[-60:]
    layout = ("planes", "staged", "lanes", "resized")[int(shape[1])]
    kind = "plain" if shape[6] == "1" else "whole" if shape[5] == "1" else "block by block"
    return f"{layout}, K {shape[2]}, V {shape[3]}, lanes {shape[4]}, {kind}"


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
