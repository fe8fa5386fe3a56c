"""Installs the package, without a network, into a folder of its own: `python -m on_gpu.install SITE`.

The wheel in wheels/ is taken where it was built from these sources and its kernels load here; else the sources are
built. What else the stages need, and this Python lacks, comes from wheels/, too. `--pack` fills that folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import REHEARSAL, ROOT, emit, say

WHEELS = ROOT / "wheels"
PACKED = WHEELS / "packed.json"  # of which commit and sources the wheel is
# module -> distribution: what the stages import besides torch and triton.
NEEDED = {
    "pytest": "pytest", "iniconfig": "iniconfig", "pluggy": "pluggy", "packaging": "packaging",
    "hypothesis": "hypothesis", "sortedcontainers": "sortedcontainers",
    "rich": "rich", "markdown_it": "markdown-it-py", "mdurl": "mdurl", "pygments": "pygments",
}  # fmt: skip
# Without these fewer peers are compared, or tests wait for each other; and nothing can be built.
WELCOME = {"liger_kernel": "liger-kernel", "xdist": "pytest-xdist", "execnet": "execnet", "ninja": "ninja"}
PIP = [sys.executable, "-m", "pip"]
QUIET = ["-q", "--disable-pip-version-check"]


def sources() -> str:
    """A hash of what the package is built from."""
    files = [f for folder in ("csrc", "selfreg_fast") for f in (ROOT / folder).rglob("*.*")]
    files = [f for f in files if f.suffix in (".h", ".cpp", ".cu", ".py")]  # and not what a build or an import leaves
    state = hashlib.sha256()
    for file in sorted(files + [ROOT / "setup.py", ROOT / "pyproject.toml"]):
        state.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


def packed() -> dict[str, Any]:
    """What `pack` wrote down, if it was of these sources."""
    try:
        record: dict[str, Any] = json.loads(PACKED.read_text())
    except (OSError, ValueError):
        return {}
    return record if record.get("sources") == sources() else {}


def run(command: list[str], **environment: str) -> int:
    print("+", shlex.join([*(f"{k}={v}" for k, v in environment.items()), *command]), flush=True)
    return subprocess.run(command, env={**os.environ, **environment}).returncode


def install(site: Path) -> bool:
    """Whether the package is there afterwards, with kernels that load."""
    without_network = ["--no-index", "--find-links", str(WHEELS), "--no-deps", "--target", str(site)]
    missing = [name for module, name in {**NEEDED, **WELCOME}.items() if importlib.util.find_spec(module) is None]
    if int(version("setuptools").split(".")[0]) < 77:  # to build with
        missing.append("setuptools")
    for name in missing:
        if WHEELS.is_dir() and run([*PIP, "install", *QUIET, *without_network, name]) == 0:
            say(f"{name}: from wheels/")
        else:
            say(f"{name}: missing" + (", and needed" if name in NEEDED.values() else ""))
    ways = []
    wheel = next(WHEELS.glob("selfreg_fast-*.whl"), None)
    if wheel and packed():
        ways.append((f"the wheel {wheel.name}", [*without_network, str(wheel)]))
    elif wheel:
        say(f"{wheel.name} is not of these sources: they are built")
    # Isolated, pip would ask the network for what builds; where there is no ninja, that is the only way.
    here = ["--no-build-isolation", "--no-index"] if importlib.util.find_spec("ninja") else []
    ways.append(("built from the sources", [*here, "--no-deps", "--target", str(site), str(ROOT)]))
    for name, arguments in ways:
        cuda = "0" if REHEARSAL else "1"
        variables = {"SELFREG_FAST_BUILD": "1", "SELFREG_FAST_CUDA": cuda, "PYTHONPATH": _path(site)}
        variables["SELFREG_FAST_CUDA_ON_HOST"] = ""  # a rehearsal's: the build tries its own kernels
        if run([*PIP, "install", *QUIET, "--upgrade", "--no-compile", *arguments], **variables) == 0 and loads(site):
            say(f"installed: {name}")
            return True
        say(f"{name}: not installed, or its kernels do not load here")
    return False


def loads(site: Path) -> bool:
    """Whether the kernels of the package in `site` do."""
    code = "import json, selfreg_fast; print(json.dumps(selfreg_fast.backends()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site,
        env={**os.environ, "PYTHONPATH": _path(site)},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr, sep="", flush=True)
    states = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    for name in ("cpu", "cuda"):
        if states.get(name) != "available":
            say(f"{name}: {states.get(name, 'importing selfreg_fast failed')}")
    return states.get("cpu") == states.get("cuda") == "available"


def _path(site: Path) -> str:
    return os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))


def pack(arch: str = "9.0") -> int:
    """Fills wheels/: the package for GPUs of compute capability `arch`, and what a Python 3.12 may lack."""
    variables = {"SELFREG_FAST_BUILD": "1", "SELFREG_FAST_CUDA": "1", "SELFREG_FAST_CUDA_ARCHS": arch}
    there = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    there += [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "_2_12", "2010", "1")]
    names = [*NEEDED.values(), *WELCOME.values(), "setuptools"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not commit or changed:
        print(f"what is measured has to be of a commit: commit first\n{changed}")
        return 1
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*"):
        old.unlink()
    if run([*PIP, "wheel", *QUIET, "--no-deps", "--wheel-dir", str(WHEELS), str(ROOT)], **variables):
        return 1
    if run([*PIP, "download", *QUIET, "--no-deps", *there, "--dest", str(WHEELS), *names]):
        return 1
    PACKED.write_text(json.dumps({"commit": commit, "dirty": False, "arch": arch, "sources": sources()}) + "\n")
    size = sum(file.stat().st_size for file in WHEELS.iterdir())
    print(f"wheels/: {size / 2**20:.1f} MiB; carry it with the checkout")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--pack":
        raise SystemExit(pack(*sys.argv[2:]))
    installed = install(Path(sys.argv[1]))
    emit("check", name="installation", passed=installed)
    raise SystemExit(not installed)
