"""`selfreg-fast info`: what is installed, and what of it works on this machine. Text or JSON, with torch alone."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import AVAILABLE, CPU_KERNELS, backends, build_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object, for programs")


def run(args: argparse.Namespace) -> int:
    """Prints everything a report of a problem should contain."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_text(facts)
    return 0


def collect() -> dict[str, Any]:
    """All that is shown, as it becomes JSON. Keys are the same on every machine; what there is not is None, or empty.

    Only the keys of "build", the installation's record, are as the installed version wrote them; and those of
    "environment" are the variables' names.
    """
    return {
        "path": str(Path(__file__).parents[1]),
        "versions": {
            "selfreg_fast": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "python_implementation": platform.python_implementation(),
            "system": platform.platform(),
        },
        "devices": {"cpu": _cpu(), "gpus": _gpus()},
        "backends": {
            name: {"available": state == AVAILABLE, "reason": None if state == AVAILABLE else state}
            for name, state in backends().items()
        },
        "build": build_record() or None,
        # A variable that is empty counts as unset.
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("SELFREG_FAST_") and v},
    }


def _cpu() -> dict[str, Any]:
    """The CPU, as torch and as the kernels use it."""
    return {
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instructions": torch.ops.selfreg_fast.isa() if CPU_KERNELS else None,
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _gpus() -> list[dict[str, Any]]:
    """The GPUs that torch can use: where the driver is too old for it, it counts some that it cannot ask."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = map(torch.cuda.get_device_properties, range(count))
    return [{"name": gpu.name, "arch": f"sm_{gpu.major}{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in found]


def cpu_name() -> str:
    """The processor's name as it calls itself, or its architecture where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _print_text(facts: Mapping[str, Any]) -> None:
    """A section for each kind of fact."""
    versions, cpu, gpus = facts["versions"], facts["devices"]["cpu"], facts["devices"]["gpus"]
    devices = {"cpu": f"{cpu['name']}, {cpu['threads']} threads of {cpu['cores']} cores"}
    if cpu["instructions"]:
        devices["instructions"] = f"{cpu['instructions']} (torch: {cpu['torch_instructions']})"
    if not gpus:
        devices["cuda"] = "none" if versions["cuda"] else "none: this torch was built without CUDA"
    for i, gpu in enumerate(gpus):
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        devices[f"cuda:{i}"] = f"{gpu['name']}, {gpu['arch']}, {memory}, CUDA {versions['cuda']}"
    build = facts["build"] or {"_build.json": "not there: this copy was not installed"}
    sections = {
        "versions": {
            "selfreg_fast": f"{versions['selfreg_fast']} in {facts['path']}",
            "torch": versions["torch"],
            "python": f"{versions['python']} ({versions['python_implementation']})",
            "system": versions["system"],
        },
        "devices": devices,
        "backends": {name: state["reason"] or AVAILABLE for name, state in facts["backends"].items()},
        "build": {k: (", ".join(v) if isinstance(v, list) else v) or "none" for k, v in build.items()},
        "environment": facts["environment"] or {"SELFREG_FAST_*": "none is set"},
    }
    for title, rows in sections.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<16} {value}")
