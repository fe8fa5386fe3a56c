"""The CPU kernels under sanitizers: launched without torch (cpu_without_torch/), for its threads and its allocator are
strangers to them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import on_host
import pytest

FOLDER = on_host.ROOT / "tests" / "cpu_without_torch"
KERNELS = on_host.ROOT / "csrc/cpu"
MODES = {
    "address": "-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined",  # -O1 compiles three times as long
    "thread": "-O1 -fsanitize=thread",
}
FOUND = {"address": ("overrun", "heap-buffer-overflow"), "thread": ("race", "data race")}
# As setup.py compiles them.
ISAS = {"baseline": ""}
if platform.machine() == "x86_64":
    ISAS["avx2"] = "-mavx2 -mfma -mf16c -mbmi2"
    ISAS["avx512"] = "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c -mbmi2 -mprefer-vector-width=512"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    begin = [*on_host.same_places(), "env", *(f"{k}={v}" for k, v in environment.items())]
    return subprocess.run([*begin, *map(str, command)], capture_output=True, text=True, timeout=1800)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("mode", MODES)
def test_sanitizers_find_nothing(mode: str, tmp_path: Path) -> None:
    """Of random launches, with any instruction set that this machine has; four threads leave the bits that one does.

    Races only with one of them: what threads share does not depend on it.
    """
    isas = ISAS if mode == "address" else {"baseline": ""}
    flags = ["-std=c++17", *MODES[mode].split(), "-g1", "-fopenmp-simd", "-Wno-psabi"]
    flags += [f"-I{FOLDER}", f"-I{KERNELS.parent}"]
    flags += ["-DSELFREG_X86_ISAS=1"] if len(isas) > 1 else []
    (tmp_path / "none.cpp").write_text("int main() {}")
    tried = run("g++", *flags, tmp_path / "none.cpp", "-o", tmp_path / "none")
    if tried.returncode or run(tmp_path / "none").returncode:
        pytest.skip(f"g++ makes no programs here with {MODES[mode]}")
    units: list[tuple[Path, list[str]]] = [(FOLDER / "launches.cpp", []), (KERNELS / "launch.cpp", [])]
    files = [file for file in KERNELS.glob("*.cpp") if file.name != "launch.cpp"]
    for isa, options in isas.items():
        units = [(file, [f"-DSELFREG_ISA={isa}", *options.split()]) for file in files] + units

    def compile_one(i: int) -> None:
        source, options = units[i]
        done = run("g++", *flags, *options, "-c", source, "-o", tmp_path / f"{i}.o")
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, range(len(units))))
    program = tmp_path / "launches"
    linked = run("g++", *flags, *tmp_path.glob("*.o"), "-pthread", "-o", program)
    assert linked.returncode == 0, linked.stderr

    what, report = FOUND[mode]
    ran = run(program, what)
    assert ran.returncode != 0 and report in ran.stderr, ran.stderr  # they would be found
    for isa in isas:
        ran = run(program, "150", SELFREG_FAST_ISA=isa)
        assert ran.returncode == 0 and not ran.stderr, ran.stderr[-5000:]
        print(f"{mode}: 150 launches, asked for {isa}, taken {ran.stdout.strip()}")
