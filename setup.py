"""Builds selfreg_fast: the Python package and, on Linux with a C++ compiler, its CPU kernels.

`pip install .` is all there is to do. No compiler: the package installs without kernels, and
`selfreg_fast.backends()` says so. A compiler that fails: the install fails, and says how to go on without it.
What happened is written to `selfreg_fast/_build.json`, next to the compiled module.

Environment variables:
    SELFREG_FAST_BUILD   unset: build the kernels where there is a compiler; 0: never; 1: or else fail.
    SELFREG_FAST_TORCH   a directory that holds `torch/` (a site-packages), whose headers to build with, where it is
                         not the running interpreter's: for `python -m build`, say, which builds in a venv of its own.
    CXX, CXXFLAGS        the compiler (default: the first of g++, clang++, c++), and flags to add, as usual.
    MAX_JOBS             how many compilations to run at once (default: one a core).
Later, when the package is used:
    SELFREG_FAST_ISA     baseline, avx2 or avx512: the CPU kernels to take instead of the best ones the machine can run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)  # the first whose stable ABI has all we call
MODE = os.environ.get("SELFREG_FAST_BUILD", "")
if MODE not in ("", "0", "1"):
    sys.exit(f"SELFREG_FAST_BUILD: expected 0, 1 or nothing, got {MODE!r}")

# No -ffast-math: the kernels rely on infinities, and on the order of additions being the one written.
CXXFLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi -g0 -Icsrc"
)
X86_ISAS = {
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c -mbmi2 -mprefer-vector-width=512",
}


def find_torch() -> tuple[Path, str] | None:
    """Include directory and version of the torch to build against, if there is one of MIN_TORCH or newer.

    It is looked for on disk, not imported: pip builds in an isolated environment, which hides the installed packages
    from `import`, but not where they are. So we compile against the torch that is there and download no second one.
    """
    asked_for = os.environ.get("SELFREG_FAST_TORCH")
    dirs = [asked_for] if asked_for else [*sys.path, sysconfig.get_path("purelib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix and not asked_for:  # outside virtual environments, `pip install --user` counts too
        dirs.append(site.getusersitepackages())
    for torch in (Path(d) / "torch" for d in dirs):
        if (torch / "include/torch/csrc/stable").is_dir():
            version = re.search(r"^__version__ = '((\d+)\.(\d+).*)'", (torch / "version.py").read_text(), re.M)
            if version and (int(version[2]), int(version[3])) >= MIN_TORCH:
                return torch / "include", version[1]
    if asked_for:
        sys.exit(f"SELFREG_FAST_TORCH={asked_for}: there is no torch of version 2.10 or newer in it")
    return None


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler, or None. A CXX that does not exist is an error: someone asked for it."""
    if cxx := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(cxx[0]):
            sys.exit(f"CXX={cxx[0]}: no such compiler. Unset CXX, or install without kernels: SELFREG_FAST_BUILD=0")
        return cxx
    return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def why_not() -> str | None:
    """Why no kernels are built here (and what to do about it), or None."""
    if MODE == "0":
        return "switched off when this was installed (SELFREG_FAST_BUILD=0): unset that variable"
    if not sys.platform.startswith("linux"):
        return f"not built on {sys.platform}: this version builds its kernels on Linux only"
    if CXX is None:
        return "no C++ compiler was found when this was installed: get one (apt-get install g++, say)"
    return None


CXX = None if MODE == "0" else find_compiler()
WHY_NOT = why_not()
TORCH = find_torch()


class Kernels(build_ext):
    """Compiles and links by itself: setuptools knows neither flags per file nor parallel compilation."""

    def run(self) -> None:
        record = {"cpu": WHY_NOT or "built", "torch": TORCH and TORCH[1], "compiler": None, "isas": []}
        if WHY_NOT:
            if MODE == "1":
                raise CompileError(f"SELFREG_FAST_BUILD=1, but {WHY_NOT}")
            self.extensions = []
        elif TORCH is None:
            raise CompileError(f"no torch >= {version(MIN_TORCH)} to build against. Install torch first, or {WAY_OUT}")
        else:
            self.compiler_name, machine = describe(CXX)
            self.isas = ["baseline", *(X86_ISAS if machine.startswith("x86_64") else ())]
            record |= {"compiler": self.compiler_name, "isas": self.isas}
        print(f"selfreg_fast: {record}", flush=True)
        # An editable install builds in the source tree: nothing of an earlier one may remain there.
        targets = [Path(self.build_lib, "selfreg_fast"), *([ROOT / "selfreg_fast"] if self.inplace else [])]
        for old in (f for target in targets for f in target.glob("_C*.so")):
            old.unlink()
        super().run()
        for target in targets:
            target.mkdir(parents=True, exist_ok=True)
            (target / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        self.link(output, self.compile(self.cpu_commands(ext.sources)))

    def cpu_commands(self, sources: list[str]) -> list[list[str]]:
        """One compilation a file; for those in csrc/cpu, which see no torch, one an instruction set."""
        many = ["-DSELFREG_X86_ISAS=1"] if len(self.isas) > 1 else []
        common = [*CXX, *CXXFLAGS, *many]
        # The stable ABI of torch 2.10: what is built with it works in every later torch too.
        target = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"
        torch = [f"-isystem{TORCH[0]}", target]
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        commands = []
        # Instruction sets in ascending order, torch's side first: of an inline function that several objects hold, the
        # linker keeps the first. So none compiled for AVX-512 is ever called on a machine that lacks it.
        for source in (s for s in sources if "cpu" not in Path(s).parts):
            commands.append([*common, *torch, *extra, "-c", source])
        for isa in self.isas:
            flags = [f"-DSELFREG_ISA={isa}", *X86_ISAS.get(isa, "").split()]
            for source in (s for s in sources if "cpu" in Path(s).parts):
                commands.append([*common, *flags, *extra, "-c", source])
        return commands

    def compile(self, commands: list[list[str]]) -> list[Path]:
        """Objects of the commands, in their order. Named by all that goes into them, they are reused while valid."""
        state = hashlib.sha256(repr((self.compiler_name, TORCH)).encode())
        for file in sorted(f for f in (ROOT / "csrc").rglob("*") if f.is_file()):
            state.update(f"{file}\0".encode() + file.read_bytes())
        folder = ROOT / "build" / "objects"
        folder.mkdir(parents=True, exist_ok=True)

        def one(command: list[str]) -> Path:
            key = hashlib.sha256(state.digest() + repr(command).encode()).hexdigest()[:16]
            obj = folder / f"{Path(command[-1]).stem}-{key}.o"
            if not obj.exists():
                part = obj.with_suffix(f".{os.getpid()}")  # an interrupted compilation leaves no half object
                run([*command, "-o", str(part)])
                part.replace(obj)
            return obj

        jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, commands))

    def link(self, output: Path, objects: list[Path]) -> None:
        """Links without torch: its symbols come from the libtorch_cpu that `import torch` has loaded by then.

        The loader looks them up in the libraries that ours names as needed, and takes one already loaded by its name.
        So an empty stand-in of that name is enough to link with; `--no-as-needed`, for the linker would drop it.
        """
        with tempfile.TemporaryDirectory() as folder:
            run([*CXX, "-shared", "-nostdlib", "-Wl,-soname,libtorch_cpu.so", "-x", "c++", os.devnull]
                + ["-o", f"{folder}/libtorch_cpu.so"])  # fmt: skip
            needed = ["-Wl,--no-as-needed", f"-L{folder}", "-ltorch_cpu"]
            run([*CXX, "-shared", *map(str, objects), *needed, "-Wl,-s", "-o", str(output)])


WAY_OUT = "go on without kernels, with the reference only: SELFREG_FAST_BUILD=0 pip install ."


def run(command: list[str]) -> None:
    """Runs a compiler; its messages and the command come out in one piece, whatever else runs."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(shlex.join(command), done.stdout, sep="\n", end="", flush=True)
    if done.returncode:
        raise CompileError(
            f"the kernels of selfreg_fast do not compile: {command[0]} ended with status {done.returncode} "
            f"(its messages are above). Try another compiler (CXX=...), or {WAY_OUT}"
        )


def describe(cxx: list[str]) -> tuple[str, str]:
    """("g++ 12.2.0", "x86_64-linux-gnu"): name and version of a compiler, and the machine it compiles for."""

    def ask(flag: str) -> str:
        return subprocess.run([*cxx, flag], capture_output=True, text=True).stdout.strip()

    number = re.search(r"\d+\.\d+(\.\d+)?", re.sub(r"\(.*?\)", "", ask("--version")))  # "g++ (Debian 12.2.0-14) 12.2.0"
    return f"{Path(cxx[-1]).name} {number[0] if number else '?'}", ask("-dumpmachine")


def version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


sources = sorted(str(f.relative_to(ROOT)) for folder in ("csrc", "csrc/cpu") for f in (ROOT / folder).glob("*.cpp"))
scratch = tempfile.TemporaryDirectory()  # of the build alone: a module deleted since cannot come back from build/lib
setup(
    ext_modules=[Extension("selfreg_fast._C", sources, py_limited_api=True)],
    cmdclass={"build_ext": Kernels},
    # Where no torch is visible, the headers must come from one installed for the build.
    setup_requires=[] if TORCH or WHY_NOT else [f"torch>={version(MIN_TORCH)}"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build": {"build_lib": scratch.name}},
)
