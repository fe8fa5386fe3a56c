"""Builds selfreg_fast: the Python package and, on Linux with a C++ compiler, its CPU and its CUDA kernels, by ninja.

`pip install .` is all there is to do. No compiler: the package installs without kernels, and `selfreg_fast.backends()`
says so. A compiler that fails: the install fails, and says how to go on without it. Every command stands in
build/*/build.ninja; what was built, and what was not and why, in selfreg_fast/_build.json.

Environment variables:
    SELFREG_FAST_BUILD   unset: build the kernels where there is a compiler; 0: never; 1: or else fail.
    SELFREG_FAST_CUDA    the same for the CUDA kernels. Unset: where there is nvcc, and a torch that can use them.
    SELFREG_FAST_CUDA_ARCHS
                         for which GPUs, as in TORCH_CUDA_ARCH_LIST, which is asked next: "8.0;9.0+PTX". Unset:
                         those of the GPUs here; where there is none, 8.0, 9.0, 10.0 and 12.0, and PTX for newer ones.
    CUDA_HOME            where the CUDA toolkit is, if its nvcc is not on PATH or in /usr/local/cuda.
    SELFREG_FAST_TORCH   the torch to build with, or the site-packages that holds it, if csrc/toolchain.py finds none.
    CXX, CXXFLAGS        the compiler (default: the first of g++, clang++, c++), and flags to add, as usual. None of
                         them changes the arithmetic. nvcc's: NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS, NVCC_CCBIN.
    MAX_JOBS             how many compilations to run at once (default: one a core).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"selfreg_fast needs setuptools >= 77, this is {setuptools.__version__}: pip install -U setuptools ninja")

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402
from toolchain import CXX, NVCC, TORCH, WAY_OUT, WHY_NOT, WHY_NOT_CUDA  # noqa: E402

SCRATCH = tempfile.TemporaryDirectory()  # of this build alone
NAMES = ["_C"] if WHY_NOT_CUDA else ["_C", "_C_cuda"]
NO_TORCH = (
    "selfreg_fast: no torch >= 2.10 was found to build with. Install one first, into the activated environment or "
    "./.venv (https://pytorch.org/get-started has the command: with CUDA or without); or say where it is, "
    f"SELFREG_FAST_TORCH=.../site-packages; or {WAY_OUT}"
)
if TORCH is None and WHY_NOT is None and toolchain.PIP_ISOLATES:
    sys.exit(NO_TORCH)  # now: before it builds, pip would fetch the newest torch, with CUDA, which nobody asked for

CXXFLAGS = "-O3 -g0 -fPIC -fvisibility=hidden -fopenmp-simd -Wno-psabi -Icsrc"
# After the user's flags, so that no -ffast-math counts: the kernels rely on infinities, and on the order of additions
# being the one written.
ARITHMETIC = (
    "-fno-fast-math -fno-unsafe-math-optimizations -fno-associative-math -fno-reciprocal-math -fno-finite-math-only "
    "-fsigned-zeros -fno-math-errno -fno-trapping-math -ffp-contract=fast"
)
X86_ISAS = {
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c -mbmi2 -mprefer-vector-width=512",
}
NVCCFLAGS = (
    "-std=c++17 -O3 -Icsrc -Xcompiler -fPIC,-fvisibility=hidden,-g0 "
    "-ftz=false -prec-div=true -prec-sqrt=true -fmad=true -Xcompiler -fno-fast-math"
)
STORAGE_TYPES = range(4)  # float, double, half, bfloat16: csrc/cuda/exit_loss.cu is compiled once for each
# The stable ABI of torch 2.10: what is built with it works in every later torch, too.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*toolchain.MIN_TORCH)


def write_ninja(folder: Path, isas: list[str]) -> None:
    """folder/build.ninja: what is compiled, with which flags, into which file."""
    from ninja.ninja_syntax import Writer, escape

    def words(*command: str | Path) -> str:
        return escape(shlex.join(map(str, command)))

    # -Ofast is -O3, which is there, with fast arithmetic and stores of what nobody wrote.
    user = words(*(flag for flag in toolchain.words("CXXFLAGS") if flag != "-Ofast"))
    cxx, at = words(*CXX), escape(str(folder))
    ninja = Writer((ROOT / folder / "build.ninja").open("w"), width=1000)

    def rule(name: str, command: str, **more: str) -> None:
        ninja.rule(name, command, description=f"{name} $out", **more)

    def compile(rule: str, source: Path, name: str, **variables: str) -> str:
        return ninja.build(f"{at}/{name}.o", rule, str(source.relative_to(ROOT)), variables=variables)[0]

    def link(output: str, objects: list[str], linker: str) -> None:
        ninja.build(f"{at}/{output}", "link", objects, f"{at}/libtorch_cpu.so", variables={"linker": linker})

    ninja.variable("builddir", at)
    depend = "-MMD -MF $out.d -c $in -o $out"
    rule("cxx", f"{cxx} {CXXFLAGS} $before {user} -std=c++17 {ARITHMETIC} $isa {depend}", depfile="$out.d", deps="gcc")
    rule("link", f"$linker $in -L{words(folder)} -ltorch_cpu -o $out")
    # Torch's symbols come from the libtorch_cpu that `import torch` has loaded: the loader takes a library that is
    # needed by its name, if it is there. So an empty one of that name is enough to link with; --no-as-needed, for the
    # linker would drop it.
    rule("stand-in", f"{cxx} -shared -nostdlib -Wl,-soname,libtorch_cpu.so -x c++ {os.devnull} -o $out")
    ninja.build(f"{at}/libtorch_cpu.so", "stand-in")

    # The CPU's kernels, which see no torch, are compiled once an instruction set. In ascending order, torch's side
    # first: of an inline function that several objects hold, the linker keeps the first. So none compiled for AVX-512
    # is ever called on a machine that lacks it.
    many = "-DSELFREG_X86_ISAS=1" if len(isas) > 1 else ""
    torch = f"-isystem {words(TORCH.folder / 'include')} {STABLE_ABI}"
    launch, kernels = ROOT / "csrc/cpu/launch.cpp", []
    per_isa = [f for f in sources("cpu/*.cpp") if f != launch]
    for isa in isas:
        flags = f"-DSELFREG_ISA={isa} {X86_ISAS.get(isa, '')}"
        kernels += [compile("cxx", f, f"{f.stem}-{isa}", before=many, isa=flags) for f in per_isa]
    objects = [compile("cxx", f, f.stem, before=f"{torch} {many}") for f in [*sources("*.cpp"), launch]]
    link("_C.abi3.so", objects + kernels, f"{cxx} -shared -O3 {user} {ARITHMETIC} -Wl,--no-as-needed,-s")

    if WHY_NOT_CUDA is None:
        nvcc = words(NVCC, *toolchain.NVCC_FLAGS)
        rule(
            "nvcc",
            f"{nvcc} {NVCCFLAGS} {words(*toolchain.gencode(toolchain.ARCHS))} $storage {depend}",
            depfile="$out.d",
            deps="gcc",
        )
        large = ROOT / "csrc/cuda/exit_loss.cu"  # and therefore first
        objects = [compile("nvcc", large, f"cuda-{s}", storage=f"-DSELFREG_STORAGE={s}") for s in STORAGE_TYPES]
        objects += [compile("nvcc", f, f"cuda-{f.stem}") for f in sources("cuda/*.cu") if f != large]
        before = f"{torch} -isystem {words(toolchain.cuda_include())}"
        objects += [compile("cxx", f, f"cuda-{f.stem}", before=before) for f in sources("cuda/*.cpp")]
        # The CUDA runtime is linked in and kept to itself: torch's own may be of another version.
        flags = "-Xlinker --no-as-needed,-s,--exclude-libs=libcudart_static.a"
        link("_C_cuda.abi3.so", objects, f"{nvcc} -shared -cudart static {flags}")
    ninja.close()


def sources(pattern: str) -> list[Path]:
    return sorted((ROOT / "csrc").glob(pattern))


class Kernels(build_ext):
    """Has ninja build the libraries, tries them, and writes down what they are."""

    def run(self) -> None:
        record = {"cpu": WHY_NOT or "built", "torch": TORCH and TORCH.version, "compiler": None, "isas": []}
        record |= {"cuda": WHY_NOT_CUDA or "built", "nvcc": None, "archs": [], "left_out": toolchain.LEFT_OUT or None}
        machine = ""
        if WHY_NOT:
            self.extensions = []
        elif TORCH is None:
            sys.exit(NO_TORCH)
        else:
            compiler, machine = toolchain.describe(CXX)
            record |= {"compiler": compiler, "isas": ["baseline", *(X86_ISAS if machine == "x86_64" else ())]}
            name = f"{machine}-{compiler}-torch-{TORCH.version}"
            if WHY_NOT_CUDA is None:
                record |= {"nvcc": toolchain.nvcc_version(), "archs": toolchain.ARCHS}
                name += f"-nvcc-{record['nvcc']}"
            self.ninja = toolchain.find_ninja()
            self.folder, self.lock = toolchain.build_folder(ROOT, Path(SCRATCH.name), name)
            write_ninja(self.folder, record["isas"])
        print(f"selfreg_fast: {record}", flush=True)
        # An editable install builds in the source tree: nothing of an earlier one may remain there.
        packages = [Path(self.build_lib, "selfreg_fast"), *([ROOT / "selfreg_fast"] if self.inplace else [])]
        for old in (f for package in packages for f in package.glob("_C*.so")):
            old.unlink()
        super().run()
        for package in packages:
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
        if machine not in ("", platform.machine()):
            print(f"selfreg_fast: its kernels are built, but not tried: they are for {machine}")
        elif machine and not self.computes(packages[-1].parent):
            for file in (f for package in packages for f in (*package.glob("_C*.so"), package / "_build.json")):
                file.unlink()
            sys.exit(
                "the kernels of selfreg_fast compile, but do not compute what they should (see above). Try without "
                f"flags in the environment (CXXFLAGS and the like), another compiler (CXX=...), or {WAY_OUT}"
            )

    def get_ext_filename(self, fullname: str) -> str:
        # Python imports none of them, torch loads them: one name, in Pythons without an abi3, too.
        return f"{fullname.replace('.', '/')}.abi3.so"

    def build_extension(self, ext: setuptools.Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        built, file = self.folder / output.name, self.folder / "build.ninja"
        command = [self.ninja, "-f", file, "-j", toolchain.jobs(), built]
        if subprocess.run(command, cwd=ROOT, pass_fds=[self.lock.fileno()]).returncode:
            remedy = "go on without CUDA kernels: SELFREG_FAST_CUDA=0 pip install ."
            if not ext.name.endswith("cuda"):
                remedy = f"try without CXXFLAGS, another compiler (CXX=...), or {WAY_OUT}"
            sys.exit(f"the kernels of selfreg_fast do not compile (see above; out of memory: MAX_JOBS=1): {remedy}")
        shutil.copyfile(ROOT / built, output)

    def computes(self, folder: Path) -> bool:
        """Whether the package in `folder` computes a loss as the reference does: what does not is not installed."""
        command = [sys.executable, str(ROOT / "csrc/check_build.py"), str(folder), str(TORCH.folder.parent)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # pip's hides installed packages
        return subprocess.run(command, cwd=SCRATCH.name, env=environment, stderr=subprocess.STDOUT).returncode == 0


options = {"build": {"build_base": SCRATCH.name}}  # a module deleted since cannot come back from build/lib
if not sysconfig.get_config_var("Py_GIL_DISABLED"):  # free-threaded Pythons have no abi3
    options["bdist_wheel"] = {"py_limited_api": "cp310"}
if not os.access(ROOT, os.W_OK):
    options["egg_info"] = {"egg_base": SCRATCH.name}
setuptools.setup(
    ext_modules=[setuptools.Extension(f"selfreg_fast.{name}", []) for name in NAMES],
    cmdclass={"build_ext": Kernels},
    options=options,
)
