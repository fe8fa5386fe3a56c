"""The install matrix: one wheel, and every other way to install, with every compiler, in fresh environments.

    python tests/matrix.py [--only NAME]... [--download] [--torch VERSION=DIR]...     (or: make matrix)

A row installs the package, and in its environment runs `info`, `gradcheck` and a part of the tests. It ends as passed,
as FAILED, or as not run, with the reason: what it needs is not here. On Debian 12 all of it comes with

    apt-get install g++-11 g++-12 clang-14 clang-16 g++-aarch64-linux-gnu qemu-user-static

and an nvcc. What is downloaded (torch of other versions and for other Pythons, half a gigabyte each, with CUDA three)
comes only with --download; else there is the torch of the Python that runs this, and those that --torch names. Status 1
where a row fails.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

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

    def install(self, python: Path, what: Path, *flags: str, prefix: Sequence[str] = (), **variables: str) -> str:
        packages = (next(python.parents[1].glob("lib/python*/site-packages")) / "torch.pth").read_text().split("\n")
        headers = next((p for p in packages if Path(p, "torch").is_dir()), "")
        variables = {"SELFREG_FAST_TORCH": headers, **variables}
        pip = [*prefix, str(python), "-m", "pip", "install", "-v", "--no-deps", "--ignore-installed"]
        return expect(run([*pip, *flags, str(what)], **variables))

    def refused(self, python: Path, what: Path, reason: str, *flags: str, **variables: str) -> None:
        """The install fails, and says why."""
        try:
            self.install(python, what, *flags, **variables)
        except Failed as refused:
            if reason not in str(refused):
                raise
        else:
            raise Failed(f"it installs, and should not: {reason}")

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

    def published(self, pattern: str) -> Path:
        """The wheel or the archive of the sources, as `make wheel` makes them, once."""
        folder = self.folder / "dist"
        if not list(folder.glob(pattern)):
            expect(run(["make", "wheel", f"DIST={folder}"], cwd=ROOT))
        (file,) = folder.glob(pattern)
        return file

    def wheel_file(self) -> Path:
        return self.published("*-cp310-abi3-manylinux_*.whl")

    def wheel(self, torch: str = "", python: str = HERE) -> str:
        """The one wheel in another torch or Python, where there is no compiler."""
        environment = self.environment(self.packages(torch, python), python)
        self.install(environment, self.wheel_file(), PATH=str(environment.parent))
        return f"{self.check(environment)}; {self.wheel_file().name}"

    def sdist(self) -> str:
        """The archive of the sources."""
        python = self.environment(self.packages())
        self.install(python, self.published("*.tar.gz"))
        return self.check(python)

    def editable(self) -> str:
        """A copy of the tree, installed with -e. Again, only what depends on a changed file is compiled."""
        tree = Path(shutil.copytree(self.tree, self.folder / "editable"))
        python = self.environment(self.packages())
        self.install(python, tree, "-e")
        kernels = {"full_size", "small_exits"}
        for changed, compiled in (("csrc/ops.cpp", {"ops"}), ("csrc/cpu/vec.h", kernels), ("README.md", set())):
            with (tree / changed).open("a") as file:
                file.write("\n")
            said = self.install(python, tree, "-e")
            objects = re.findall(r"\] cxx \S+/(\w+)\S*\.o$", said, re.M)
            if set(objects) != compiled:
                raise Failed(f"a change of {changed} compiles {objects}")
        return self.check(python)

    def read_only(self) -> str:
        """A tree on a file system that nobody can write to."""
        tree, python = Path(shutil.copytree(self.tree, self.folder / "read-only")), self.environment(self.packages())
        mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
        prefix = ["unshare", "--mount", "sh", "-c", mount, "-", str(tree)]
        if run([*prefix, "true"]).returncode:
            raise NotRun("it takes a privileged user to mount a folder read-only")
        if run([*prefix, "touch", str(tree / "file")]).returncode == 0:
            raise Failed("the tree can be written to")
        self.install(python, tree, prefix=prefix)
        return self.check(python)

    def compiler(self, cxx: str) -> str:
        """CXX=...: it compiles with this one, and what it compiles is right."""
        if not shutil.which(cxx):
            raise NotRun(f"there is no {cxx} here")
        python = self.environment(self.packages())
        if f"'compiler': '{cxx} " not in self.install(python, self.tree, CXX=cxx):
            raise Failed(f"it was not built by {cxx}")
        return self.check(python)

    def fast_math(self) -> str:
        """The user's flags do not reach the arithmetic; a compiler that is fast and wrong fails the install."""
        python = self.environment(self.packages())
        for flags in ("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only -fassociative-math"):
            self.install(python, self.tree, CXXFLAGS=flags)
            result = self.check(python)
        wrong = self.folder / "wrong++"
        wrong.write_text('#!/bin/sh\nexec g++ "$@" -ffast-math\n')
        wrong.chmod(0o755)
        self.refused(python, self.tree, "do not compute what they should", CXX=str(wrong))
        self.refused(python, self.tree, "do not compute what they should", "-e", CXX=str(wrong))
        if left := list(self.tree.glob("selfreg_fast/_[Cb]*")):
            raise Failed(f"a wrong library is left: {left}")
        return result

    def uv(self) -> str:
        """uv, beside a torch without CUDA: it takes no second one, neither to build with nor to run with."""
        tools, folder = self.environment(self.packages()), self.folder / "uv"
        expect(run([str(tools), "-m", "pip", "install", "-q", "uv"]))
        uv, python = str(tools.with_name("uv")), folder / "bin" / "python"
        expect(run([uv, "venv", "-q", "--python", sys.executable, str(folder)]))
        (site,) = folder.glob("lib/python*/site-packages")
        left = {"setuptools", "_distutils_hack", "distutils-precedence.pth", "__pycache__"}
        for file in (f for packages in self.packages() for f in Path(packages).iterdir()):
            if file.name in left or file.name.startswith(("selfreg", "setuptools-")) or (site / file.name).exists():
                continue
            if file.name.endswith(".dist-info"):  # uv believes in packages whose records are real folders
                shutil.copytree(file, site / file.name)
            else:
                (site / file.name).symlink_to(file)
        environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
        before = expect(run([uv, "pip", "freeze"], **environment)).split()
        install = [uv, "pip", "install", "-v", "--no-cache", "--reinstall-package", "selfreg-fast", str(self.tree)]
        for more in (environment, {"SELFREG_FAST_TORCH": str(site / "torch"), "UV_PYTHON": str(python)}):
            said = expect(run(install, **more))
            if "losses of the kernels are right" not in said:
                raise Failed(f"not tried: {said[-3000:]}")
        new = set(expect(run([uv, "pip", "freeze"], **environment)).split()) - set(before)
        if not all(re.match("selfreg-fast|setuptools|@|file:", name) for name in new):
            raise Failed(f"uv installs {new}")
        said = run([*install, "--no-deps"], UV_PYTHON=str(python)).stdout
        if "no torch >= 2.10 was found" not in said:
            raise Failed(f"of a torch that it cannot find it says {said[-1000:]}")
        return f"{expect(run([uv, '--version'])).strip()}; {self.check(python)}"

    def without_torch(self) -> str:
        """It stops and says so, before pip fetches one; without kernels it would install."""
        python, reason = self.environment([]), "no torch >= 2.10 was found to build with. Install one first"
        said = run([str(python), "-m", "pip", "install", "-v", str(self.tree)]).stdout
        if reason not in said or "Collecting torch" in said:
            raise Failed(f"without torch it says {said[-3000:]}")
        return "refused"

    def without_isolation(self) -> str:
        """--no-build-isolation: an old setuptools and a missing ninja are named."""
        python = self.environment(self.packages())
        pip = [str(python), "-m", "pip", "install", "-q"]
        expect(run([*pip, "setuptools==68.2.2", "wheel"]))
        self.refused(python, self.tree, "selfreg_fast needs setuptools >= 77, this is 68.2.2", "--no-build-isolation")
        expect(run([*pip, "setuptools==77.0.3"]))
        self.refused(python, self.tree, "built by ninja, which is not here", "--no-build-isolation")
        expect(run([*pip, "ninja"]))
        self.install(python, self.tree, "--no-build-isolation")
        return self.check(python)

    def free_threaded(self) -> str:
        """A Python that says it is free-threaded, for which setuptools makes no abi3: an ordinary wheel."""
        python = self.environment(self.packages())
        expect(run([str(python), "-m", "pip", "install", "-q", "--upgrade", "setuptools", "ninja"]))
        (site,) = python.parents[1].glob("lib/python*/site-packages")
        says = site / "free_threaded.pth"
        says.write_text("import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1\n")
        wheels = self.folder / "free-threaded"
        command = [str(python), "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
        expect(run([*command, str(self.tree)], SELFREG_FAST_TORCH=self.packages()[0]))
        says.unlink()
        (wheel,) = wheels.iterdir()
        if "abi3" in wheel.name:
            raise Failed(f"not an ordinary wheel: {wheel.name}")
        self.install(python, wheel)
        return f"{self.check(python)}; {wheel.name}"

    def aarch64(self) -> str:
        """Compiled for aarch64, the kernels compute there, in every dtype, what they compute here."""
        cxx, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if not shutil.which(cxx) or not emulator:
            raise NotRun(f"it takes {cxx} and qemu-aarch64")
        python, wheels = self.environment(self.packages()), self.folder / "aarch64"
        command = [str(python), "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(self.tree)]
        variables = {"SELFREG_FAST_TORCH": self.packages()[0], "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
        expect(run(command, CXX=cxx, **variables))
        (wheel,) = wheels.glob("*-linux_aarch64.whl")
        kernels = map(str, self.tree.glob(f"build/aarch64-{cxx}-*/*-baseline.o"))
        flags = f"-std=c++17 -O2 -static -pthread -I{self.tree}/tests/cpu_without_torch -I{self.tree}/csrc".split()
        programs = [self.tree / "tests/cpu_without_torch/launches.cpp", self.tree / "csrc/cpu/launch.cpp"]
        files = (str(file) for file in self.tree.glob("csrc/cpu/*.cpp") if file.name != "launch.cpp")
        here = ["-DSELFREG_ISA=baseline", "-fopenmp-simd", "-Wno-psabi", *files]
        values = []
        for compiler, emulated, objects in (("g++", [], here), (cxx, [emulator], kernels)):
            program = str(self.folder / f"launches-{compiler}")
            expect(run([compiler, *flags, *map(str, programs), *objects, "-o", program]))
            values.append(
                subprocess.run([*emulated, program, "300", "values"], stdout=subprocess.PIPE, check=True).stdout
            )
        compared = compare(*map(read_values, values))
        return f"{wheel.name}; numbers compared: {', '.join(f'{n} {name}' for name, n in compared.items())}"

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
        self.refused(python, self.tree, "no nvcc was found", SELFREG_FAST_CUDA="1", **tools)
        return self.check(python, few=ONE_ROW)

    def architectures(self) -> str:
        """TORCH_CUDA_ARCH_LIST where there is no GPU: of it, what can be built is built and packed; the CPU's serve."""
        self.needs_nvcc()
        python = self.environment(self.packages())
        variables = {"SELFREG_FAST_CUDA": "1", "NVCC_APPEND_FLAGS": "--use_fast_math"}
        said = self.install(python, self.tree, TORCH_CUDA_ARCH_LIST="7.5 9.0 99.0+PTX", **variables)
        if not re.search(r"'left_out': '7\.5 \(older than 8\.0\), 99\.0\+PTX \(unknown to nvcc", said):
            raise Failed(f"it does not say what is left out: {said[-3000:]}")
        if any("use_fast_math" in file.read_text() for file in self.tree.glob("build/*/build.ninja")):
            raise Failed("nvcc is told --use_fast_math")
        place = expect(run([str(python), "-c", "import selfreg_fast; print(selfreg_fast.__path__[0])"])).strip()
        library = Path(place, "_C_cuda.abi3.so")
        if b"sm_90" not in library.read_bytes():
            raise Failed("the library has no kernels for sm_90")
        return f"{self.check(python, few=ONE_ROW)}; kernels for sm_90: {library.stat().st_size >> 10} KiB"

    def old_gpu(self) -> str:
        """A T4 beside a torch with CUDA (both pretended): it installs without CUDA kernels, and says why."""
        self.needs_nvcc()
        torch, tools = self.folder / "cuda" / "torch", self.folder / "t4"
        torch.mkdir(parents=True), tools.mkdir()
        (torch / "include").symlink_to(Path(self.packages()[0], "torch", "include"))
        (torch / "version.py").write_text("__version__ = '2.99.0'\ncuda = '13.0'\n")
        (tools / "nvidia-smi").write_text("#!/bin/sh\necho 7.5\n")
        (tools / "nvidia-smi").chmod(0o755)
        python = self.environment(self.packages())
        variables = {"SELFREG_FAST_TORCH": str(torch), "PATH": f"{tools}:{os.environ['PATH']}"}
        said = self.install(python, self.tree, **variables)
        if "none of the GPU architectures is supported: 7.5 (older than 8.0)" not in said:
            raise Failed(f"it does not say why: {said[-3000:]}")
        self.refused(python, self.tree, "none of the GPU architectures", SELFREG_FAST_CUDA="1", **variables)
        return self.check(python, few=ONE_ROW)

    def needs_nvcc(self) -> None:
        if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
            raise NotRun("there is no nvcc here")

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
        for cxx in ("g++-11", "g++-12", "clang++-14", "clang++-16"):
            rows[cxx] = lambda cxx=cxx: self.compiler(cxx)
        rows |= {"fast-math": self.fast_math, "architectures": self.architectures, "old GPU": self.old_gpu}
        rows["no torch"] = self.without_torch
        rows |= {"uv": self.uv, "no isolation": self.without_isolation, "free-threaded": self.free_threaded}
        rows |= {"sdist": self.sdist, "editable": self.editable, "read-only": self.read_only, "aarch64": self.aarch64}
        rows |= {"no compiler": self.without_compiler, "no nvcc": self.without_nvcc, "torch upgraded": self.upgraded}
        return rows | {"library broken": self.broken_library}


DTYPES = "float32", "float64", "float16", "bfloat16"  # csrc/exit_loss.h


def read_values(output: bytes) -> list[tuple[str, np.ndarray]]:
    """What `launches COUNT values` prints (cpu_without_torch/), in double precision."""
    file, arrays = io.BytesIO(output), []
    while line := file.readline():
        dtype, size = map(int, line.split())
        raw = np.frombuffer(file.read(size), ["f4", "f8", "f2", "u2"][dtype])
        numbers = (raw.astype("u4") << 16).view("f4") if DTYPES[dtype] == "bfloat16" else raw
        arrays.append((DTYPES[dtype], numbers.astype("f8")))
    return arrays


def compare(here: list[tuple[str, np.ndarray]], there: list[tuple[str, np.ndarray]]) -> Counter[str]:
    """How many numbers of each dtype are equal, but for the rounding that docs/accuracy.md explains.

    Terms of a mean's gradient are of the size 1e-4, for so many pixels these launches have: where student and teacher
    agree, a gradient is but what rounding leaves of them.
    """
    count: Counter[str] = Counter()
    for (dtype, a), (_, b) in zip(here, there, strict=True):
        rounding = {"float16": 2**-10, "bfloat16": 2**-7}.get(dtype, 0)
        unit = 1e-14 if dtype == "float64" else 2e-6
        least = 2**-24 if dtype == "float16" else 0  # its smallest number
        with np.errstate(invalid="ignore"):
            terms = np.abs(a[np.isfinite(a)]).max(initial=1e-4)
            near = np.abs(a - b) <= np.maximum(rounding * np.abs(a), least) + unit * terms
        if not np.all(near | (a == b)):
            raise Failed(f"another {dtype} number: {a[~near][:3]} and {b[~near][:3]}")
        count[dtype] += a.size
    return count


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


# What would change an install, or lead to other packages.
DROPPED = (
    "PYTHON",
    "PYTEST_",
    "SELFREG_FAST_",
    "VIRTUAL_",
    "CXX",
    "NVCC_",
    "CUDA_",
    "TORCH_",
    "UV_",
    "MAKE",
    "MFLAGS",
    "PWD",
)


def run(command: list[str], cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(DROPPED)}
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
