"""The install matrix: one wheel, and every other way to install, in fresh environments.

    python tests/matrix.py [--only NAME]... [--download] [--torch VERSION=DIR]...     (or: make matrix)

A row installs the package, and in its environment runs `info`, `gradcheck` and a part of the tests. It ends as passed,
as FAILED, or as not run, with the reason. What is downloaded (torch of other versions and for other Pythons, half a
gigabyte each, with CUDA three) comes only with --download; else there is the torch of the Python that runs this, and
those that --torch names. Status 1 where a row fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
TOOLS = ["numpy", "pytest", "hypothesis", "rich"]
FEW = "exit_loss_matrix and float32"  # of test_losses.py
ONE_ROW = "exit_loss_matrix and raw"


class Failed(Exception):
    """A row that does not do what it should."""


class NotRun(Exception):
    """A row that cannot be tried here."""


class Matrix:
    """Environments in `folder`; torch and tools are installed once for each version, and seen by path files."""

    def __init__(self, folder: Path, download: bool, torches: dict[str, str], pythons: dict[str, str]) -> None:
        self.folder, self.download, self.torches, self.pythons = folder, download, torches, pythons
        self.tree = folder / "source"
        ignored = shutil.ignore_patterns(".*", "venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build*")
        shutil.copytree(ROOT, self.tree, ignore=ignored)
        self.count = 0

    # ---- environments ----

    def packages(self, torch: str = "", python: str = HERE) -> list[str]:
        """Directories that hold torch ("": the one of this Python) and the tools."""
        if not torch and python == HERE:
            return here()
        if python not in self.pythons:
            raise NotRun(f"there is no Python {python} on PATH")
        name = torch if python == HERE else f"{torch}-{python}"
        if name in self.torches:  # the tools, where it has none, are those of this Python
            return [self.torches[name], *(self.packages() if python == HERE else ())]
        if not self.download:
            raise NotRun(f"torch {torch} for Python {python} is not here, and --download was not given")
        target = self.folder / f"torch-{torch}-{python}"
        if not target.exists():
            command = [self.pythons[python], "-m", "pip", "install", "-q", "--target", str(target), *TOOLS]
            done = run([*command, "torch" if torch == "newest" else f"torch=={torch}"])
            if done.returncode:
                shutil.rmtree(target, ignore_errors=True)
                raise NotRun(f"pip installs no torch {torch} for Python {python}: {done.stdout.strip()[-300:]}")
        return [str(target)]

    def environment(self, packages: list[str], python: str = HERE) -> Path:
        """A fresh environment that also sees `packages`; its Python."""
        self.count += 1
        folder = self.folder / f"environment{self.count}"
        expect(run([self.pythons.get(python, sys.executable), "-m", "venv", str(folder)]))
        path_file = next(folder.glob("lib/python*/site-packages")) / "torch.pth"
        path_file.write_text("\n".join(packages) + "\n")
        return folder / "bin" / "python"

    def install(self, python: Path, what: str | Path, *flags: str, **variables: str) -> str:
        packages = (next(python.parents[1].glob("lib/python*/site-packages")) / "torch.pth").read_text().split("\n")
        headers = next((p for p in packages if Path(p, "torch").is_dir()), "")
        variables = {"SELFREG_FAST_TORCH": headers, **variables}
        command = [str(python), "-m", "pip", "install", "-v", "--no-deps", "--ignore-installed", *flags, str(what)]
        done = run(command, **variables)
        expect(done)
        return done.stdout

    def check(self, python: Path, cpu: str = "available", backend: str = "cpu", few: str = FEW) -> str:
        """`info` says of the CPU kernels what `cpu` matches; gradients and tests are right."""
        info = expect(run([str(python), "-m", "selfreg_fast", "info"]))
        said = re.search(r"^backends$.*?^\s+cpu\s+(\S[^\n]*)$", info, re.M | re.S)
        if not said or not re.search(cpu, said[1]):
            raise Failed(f"info says of the CPU kernels: {said and said[1]}")
        expect(run([str(python), "-m", "selfreg_fast", "gradcheck", "--backends", backend]))
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"{backend} and {few}"]
        # In tests/: `-m` puts the working directory on sys.path, and in the tree that is a package without kernels.
        tests = expect(run([*command, "test_losses.py"], cwd=self.tree / "tests"))
        passed = re.search(r"(\d+) passed", tests)
        if not passed:
            raise Failed(f"no tests ran: {tests[-300:]}")
        versions = re.search(r"^\s+torch\s+(\S+)", info, re.M), re.search(r"^\s+python\s+(\S+)", info, re.M)
        return f"torch {versions[0][1]}, Python {versions[1][1]}, {passed[1]} tests" if all(versions) else ""

    # ---- rows ----

    def wheel_file(self) -> Path:
        """The wheel, built once, with the torch of this Python."""
        wheels = self.folder / "wheels"
        if not list(wheels.glob("*.whl")):
            python = self.environment(self.packages())
            headers = next(p for p in self.packages() if Path(p, "torch").is_dir())
            command = [str(python), "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels)]
            expect(run([*command, str(self.tree)], SELFREG_FAST_TORCH=headers))
        (wheel,) = wheels.glob("*.whl")
        if "cp310-abi3" not in wheel.name:
            raise Failed(f"not a wheel for all Pythons: {wheel.name}")
        return wheel

    def wheel(self, torch: str = "", python: str = HERE) -> str:
        """The one wheel in another torch or Python."""
        environment = self.environment(self.packages(torch, python), python)
        self.install(environment, self.wheel_file())
        return self.check(environment)

    def sdist(self) -> str:
        """The archive of the sources, built in the environment that it is installed in."""
        python = self.environment(self.packages())
        out = self.folder / "sdist"
        code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
        expect(run([str(python), "-m", "pip", "install", "-q", "--ignore-installed", "setuptools>=77"]))
        expect(run([str(python), "-c", code, str(out)], cwd=self.tree))
        (archive,) = out.glob("*.tar.gz")
        self.install(python, archive)
        return self.check(python)

    def editable(self) -> str:
        """A copy of the tree, installed with -e."""
        tree = Path(shutil.copytree(self.tree, self.folder / "editable"))
        python = self.environment(self.packages())
        self.install(python, tree, "-e")
        return self.check(python)

    def without_compiler(self) -> str:
        """PATH without g++, clang++, c++ and nvcc: it installs, says so, and the reference serves."""
        python = self.environment(self.packages())
        self.install(python, self.tree, PATH=str(python.parent))
        said = self.check(python, "no C\\+\\+ compiler was found", "reference", ONE_ROW)
        return f"{said}; {self.one_warning(python, 'no C++ compiler')}"

    def without_nvcc(self) -> str:
        """CUDA kernels are left out, and info says why; with SELFREG_FAST_CUDA=1 the install fails and says why."""
        python = self.environment(self.packages())
        tools = {"CUDA_HOME": str(self.folder / "nowhere")}
        self.install(python, self.tree, **tools)
        try:
            self.install(python, self.tree, SELFREG_FAST_CUDA="1", **tools)
        except Failed as refused:
            if "no nvcc was found" not in str(refused):
                raise
        else:
            raise Failed("SELFREG_FAST_CUDA=1 without nvcc installs")
        return self.check(python, few=ONE_ROW)

    def archs_without_gpu(self) -> str:
        """TORCH_CUDA_ARCH_LIST where there is no GPU: kernels for it are built and packed; the CPU's still serve."""
        if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
            raise NotRun("there is no nvcc here")
        python = self.environment(self.packages())
        self.install(python, self.tree, SELFREG_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
        place = expect(run([str(python), "-c", "import selfreg_fast; print(selfreg_fast.__path__[0])"])).strip()
        library = Path(place, "_C_cuda.abi3.so")
        if b"sm_90" not in library.read_bytes():
            raise Failed("the library has no kernels for sm_90")
        return f"{self.check(python, few=ONE_ROW)}; kernels for sm_90: {library.stat().st_size >> 10} KiB"

    def upgraded(self, torch: str = "newest") -> str:
        """The wheel, installed beside one torch, goes on working when another takes its place."""
        python = self.environment(self.packages())
        self.install(python, self.wheel_file())
        before = self.check(python, few=ONE_ROW)
        path_file = next(python.parents[1].glob("lib/python*/site-packages")) / "torch.pth"
        path_file.write_text("\n".join(self.packages(torch)) + "\n")
        return f"{before}, then {self.check(python)}"

    def broken_library(self) -> str:
        """A library that cannot be loaded: one warning that names both versions, and the reference serves."""
        python = self.environment(self.packages())
        self.install(python, self.wheel_file())
        library = next(python.parents[1].glob("lib/python*/site-packages/selfreg_fast/_C.abi3.so"))
        library.write_bytes(bytes(4096))  # cut short, it would end the process in the loader
        said = self.check(python, r"cannot be loaded \(built against torch .*, running in torch", "reference", ONE_ROW)
        return f"{said}; {self.one_warning(python, 'built against torch', 'running in torch')}"

    def one_warning(self, python: Path, *words: str) -> str:
        """Two calls warn once, in these words, and return the loss."""
        code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, selfreg_fast as srf
    z = [torch.zeros(1, 4, 2, 2, requires_grad=True) for _ in range(2)]
    for _ in range(2):
        loss = srf.sr_l_loss(z)
        loss.backward()
assert abs(loss.item() - 1.3862944) < 1e-6, loss
ours = [str(w.message) for w in caught if "selfreg_fast" in str(w.message)]
print(len(ours), *ours)
"""
        said = expect(run([str(python), "-W", "always", "-c", code]))
        if not said.startswith("1 ") or not all(word in said for word in words):
            raise Failed(f"expected one warning with {words}, got {said}")
        return "one warning"

    def rows(self) -> dict[str, Callable[[], str]]:
        rows: dict[str, Callable[[], str]] = {"wheel": self.wheel}
        for torch in ("2.10.0", "2.11.0", "newest"):
            rows[f"wheel, torch {torch}"] = lambda torch=torch: self.wheel(torch)
        for python in ("3.10", "3.11", "3.12", "3.13"):
            if python != HERE:
                rows[f"wheel, Python {python}"] = lambda python=python: self.wheel("newest", python)
        rows |= {"sdist": self.sdist, "editable": self.editable, "no compiler": self.without_compiler}
        rows |= {"no nvcc": self.without_nvcc, "torch upgraded": self.upgraded}
        return rows | {"library broken": self.broken_library, "architectures, no GPU": self.archs_without_gpu}


def here() -> list[str]:
    """Where this Python finds torch and the tools: a path file may lead elsewhere."""
    import hypothesis
    import torch

    return list(dict.fromkeys(str(Path(module.__path__[0]).parent) for module in (torch, hypothesis)))


def pythons() -> dict[str, str]:
    """Those on PATH, and this one, by version."""
    found = {HERE: sys.executable}
    for version in ("3.10", "3.11", "3.12", "3.13"):
        command = shutil.which(f"python{version}")
        if version != HERE and command and run([command, "-c", "import ensurepip, venv"]).returncode == 0:
            found[version] = command
    return found


def run(command: list[str], cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "SELFREG_FAST_", "VIRTUAL_"))}
    stand_ins = {"SELFREG_FAST_CUDA_ON_HOST": "", "TRITON_INTERPRET": "0"}  # the package as it is
    environment = {**keep, **stand_ins, **variables}
    return subprocess.run(
        command, cwd=cwd or tempfile.gettempdir(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def expect(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise Failed(f"{' '.join(map(str, done.args))[:300]}\n{done.stdout[-3000:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="The install matrix, in fresh environments.")
    parser.add_argument("--only", action="append", metavar="NAME", help="rows whose name has this in it")
    parser.add_argument("--download", action="store_true", help="download torch where it is not here: gigabytes")
    parser.add_argument(
        "--torch",
        action="append",
        default=[],
        metavar="VERSION=DIR",
        help="where one is installed: 2.10.0=DIR, newest=DIR, newest-3.12=DIR (for Python 3.12)",
    )
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder), args.download, dict(t.split("=", 1) for t in args.torch), pythons())
        for name, row in matrix.rows().items():
            if args.only and not any(wanted in name for wanted in args.only):
                continue
            begin = time.monotonic()
            try:
                result = f"passed   {name}: {row()}"
            except NotRun as why:
                result = f"not run  {name}: {why}"
            except Failed as what:
                failed += 1
                result = f"FAILED   {name}: {what}"
            print(f"{result} ({time.monotonic() - begin:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
