"""What a build finds on a machine, and makes of it (csrc/toolchain.py). Whole installations: matrix.py."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CSRC = Path(__file__).parents[1] / "csrc"
FOUND = """
import json
from toolchain import ARCHS, LEFT_OUT, NVCC_FLAGS, TORCH, WHY_NOT_CUDA, gencode, jobs
print(json.dumps([ARCHS, LEFT_OUT, WHY_NOT_CUDA, TORCH and str(TORCH.folder), NVCC_FLAGS, gencode(ARCHS), jobs()]))
"""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are built on Linux only")


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def torch_in(folder: Path, cuda: str | None = "13.0", version: str = "2.10.0a0+nv") -> Path:
    """A directory that holds a torch, as far as a build looks at it."""
    (folder / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\ncuda = {cuda!r}\n")
    return folder


def look(machine: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What is found on a machine with the compilers of CUDA 13 and g++, and the programs in machine/bin."""
    known = "|".join(f"*sm_{n}\\ *" for n in ("75", "80", "86", "90", "90a", "100", "120"))
    program(machine / "cuda/bin/nvcc", f'case "$* " in *--dryrun*) case "$* " in {known}) ;; *) exit 1; esac; esac')
    program(machine / "bin/g++", "")
    variables = {"PATH": f"{machine}/bin:/usr/bin:/bin", "CUDA_HOME": f"{machine}/cuda", "PYTHONPATH": str(CSRC)}
    command = [sys.executable, "-c", FOUND]
    return subprocess.run(command, env={**variables, **environment}, cwd=machine, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("asked_for", "archs", "left_out"),
    [
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["8.0", "8.6", "9.0", "10.0", "12.0+PTX"], "7.5 (older than 8.0)"),
        ("9.0a;10.3f, 12.0", ["9.0a", "12.0"], "10.3f (unknown to nvcc ?)"),
        ("7.0;7.5+PTX", [], "7.0 (older than 8.0), 7.5+PTX (older than 8.0)"),
        (" ; ", ["8.0", "9.0", "10.0", "12.0+PTX"], ""),
        ("Turing;Ampere+PTX", ["8.0", "8.6+PTX"], "7.5 (older than 8.0)"),
        ("8.0a 9.0", ["9.0"], "8.0a (unknown to nvcc ?)"),
    ],
)
def test_what_cannot_be_built_is_left_out(tmp_path: Path, asked_for: str, archs: list[str], left_out: str) -> None:
    torch = torch_in(tmp_path / "site")
    done = look(tmp_path, SELFREG_FAST_TORCH=str(torch), TORCH_CUDA_ARCH_LIST=asked_for)
    found = json.loads(done.stdout)
    assert found[:2] == [archs, left_out] and found[3] == str(torch / "torch")
    assert found[2] == (None if archs else f"not built: none of the GPU architectures is supported: {left_out}")


def test_the_gpus_here(tmp_path: Path) -> None:
    """Those that are too old are left out. Where nothing else is, there are no CUDA kernels, or an error."""
    torch = {"SELFREG_FAST_TORCH": str(torch_in(tmp_path / "site") / "torch")}
    program(tmp_path / "bin/nvidia-smi", "echo 7.5; echo 8.6; echo 8.6")
    assert json.loads(look(tmp_path, **torch).stdout)[:3] == [["8.6"], "7.5 (older than 8.0)", None]
    program(tmp_path / "bin/nvidia-smi", "echo 7.5")
    assert json.loads(look(tmp_path, **torch).stdout)[0] == []
    done = look(tmp_path, SELFREG_FAST_CUDA="1", **torch)
    assert done.returncode and done.stderr.startswith("SELFREG_FAST_CUDA=1, but not built: none of the GPU")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TORCH_CUDA_ARCH_LIST", "sm_90", "expected a list like '8.0;9.0+PTX', got 'sm_90' in it"),
        ("SELFREG_FAST_CUDA", "yes", "SELFREG_FAST_CUDA: expected 0, 1 or nothing, got 'yes'"),
        ("SELFREG_FAST_TORCH", "/nowhere", "SELFREG_FAST_TORCH=/nowhere: there is no torch >= 2.10 in it"),
        ("CXX", "no-such-compiler", "CXX=no-such-compiler: no such compiler"),
        ("CXX", "'g++", "CXX='g++: No closing quotation"),
        ("MAX_JOBS", "0", "MAX_JOBS: expected a number, got '0'"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str, value: str, said: str) -> None:
    done = look(tmp_path, **{"SELFREG_FAST_TORCH": str(torch_in(tmp_path / "site")), variable: value})
    assert done.returncode and said in done.stderr


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, []),
        ({"CXX": "g++"}, ["-ccbin", "g++"]),
        ({"CXX": "ccache g++ -m64"}, ["-ccbin", "g++"]),
        ({"CXX": "g++", "NVCC_CCBIN": "clang++"}, ["-ccbin", "clang++"]),
        ({"CXX": "g++", "NVCC_PREPEND_FLAGS": "-ccbin=clang++"}, ["-ccbin=clang++"]),
        ({"NVCC_APPEND_FLAGS": "--use_fast_math -lineinfo -use_fast_math"}, ["-lineinfo"]),
    ],
)
def test_flags_for_nvcc(tmp_path: Path, variables: dict[str, str], flags: list[str]) -> None:
    """Its host compiler is the one that was asked for; the arithmetic is not the user's."""
    program(tmp_path / "bin/ccache", "")
    done = look(tmp_path, SELFREG_FAST_TORCH=str(torch_in(tmp_path / "site")), **variables)
    found = json.loads(done.stdout)
    assert found[4] == flags
    codes = [(n, f"sm_{n}") for n in (80, 90, 100, 120)] + [(120, "compute_120")]
    assert found[5] == [word for n, code in codes for word in ("-gencode", f"arch=compute_{n},code={code}")]


def test_an_architecture_is_nothing_to_a_build_without_cuda(tmp_path: Path) -> None:
    torch = torch_in(tmp_path / "site", cuda=None)
    done = look(tmp_path, SELFREG_FAST_TORCH=str(torch), TORCH_CUDA_ARCH_LIST="anything")
    assert "has no CUDA" in json.loads(done.stdout)[2]


def test_the_torch_of_nvidias_images_is_new_enough() -> None:
    needed = [Requirement(text) for text in requires("selfreg_fast") or [] if text.startswith("torch")]
    assert len(needed) == 1
    assert "2.10.0a0+b4e4ee81d3.nv25.12" in needed[0].specifier and "2.15.0" in needed[0].specifier
    assert "2.9.1" not in needed[0].specifier


@pytest.mark.parametrize("place", ["activated", "beside", "above"])
def test_the_torch_of_the_caller_is_found(tmp_path: Path, place: str) -> None:
    """By a build in an environment of its own, as uv makes it: on PATH, or in a .venv where the caller is, or above."""
    packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    environment = tmp_path / ("environment" if place == "activated" else ".venv")
    torch = torch_in(environment / packages)
    (tmp_path / "project").mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "build")], check=True)
    (tmp_path / "build" / packages / "setuptools").mkdir()
    (tmp_path / "build" / packages / "setuptools/__init__.py").touch()
    path = f"{environment}/bin:/usr/bin" if place == "activated" else "/usr/bin"
    done = subprocess.run(
        [str(tmp_path / "build/bin/python"), "-c", FOUND],
        env={"PYTHONPATH": str(CSRC), "PATH": path, "PWD": str(tmp_path / ("project" if place == "above" else ""))},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)[3] == str(torch / "torch"), done.stderr
