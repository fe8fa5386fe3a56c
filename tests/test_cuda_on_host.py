"""The engine that runs CUDA kernels on the CPU (cuda_on_host/): right kernels pass, wrong ones are found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import on_host
import pytest

FOLDER = Path(__file__).parent / "cuda_on_host"
FLAGS = {
    "plain": [],
    "ucontext": ["-DCUDA_ON_HOST_UCONTEXT"],  # as on other processors
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
PRELOAD = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}
RACE, DEADLOCK = "ThreadSanitizer: data race", "deadlock or divergent barrier"
# What each wrong kernel must be reported as, by mode, or in every mode ("any").
REPORTS = {
    "race_in_block": ("thread", RACE),
    "race_in_warp": ("thread", RACE),
    "race_between_barriers": ("thread", RACE),
    "race_of_blocks": ("thread", RACE),
    "overrun": ("address", "heap-buffer-overflow"),
    "overrun_static": ("address", "with insufficient space"),
    "misaligned": ("any", "misaligned address"),
    "divergent_barrier": ("any", DEADLOCK),
    "barrier_of_some": ("any", DEADLOCK),
    "wrong_mask": ("any", "a lane that is not in its mask"),
    "different_masks": ("any", DEADLOCK),
}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = {"OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [*on_host.same_places(), *map(str, command)],
        env={**os.environ, **options, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(mode: str, folder: Path) -> Callable[..., Path]:
    """Compiles the self-test; the function links it as a program, or with "-shared" as a library."""
    (folder / "none.cpp").write_text("int main() {}")
    tried = run("g++", *FLAGS[mode], folder / "none.cpp", "-o", folder / "none")
    if tried.returncode or run(folder / "none").returncode:
        pytest.skip(f"g++ makes no programs here with {FLAGS[mode]}")
    flags = [*FLAGS[mode], "-std=c++17", "-O1", "-g", "-Wall", "-Werror", "-fPIC", "-fvisibility=hidden", f"-I{FOLDER}"]
    for name in ("self_test.cpp", "cuda_on_host.cpp"):
        compiled = run("g++", "-x", "c++", *flags, "-c", FOLDER / name, "-o", folder / f"{name}.o")
        assert compiled.returncode == 0, compiled.stderr

    def link(*how: str) -> Path:
        linked = run("g++", *FLAGS[mode], *how, *folder.glob("*.o"), "-pthread", "-o", folder / "out")
        assert linked.returncode == 0, linked.stderr
        return folder / "out"

    return link


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("mode", FLAGS)
def test_right_kernels_pass_and_wrong_ones_are_found(mode: str, tmp_path: Path) -> None:
    """In a program; and in a library beside Python and torch, where a sanitizer's own library must be loaded first."""
    link = build(mode, tmp_path)
    program = link()
    ran = run(program, "good")
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    for name, (where, report) in REPORTS.items():
        if where in (mode, "any"):
            ran = run(program, name)
            assert ran.returncode != 0 and report in ran.stderr, (name, ran.stderr)

    if mode not in PRELOAD:
        return
    found = [run("g++", f"-print-file-name={library}").stdout.strip() for library in PRELOAD[mode]]
    code = f"import ctypes, torch; torch.ones(9).sum(); ctypes.CDLL({str(link('-shared'))!r}).self_test()"
    ran = run(sys.executable, "-c", code, LD_PRELOAD=":".join(found))
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
