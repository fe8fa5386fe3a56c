"""Builds selfreg_fast: the Python package and, on Linux with a C++ compiler, its CPU kernels and its CUDA kernels.

`pip install .` is all there is to do. No compiler: the package installs without kernels, and
`selfreg_fast.backends()` says so. A compiler that fails: the install fails, and says how to go on without it.
What happened is written to `selfreg_fast/_build.json`, next to the compiled modules.

Environment variables:
    SELFREG_FAST_BUILD   unset: build the kernels where there is a compiler; 0: never; 1: or else fail.
    SELFREG_FAST_CUDA    the same for the CUDA kernels. Unset: where there is nvcc, and a torch that can use them.
    SELFREG_FAST_CUDA_ARCHS
                         for which GPUs, as in TORCH_CUDA_ARCH_LIST, which is asked next: "8.0;9.0+PTX" (the default
                         where there is no GPU; where there are some, theirs).
    CUDA_HOME            where the CUDA toolkit is, if its nvcc is not on PATH or in /usr/local/cuda.
    SELFREG_FAST_TORCH   a directory that holds `torch/` (a site-packages), whose headers to build with, where it is
                         not the running interpreter's: for `python -m build`, say, which builds in a venv of its own.
    CXX, CXXFLAGS        the compiler (default: the first of g++, clang++, c++), and flags to add, as usual.
    MAX_JOBS             how many compilations to run at once (default: one a core).
Later, when the package is used:
    SELFREG_FAST_VALIDATE
                         1: look for labels out of range on a GPU, too (validate=True of every call).
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


def mode(variable: str) -> str:
    """ "0", "1" or ""."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{variable}: expected 0, 1 or nothing, got {value!r}")
    return value


MODE, CUDA_MODE = mode("SELFREG_FAST_BUILD"), mode("SELFREG_FAST_CUDA")

# No -ffast-math: the kernels rely on infinities, and on the order of additions being the one written.
CXXFLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi -g0 -Icsrc"
)
X86_ISAS = {
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c -mbmi2 -mprefer-vector-width=512",
}


STORAGE_TYPES = range(4)  # float, double, half, bfloat16: csrc/cuda/exit_loss.cu is compiled once for each
NVCCFLAGS = shlex.split("-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-g0 -Icsrc")


def find_torch() -> tuple[Path, str, bool] | None:
    """Include directory and version of the torch to build against, if there is one of MIN_TORCH or newer, and whether
    it is one with CUDA.

    It is looked for on disk, not imported: pip builds in an isolated environment, which hides the installed packages
    from `import`, but not where they are. So we compile against the torch that is there and download no second one.
    """
    asked_for = os.environ.get("SELFREG_FAST_TORCH")
    dirs = [asked_for] if asked_for else [*sys.path, sysconfig.get_path("purelib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix and not asked_for:  # outside virtual environments, `pip install --user` counts too
        dirs.append(site.getusersitepackages())
    for torch in (Path(d) / "torch" for d in dirs):
        if (torch / "include/torch/csrc/stable").is_dir():
            text = (torch / "version.py").read_text()
            version = re.search(r"^__version__ = '((\d+)\.(\d+).*)'", text, re.M)
            if version and (int(version[2]), int(version[3])) >= MIN_TORCH:
                return torch / "include", version[1], bool(re.search(r"^cuda\b[^=]*= '", text, re.M))
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


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, else the one on PATH, else that of /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home, "bin/nvcc") if Path(home, "bin/nvcc").is_file() else None
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return Path(found) if Path(found).is_file() else None


def why_not_cuda() -> str | None:
    """Why no CUDA kernels are built here (and what to do about it), or None."""
    if WHY_NOT:
        return WHY_NOT
    if CUDA_MODE == "0":
        return "switched off when this was installed (SELFREG_FAST_CUDA=0): unset that variable"
    if CUDA_MODE != "1" and TORCH and not TORCH[2]:
        return (
            f"not built: torch {TORCH[1]}, which was there then, has no CUDA (SELFREG_FAST_CUDA=1 builds all the same)"
        )
    if NVCC is None:
        return "no nvcc was found when this was installed: install the CUDA toolkit, and set CUDA_HOME if need be"
    return None


def cuda_archs() -> list[str]:
    """ "8.0", "9.0+PTX", ...: asked for, or those of the GPUs here, or a default for most."""
    wanted = os.environ.get("SELFREG_FAST_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True).stdout
        wanted = ";".join(sorted(set(re.findall(r"^\d+\.\d+$", answer, re.M))))
    archs = re.split(r"[;,\s]+", (wanted or "8.0;9.0+PTX").strip())
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            sys.exit(f"CUDA architectures: expected a list like '8.0;9.0+PTX', got {arch!r} in it")
    return archs


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
NVCC = find_nvcc()
WHY_NOT_CUDA = why_not_cuda()


class Kernels(build_ext):
    """Compiles and links by itself: setuptools knows neither flags per file nor parallel compilation."""

    def run(self) -> None:
        record = {"cpu": WHY_NOT or "built", "torch": TORCH and TORCH[1], "compiler": None, "isas": []}
        record |= {"cuda": WHY_NOT_CUDA or "built", "nvcc": None, "archs": []}
        if CUDA_MODE == "1" and WHY_NOT_CUDA:
            raise CompileError(f"SELFREG_FAST_CUDA=1, but {WHY_NOT_CUDA}")
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
            if WHY_NOT_CUDA is None:
                self.archs = cuda_archs()
                record |= {"nvcc": release(ask([str(NVCC)], "--version")), "archs": self.archs}
                self.compiler_name += record["nvcc"]
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
        if ext.name.endswith("_cuda"):
            # The CUDA runtime is linked in and kept to itself: torch's own may be of another version.
            linker = [str(NVCC), "-shared", "-cudart", "static"]
            flags = ["-Xlinker", "--no-as-needed,-s,--exclude-libs=libcudart_static.a"]
            self.link(output, linker, flags, self.compile(self.cuda_commands(ext.sources)))
        else:
            flags = ["-Wl,--no-as-needed,-s"]
            self.link(output, [*CXX, "-shared"], flags, self.compile(self.cpu_commands(ext.sources)))

    def torch_flags(self) -> list[str]:
        # The stable ABI of torch 2.10: what is built with it works in every later torch too.
        target = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"
        return [f"-isystem{TORCH[0]}", target, *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def cuda_commands(self, sources: list[str]) -> list[list[str]]:
        """One compilation a file; exit_loss.cu, the largest and therefore first, one a storage type."""
        generate = []
        for arch in self.archs:
            number = re.sub(r"\.|\+PTX", "", arch)
            generate += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if arch.endswith("+PTX"):
                generate += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        nvcc = [str(NVCC), *NVCCFLAGS, *generate]
        includes = re.search(r"(\S+)/cuda_runtime\.h", ask([str(NVCC)], "-M", "-x", "cu", os.devnull))
        commands = []
        for source in sources:
            if source.endswith("exit_loss.cu"):
                commands[:0] = [[*nvcc, f"-DSELFREG_STORAGE={s}", "-c", source] for s in STORAGE_TYPES]
            elif source.endswith(".cu"):
                commands.append([*nvcc, "-c", source])
            else:
                commands.append([*CXX, *CXXFLAGS, f"-isystem{includes[1]}", *self.torch_flags(), "-c", source])
        return commands

    def cpu_commands(self, sources: list[str]) -> list[list[str]]:
        """One compilation a file; for those in csrc/cpu, which see no torch, one an instruction set."""
        many = ["-DSELFREG_X86_ISAS=1"] if len(self.isas) > 1 else []
        common = [*CXX, *CXXFLAGS, *many]
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        commands = []
        # Instruction sets in ascending order, torch's side first: of an inline function that several objects hold, the
        # linker keeps the first. So none compiled for AVX-512 is ever called on a machine that lacks it.
        for source in (s for s in sources if "cpu" not in Path(s).parts):
            commands.append([*common, *self.torch_flags(), "-c", source])
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

    def link(self, output: Path, linker: list[str], flags: list[str], objects: list[Path]) -> None:
        """Links without torch: its symbols come from the libtorch_cpu that `import torch` has loaded by then.

        The loader looks them up in the libraries that ours names as needed, and takes one already loaded by its name.
        So an empty stand-in of that name is enough to link with; `--no-as-needed`, for the linker would drop it.
        """
        with tempfile.TemporaryDirectory() as folder:
            run([*CXX, "-shared", "-nostdlib", "-Wl,-soname,libtorch_cpu.so", "-x", "c++", os.devnull]
                + ["-o", f"{folder}/libtorch_cpu.so"])  # fmt: skip
            run([*linker, *flags, *map(str, objects), f"-L{folder}", "-ltorch_cpu", "-o", str(output)])


WAY_OUT = "go on without kernels, with the reference only: SELFREG_FAST_BUILD=0 pip install ."


def run(command: list[str]) -> None:
    """Runs a compiler; its messages and the command come out in one piece, whatever else runs."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(shlex.join(command), done.stdout, sep="\n", end="", flush=True)
    if done.returncode:
        raise CompileError(
            f"the kernels of selfreg_fast do not compile: {command[0]} ended with status {done.returncode} "
            f"(its messages are above). "
            + (
                "Go on without CUDA kernels: SELFREG_FAST_CUDA=0 pip install ."
                if NVCC and command[0] == str(NVCC)
                else f"Try another compiler (CXX=...), or {WAY_OUT}"
            )
        )


def ask(command: list[str], *flags: str) -> str:
    """What a compiler prints."""
    return subprocess.run([*command, *flags], capture_output=True, text=True).stdout.strip()


def release(text: str) -> str:
    """ "13.0.88" of what `nvcc --version` prints."""
    number = re.search(r"\bV(\d[\d.]*)", text)
    return number[1] if number else "?"


def describe(cxx: list[str]) -> tuple[str, str]:
    """("g++ 12.2.0", "x86_64-linux-gnu"): name and version of a compiler, and the machine it compiles for."""
    text = re.sub(r"\(.*?\)", "", ask(cxx, "--version"))  # "g++ (Debian 12.2.0-14) 12.2.0"
    number = re.search(r"\d+\.\d+(\.\d+)?", text)
    return f"{Path(cxx[-1]).name} {number[0] if number else '?'}", ask(cxx, "-dumpmachine")


def version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def sources(*patterns: str) -> list[str]:
    return sorted(str(f.relative_to(ROOT)) for pattern in patterns for f in (ROOT / "csrc").glob(pattern))


extensions = [Extension("selfreg_fast._C", sources("*.cpp", "cpu/*.cpp"), py_limited_api=True)]
if WHY_NOT_CUDA is None:
    extensions.append(Extension("selfreg_fast._C_cuda", sources("cuda/*.cu", "cuda/*.cpp"), py_limited_api=True))
scratch = tempfile.TemporaryDirectory()  # of the build alone: a module deleted since cannot come back from build/lib
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Kernels},
    # Where no torch is visible, the headers must come from one installed for the build.
    setup_requires=[] if TORCH or WHY_NOT else [f"torch>={version(MIN_TORCH)}"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build": {"build_lib": scratch.name}},
)
