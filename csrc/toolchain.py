"""What this machine has to build selfreg_fast with: torch's headers, a C++ compiler, nvcc; and what is built of it.

The environment variables are explained in setup.py. To import this module is to look around, once: a variable with a
value that it cannot have ends the process with a line that says so.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple, TextIO

import setuptools

MIN_TORCH = (2, 10)  # the first whose stable ABI has all we call
WAY_OUT = "go on without kernels, with the reference only: SELFREG_FAST_BUILD=0 pip install ."
# As torch names them (torch/utils/cpp_extension.py).
FAMILIES = {"Volta": "7.0", "Turing": "7.5", "Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX"}
FAMILIES |= {"Blackwell": "10.0;10.3;12.0;12.1+PTX"}
# Where there is no GPU: machine code for each generation, which all of it run (8.6 and 8.9 that of 8.0, 10.3 that of
# 10.0). The shapes of kernels that suit a GPU's shared memory are chosen when they run.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: bool  # whether it is one with CUDA


def find_torch() -> Torch | None:
    """A torch of MIN_TORCH or newer, whose headers to build with: any will do, for the ABI is the same in all.

    It is looked for on disk, not imported. For pip hides the installed packages from the build, but not where they are.
    Others (uv, build) make an environment for it; to them PATH leads, with the caller's environment where that is
    activated, and PWD, where the caller is, with a `.venv`, perhaps. So nobody downloads a second torch.
    """
    cwd = Path(os.environ.get("PWD") or ".").absolute()
    if asked_for := os.environ.get("SELFREG_FAST_TORCH"):
        folders = [(cwd / asked_for).parent, cwd / asked_for]
    else:
        folders = [Path(p) for p in (*sys.path, sysconfig.get_path("purelib"), *site.getsitepackages())]
        if sys.prefix == sys.base_prefix:  # outside virtual environments, `pip install --user` counts too
            folders.append(Path(site.getusersitepackages()))
        if not PIP_ISOLATES:
            prefixes = [Path(p).parent for p in os.get_exec_path()] + [p / ".venv" for p in (cwd, *cwd.parents)]
            packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/*-packages"  # Debian has dist-packages
            folders += [folder for prefix in prefixes for folder in prefix.glob(packages)]
    for torch in (folder / "torch" for folder in folders):
        if (torch / "include/torch/csrc/stable").is_dir():
            text = (torch / "version.py").read_text()
            version = re.search(r"^__version__ = '((\d+)\.(\d+).*)'", text, re.M)
            if version and (int(version[2]), int(version[3])) >= MIN_TORCH:
                return Torch(torch, version[1], bool(re.search(r"^cuda\b[^=]*= '", text, re.M)))
    if asked_for:
        sys.exit(f"SELFREG_FAST_TORCH={asked_for}: there is no torch >= 2.10 in it")
    return None


def words(variable: str) -> list[str]:
    """The words of an environment variable, as a shell has them."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        sys.exit(f"{variable}={os.environ[variable]}: {error}")


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler, or None. A CXX that does not exist is an error: someone asked for it."""
    if cxx := words("CXX"):
        if not shutil.which(cxx[0]):
            sys.exit(f"CXX={cxx[0]}: no such compiler. Unset CXX, or {WAY_OUT}")
        return cxx
    return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def program(cxx: list[str]) -> str:
    """g++ of "ccache g++ -m64"."""
    launchers = {"ccache", "sccache", "distcc", "icecc"}
    return next((w for w in cxx if not w.startswith("-") and Path(w).name not in launchers), cxx[0])


def describe(cxx: list[str]) -> tuple[str, str]:
    """("g++ 12.2.0", "x86_64"): name and version of a compiler, and the machine it compiles for."""
    text = re.sub(r"\(.*?\)", "", ask(*cxx, "--version"))  # "g++ (Debian 12.2.0-14) 12.2.0"
    number = re.search(r"\d+\.\d+(\.\d+)?", text)
    machine, ours = ask(*cxx, "-dumpmachine").split("-")[0], sysconfig.get_platform().split("-")[-1]
    if {machine, ours} == {"x86_64", "aarch64"}:
        sys.exit(
            f"{shlex.join(cxx)} compiles for {machine}, and this Python is for {ours}: unset CXX, or, for a wheel for "
            f"other machines, set _PYTHON_HOST_PLATFORM=linux-{machine}"
        )
    return f"{Path(program(cxx)).name} {number[0] if number else '?'}", machine


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else the one on PATH, else that of /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def nvcc_flags() -> list[str]:
    """The user's flags for nvcc, which are taken out of the environment: of there, nvcc would put some after ours.

    What --use_fast_math does to logarithms no later flag takes back, so it is left out.
    """
    flags = [*words("NVCC_PREPEND_FLAGS"), *words("NVCC_APPEND_FLAGS")]
    flags = [flag for flag in flags if flag.lstrip("-") != "use_fast_math"]
    host = os.environ.get("NVCC_CCBIN") or (program(CXX) if CXX and os.environ.get("CXX") else "")
    if host and not any(flag.startswith(("-ccbin", "--compiler-bindir")) for flag in flags):
        flags += ["-ccbin", host]
    for variable in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"):
        os.environ.pop(variable, None)
    return flags


def nvcc_version() -> str:
    found = re.search(r"\bV(\d[\d.]*)", ask(NVCC, "--version"))
    return found[1] if found else "?"


def cuda_include() -> str:
    """The directory of nvcc's cuda_runtime.h."""
    found = re.search(r"((?:\\.|\S)+)/cuda_runtime\.h", ask(NVCC, *NVCC_FLAGS, "-M", "-x", "cu", os.devnull))
    return found[1].replace("\\", "") if found else sys.exit(f"{NVCC} finds no cuda_runtime.h")


def gencode(archs: list[str]) -> list[str]:
    """What tells nvcc the architectures: machine code for each, and for those with +PTX, PTX for newer GPUs."""
    flags = []
    for arch in archs:
        number = re.sub(r"\.|\+PTX", "", arch)
        codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
        flags += [word for code in codes for word in ("-gencode", f"arch=compute_{number},code={code}")]
    return flags


def nvcc_knows(arch: str) -> bool:
    command = [NVCC, "--dryrun", *gencode([arch]), "-x", "cu", "-c", os.devnull]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def cuda_archs() -> tuple[list[str], str]:
    """Of the architectures asked for, or of the GPUs here, or of a default for most, those that can be built ("8.0",
    "9.0+PTX"); and those that cannot, with the reason."""
    wanted = os.environ.get("SELFREG_FAST_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or ""
    for family, numbers in FAMILIES.items():
        wanted = re.sub(rf"\b{family}\b(\+PTX)?", numbers, wanted)
    if not wanted.strip("; ,") and shutil.which("nvidia-smi"):
        gpus = ask("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        wanted = ";".join(sorted(set(re.findall(r"^\d+\.\d+$", gpus, re.M))))
    if not wanted.strip("; ,"):
        known = [arch for arch in DEFAULT_ARCHS if nvcc_knows(arch)]
        return [*known[:-1], *(f"{last}+PTX" for last in known[-1:])], ""
    archs, left_out = [], []
    for arch in re.split(r"[;,\s]+", wanted.strip("; ,")):
        number = re.fullmatch(r"(\d+)\.\d[af]?(\+PTX)?", arch)
        if not number:
            sys.exit(f"CUDA architectures: expected a list like '8.0;9.0+PTX', got {arch!r} in it")
        if int(number[1]) < 8:
            left_out.append(f"{arch} (older than 8.0)")
        elif not nvcc_knows(arch):
            left_out.append(f"{arch} (unknown to nvcc {nvcc_version()})")
        else:
            archs.append(arch)
    return archs, ", ".join(left_out)


def mode(variable: str) -> str:
    """ "0", "1" or ""."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{variable}: expected 0, 1 or nothing, got {value!r}")
    return value


def build_folder(root: Path, scratch: Path, name: str) -> tuple[Path, TextIO]:
    """root/build/`name`, where a later build finds its objects, or, if that is read-only, scratch/`name`; its lock.

    Locked as long as this process, or the ninja that it starts, runs: two builds at a time would disturb each other.
    """
    import fcntl

    name = re.sub(r"[^\w.+-]", "-", name)
    folder = Path("build", name)
    try:
        (root / folder).mkdir(parents=True, exist_ok=True)
        lock = (root / folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"selfreg_fast: waits for another build in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        folder = scratch / name
        folder.mkdir()
        lock = (folder / "lock").open("w")
    return folder, lock


def find_ninja() -> str:
    """Where the program is that PyPI's package ninja brings."""
    try:
        import ninja
    except ImportError:
        sys.exit("selfreg_fast is built by ninja, which is not here: pip install ninja")
    return os.path.join(ninja.BIN_DIR, "ninja")


def jobs() -> str:
    """How many compilations to run at once."""
    value = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    return value if re.fullmatch("[1-9][0-9]*", value) else sys.exit(f"MAX_JOBS: expected a number, got {value!r}")


def why_not() -> str | None:
    """Why no kernels are built here (and what to do about it), or None."""
    if mode("SELFREG_FAST_BUILD") == "0":
        return "switched off by SELFREG_FAST_BUILD=0: unset that variable"
    if not sys.platform.startswith("linux"):
        return f"not built on {sys.platform}: this version builds its kernels on Linux only"
    if CXX is None:
        return "no C++ compiler was found: get one (apt-get install g++, say)"
    return None


def why_not_cuda() -> tuple[str | None, list[str], str]:
    """The same for the CUDA kernels; the architectures to build them for; and those that were asked for in vain."""
    if WHY_NOT:
        return WHY_NOT, [], ""
    if mode("SELFREG_FAST_CUDA") == "0":
        return "switched off by SELFREG_FAST_CUDA=0: unset that variable", [], ""
    if mode("SELFREG_FAST_CUDA") == "" and TORCH and not TORCH.cuda:
        here = f"torch {TORCH.version}, which was there then,"
        return f"not built: {here} has no CUDA (SELFREG_FAST_CUDA=1 builds all the same)", [], ""
    if NVCC is None:
        place = f" in CUDA_HOME={os.environ['CUDA_HOME']}" if os.environ.get("CUDA_HOME") else ""
        return f"no nvcc was found{place}: install the CUDA toolkit, or set CUDA_HOME", [], ""
    archs, left_out = cuda_archs()
    return None if archs else f"not built: none of the GPU architectures is supported: {left_out}", archs, left_out


def ask(*command: str) -> str:
    """What a program prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()


# pip lays the environment of a build over the one that it installs into, and only pip does.
PIP_ISOLATES = not Path(setuptools.__file__).is_relative_to(sysconfig.get_path("purelib"))
CXX = None if mode("SELFREG_FAST_BUILD") == "0" else find_compiler()
NVCC_FLAGS = nvcc_flags()
TORCH, NVCC = find_torch(), find_nvcc()
WHY_NOT = why_not()
WHY_NOT_CUDA, ARCHS, LEFT_OUT = why_not_cuda()
for variable, reason in (("SELFREG_FAST_BUILD", WHY_NOT), ("SELFREG_FAST_CUDA", WHY_NOT_CUDA)):
    if mode(variable) == "1" and reason:
        sys.exit(f"{variable}=1, but {reason}")
