"""Stand-ins for a GPU: the CUDA kernels compiled for the CPU (cuda_on_host/), and Triton's interpreter.

The same sources compute, so the same tests run; what a GPU alone can show is in test_on_gpu.py.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "tests" / "cuda_on_host"
SOURCES = ROOT / "csrc" / "cuda"
STORAGE_TYPES = range(4)
FLAGS = {
    "plain": "-O1",
    "address": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-O1 -g1 -fsanitize=thread",
}
# Under a sanitizer a storage type takes a minute to compile, and float16's kernels are bfloat16's but for conversions.
LEFT_OUT = {"plain": (), "address": (2,), "thread": (2,)}
PRELOAD = {"plain": [], "address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}


def environment(mode: str = "plain") -> dict[str, str]:
    """Variables under which `import selfreg_fast` finds the CUDA kernels of this mode on the CPU."""
    preload = [_printed(["g++", f"-print-file-name={name}"]) for name in PRELOAD[mode]]
    return {
        "SELFREG_FAST_CUDA_ON_HOST": str(build(mode)),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python, at its end
        "OMP_NUM_THREADS": "1",
        **({"LD_PRELOAD": ":".join(preload)} if preload else {}),
    }


@functools.cache
def same_places() -> list[str]:
    """A command to begin with: some systems place memory at random, further than the thread sanitizer expects."""
    setarch = ["setarch", "-R"]
    works = shutil.which("setarch") and subprocess.run([*setarch, "true"], capture_output=True).returncode == 0
    return setarch if works else []


def build(mode: str = "plain") -> Path:
    """The library, compiled if there is none of these sources and flags yet."""
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++17", *shlex.split(FLAGS[mode]), "-fPIC", "-fvisibility=hidden", "-pthread", f"-I{SHIM}"]
    flags += ["-DSELFREG_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch_root}/include"]
    state = hashlib.sha256(repr((flags, torch.__version__, _printed(["g++", "--version"]))).encode())
    sources = (f for folder in (ROOT / "csrc", SHIM) for f in folder.rglob("*"))
    for file in sorted(f for f in sources if f.suffix in (".h", ".cpp", ".cu")):  # and not what an import leaves there
        state.update(f"{file}\0".encode() + file.read_bytes())
    folder = ROOT / "build" / f"cuda_on_host-{mode}-{state.hexdigest()[:16]}"
    library = folder / "library.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    left_out = LEFT_OUT[mode]
    kernels = [(SOURCES / "exit_loss.cu", [f"-DSELFREG_STORAGE={s}"]) for s in STORAGE_TYPES if s not in left_out]
    kernels += [(SHIM / "left_out.cpp", [f"-I{SOURCES}"])] * len(left_out)
    others = [(f, []) for f in (SOURCES / "launch.cu", SOURCES / "ops_cuda.cpp", SHIM / "cuda_on_host.cpp")]
    part = folder / f"part{os.getpid()}"  # of this process alone, until it is whole

    def compile_one(job: tuple[int, tuple[Path, list[str]]]) -> str:
        number, (source, defines) = job
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        _run(["g++", *flags, *defines, *language, "-c", str(source), "-o", f"{part}-{number}.o"])
        return f"{part}-{number}.o"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, enumerate(kernels + others)))
    link = ["-shared", *objects, f"-L{torch_root}/lib", "-Wl,--no-as-needed", "-ltorch_cpu"]
    _run(["g++", *flags, *link, "-o", f"{part}.so"])
    for file in objects:
        Path(file).unlink()
    Path(f"{part}.so").replace(library)
    return library


def stand_in() -> list[str]:
    """Where there is no GPU, makes the backends "cuda" and "triton" compute on the CPU. To be called before
    selfreg_fast is imported. Says what it did."""
    if torch.cuda.is_available():
        return []
    done = []
    if "SELFREG_FAST_CUDA_ON_HOST" not in os.environ and shutil.which("g++"):
        os.environ["SELFREG_FAST_CUDA_ON_HOST"] = str(build())
        done.append("cuda: compiled for the CPU")
    if "TRITON_INTERPRET" not in os.environ and importlib.util.find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"
        done.append("triton: interpreted")
    return done


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def _printed(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
