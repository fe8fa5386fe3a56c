"""The CUDA kernels, compiled for sm_90, and what they are launched with for a case."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import sass

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
SHIM = ROOT / "tests" / "cuda_on_host"
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # csrc/exit_loss.h
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
EXITS, GRADS, LABELS, WORKSPACE, LOSSES, TOTAL = 1, 64, 128, 129, 130, 131  # places of launches.cpp, in units of UNIT
UNIT = 1 << 36


@dataclass(frozen=True)
class Case:
    """An objective on exits of sizes[e] = (h, w), resized to (H, W): its weights are 0.8 for labels, 1 for teachers."""

    name: str
    shape: tuple[int, int, int, int]  # (B, C, H, W)
    sizes: tuple[tuple[int, int], ...]
    teachers: tuple[int, ...]
    labels: bool = True
    channels_last: bool = False
    temperature: float = 2.0
    target: str = "raw"  # or "renormalized", "argmax"
    label_smoothing: float = 0.0


class Gpu(NamedTuple):
    """What a multiprocessor has (CUDA C++ programming guide, technical specifications per compute capability)."""

    archs: str
    shared_kilobytes: int
    warps: int


SM_90 = Gpu("sm_90, sm_100", 228, 64)
GPUS = (Gpu("sm_86, sm_89, sm_120", 100, 48), Gpu("sm_80", 164, 64), SM_90)


class Launch(NamedTuple):
    kernel: sass.Kernel
    grid: tuple[int, ...]
    block: tuple[int, int]
    shared_bytes: int
    parameters: bytes

    def resident_blocks(self, gpu: Gpu = SM_90) -> int:
        """How many a multiprocessor runs at a time; all have 65,536 registers."""
        warps, registers = self.block[0] * self.block[1] // 32, (self.kernel.registers + 7) // 8 * 8
        by_shared_memory = (gpu.shared_kilobytes << 10) // (self.shared_bytes + 1024)
        return min(65536 // (registers * 32) // warps, by_shared_memory, gpu.warps // warps, gpu.warps // 2)


def key(symbol: str) -> str | None:
    """What names a kernel whichever compiler made its symbol."""
    shape = re.search(r"_kernelI.*?((?:Planes|Staged|Lanes|SmallShape)I\w+?)E+vNS", symbol)
    other = re.search(r"((?:blockwise|count|finish|join|peak|combine)_kernelI\w*?E)EvNS", symbol)
    return shape[1] if shape else other[1] if other else None


def sources() -> str:
    """A hash of what the kernels and their launches are made of."""
    files = sorted(f for folder in (ROOT / "csrc", SHIM, Path(__file__).parent) for f in folder.rglob("*.[ch]*"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def printed(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join(command) + "\n" + done.stderr)
    return done.stdout


class Compiled:
    """The backend for one dtype: cubins of its kernels, and the program that says what is launched."""

    def __init__(self, dtype: str, folder: Path) -> None:
        """Builds what is not in the folder yet: exit_loss.cubin, launch.cubin (or fatbins of these names), launches."""
        self.dtype, self.folder = dtype, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._build()
        self.kernels: dict[str, sass.Kernel] = {}
        for cubin in ("exit_loss", "launch"):
            self.kernels |= sass.read(folder / f"{cubin}.cubin", key)
        symbols = printed(["nm", str(folder / "launches")])
        self.symbols = {int(at, 16): key(name) for at, name in re.findall(r"^([0-9a-f]+) \w (\S+)$", symbols, re.M)}
        lines = [f"{at:x} {self.kernels[k].registers}" for at, k in self.symbols.items() if k in self.kernels]
        (folder / "registers").write_text("\n".join(lines))

    def _build(self) -> None:
        storage = f"-DSELFREG_STORAGE={DTYPES[self.dtype]}"
        nvcc = [shutil.which("nvcc") or "nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-cubin"]
        host = ["g++", "-std=c++17", "-O0", "-no-pie", "-DSELFREG_CUDA_ON_HOST", f"-I{SHIM}", f"-I{SOURCES}"]
        kernels, launch = (str(SOURCES / name) for name in ("exit_loss.cu", "launch.cu"))
        main, others = str(Path(__file__).with_name("launches.cpp")), self.folder / "others.cpp"
        # Nothing of the other dtypes is ever launched.
        accumulators = {"float": "float", "double": "double", "__half": "float", "__nv_bfloat16": "float"}
        types = [t for n, t in enumerate(accumulators) if n != DTYPES[self.dtype]]
        stub = "template <> Planned plan_exit_loss<{0}>(Planner&, const Request<{1}>&) {{ abort(); }}\n"
        stubs = "".join(stub.format(t, accumulators[t]) for t in types)
        others.write_text(f'#include "device.h"\n#include "planning.h"\nnamespace selfreg {{\n{stubs}}}\n')
        jobs = {
            "exit_loss.cubin": [*nvcc, storage, kernels],
            "exit_loss.o": [*host, storage, "-c", "-x", "c++", kernels],
            "launch.cubin": [*nvcc, launch],
            "launch.o": [*host, "-c", "-x", "c++", launch],
            "main.o": [*host, "-c", main],
            "others.o": [*host, "-c", str(others)],
        }

        def build(name: str) -> None:
            part = self.folder / f"part-{name}"
            printed([*jobs[name], "-o", str(part)])
            part.replace(self.folder / name)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(build, [name for name in jobs if not (self.folder / name).exists()]))
        objects = [str(self.folder / name) for name in jobs if name.endswith(".o")]
        jobs["launches"] = [*host, *objects]
        if not (self.folder / "launches").exists():
            build("launches")

    def launches(self, case: Case, multiprocessors: int, gpu: Gpu = SM_90) -> tuple[list[Launch], int]:
        """In their order; and the bytes of the workspace."""
        numbers: list[float] = [multiprocessors, gpu.shared_kilobytes, gpu.warps, DTYPES[self.dtype]]
        numbers += [int(case.channels_last), int(case.labels), case.temperature]
        numbers += [("raw", "renormalized", "argmax").index(case.target), case.label_smoothing]
        numbers += [*case.shape, len(case.sizes), *(x for size in case.sizes for x in size)]
        numbers += [len(case.teachers), *case.teachers, 0.8, 1.0]
        command = [str(self.folder / "launches"), str(self.folder / "registers"), *map(str, numbers)]
        workspace, *lines = printed(command).splitlines()
        found = []
        for line in lines:
            at, *sizes, parameters = line.split()
            gx, gy, bx, by, shared = map(int, sizes)
            kernel = self.kernels[self.symbols[int(at, 16)] or ""]
            found.append(Launch(kernel, (gx, gy), (bx, by), shared, bytes.fromhex(parameters)))
        return found, int(workspace)
