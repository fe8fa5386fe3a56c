"""`selfreg-fast info`: what is installed, and what of it works on this machine. Plain text, with torch alone."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import __version__
from ..backends import CPU_KERNELS, backends, build_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(args: argparse.Namespace) -> int:
    """Prints everything a report of a problem should contain."""
    _section("versions", versions())
    _section("devices", devices())
    _section("backends", backends())
    record = {key: ", ".join(value) if isinstance(value, list) else value for key, value in build_record().items()}
    _section("build", record or {"_build.json": "not there: this copy was not installed"})
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("SELFREG_FAST_") and v}  # empty: unset
    _section("environment", variables or {"SELFREG_FAST_*": "none is set"})
    return 0


def versions() -> dict[str, str]:
    """The package, and what it runs on."""
    return {
        "selfreg_fast": f"{__version__} in {Path(__file__).parents[1]}",
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
    }


def devices() -> dict[str, str]:
    """The CPU, as torch and as the kernels use it, and the GPUs that torch sees."""
    found = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"}
    if CPU_KERNELS:
        found["instructions"] = f"{torch.ops.selfreg_fast.isa()} (torch: {torch.backends.cpu.get_cpu_capability()})"
    if not torch.cuda.is_available():
        found["cuda"] = "none" if torch.version.cuda else "none: this torch was built without CUDA"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    return found


def cpu_name() -> str:
    """The processor's name as it calls itself, or its architecture where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _section(title: str, rows: Mapping[str, object]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<16} {value}")
