"""Which backends there are on this machine, why the others are not, and which one a call takes.

Importing this module loads the compiled kernels, once. It never raises: what cannot be loaded is explained by
`backends`, and the reference serves in its stead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

AVAILABLE = "available"
NAMES = ("cuda", "triton", "cpu", "reference")

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY = _PACKAGE / "_C.abi3.so"
_CUDA_LIBRARY = _PACKAGE / "_C_cuda.abi3.so"
_IN_SOURCE_TREE = (_PACKAGE.parent / "setup.py").is_file()
_REINSTALL = (
    f"pip install -e {_PACKAGE.parent}"
    if _IN_SOURCE_TREE
    else "pip install --force-reinstall --no-deps . (in the source directory of selfreg_fast)"
)


def build_record() -> dict[str, Any]:
    """What the installation wrote down: "cpu" and "cuda" ("built" or why not), with what, for what; {} if nothing."""
    try:
        record = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _load_cpu() -> str:
    """Loads the CPU kernels and the operators' schemas. Returns "available", or why not and what to do about it."""
    record = build_record()
    if not _LIBRARY.is_file():
        if _IN_SOURCE_TREE and not record:
            return (
                f"not built: this is the source tree {_PACKAGE.parent}, not an installed package. Install it "
                f"(pip install {_PACKAGE.parent}) and start Python in another directory, or: {_REINSTALL}"
            )
        reason = record.get("cpu", "built")
        return f"{'its file _C.abi3.so is missing' if reason == 'built' else reason}; to reinstall: {_REINSTALL}"
    built, running = record.get("torch", "unknown"), str(torch.__version__)
    versions = f"built against torch {built}, running in torch {running}"
    if tuple(int(v) for v in running.split(".")[:2]) < (2, 10):
        return f"needs torch 2.10 or newer ({versions}): pip install 'torch>=2.10'"
    if str(_LIBRARY) in torch.ops.loaded_libraries:  # this module was reloaded
        return AVAILABLE
    if hasattr(torch.ops.selfreg_fast, "isa"):  # a second registration would abort the process
        others = sorted(path for path in torch.ops.loaded_libraries if Path(path).name == _LIBRARY.name)
        return f"another copy of selfreg_fast is loaded in this process ({', '.join(others)}): restart Python with one"
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except Exception as error:  # OSError by its documentation; no kind of it is worth a failing import
        return f"cannot be loaded ({versions}): {error.__cause__ or error}; to reinstall: {_REINSTALL}"
    return AVAILABLE


def _load_cuda() -> str:
    """Loads the CUDA kernels, where this torch has use for them. The operators' schemas come with the CPU kernels."""
    library = Path(CUDA_ON_HOST) if CUDA_ON_HOST else _CUDA_LIBRARY
    if not CUDA_ON_HOST and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: see https://pytorch.org/get-started for one with it"
    if not CPU_KERNELS:
        return f"needs the compiled operators, which are missing: {_STATUS['cpu']}"
    if not library.is_file():
        reason = build_record().get("cuda", "built")
        return f"{f'its file {library} is missing' if reason == 'built' else reason}; to reinstall: {_REINSTALL}"
    try:
        if str(library) not in torch.ops.loaded_libraries:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except Exception as error:
        return f"cannot be loaded in torch {torch.__version__}: {error.__cause__ or error}; to reinstall: {_REINSTALL}"
    return AVAILABLE


def _find_triton() -> str:
    """Whether there is a Triton and anything for it to run on. It is imported by the first call that needs it."""
    if torch.version.cuda is None and not TRITON_INTERPRETED:
        return f"torch {torch.__version__} is built without CUDA (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return AVAILABLE


# For tests, two backends can compute on CPU tensors: Triton's kernels in its interpreter, and the CUDA kernels where
# their sources are compiled for the CPU (tests/cuda_on_host) into the library that this variable names.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_ON_HOST = os.environ.get("SELFREG_FAST_CUDA_ON_HOST", "")

_STATUS: dict[str, str] = {"cpu": _load_cpu(), "reference": AVAILABLE}
CPU_KERNELS = _STATUS["cpu"] == AVAILABLE
_STATUS["cuda"] = _load_cuda()
_STATUS["triton"] = _find_triton()
CUDA_KERNELS = _STATUS["cuda"] == AVAILABLE
TRITON_KERNELS = _STATUS["triton"] == AVAILABLE

# The type of the tensors -> the backends for it, the one that "auto" prefers first. It never goes beyond the reference.
_SERVING: dict[str, tuple[str, ...]] = {
    "cuda": ("reference",) if CUDA_ON_HOST else ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference", *(("triton",) if TRITON_INTERPRETED else ()), *(("cuda",) if CUDA_ON_HOST else ())),
}
_AUTO = {device: next(n for n in names if _STATUS[n] == AVAILABLE) for device, names in _SERVING.items()}
_warned: set[str] = set()

if not CPU_KERNELS and _LIBRARY.is_file():  # built, but of no use here: say so at once
    _warned.add("cpu")
    warnings.warn(f"selfreg_fast: no CPU kernels, the slow reference serves: {_STATUS['cpu']}", stacklevel=2)


def backends() -> dict[str, str]:
    """The state of each backend.

    Returns:
        {"cuda": ..., "triton": ..., "cpu": ..., "reference": ...}: "available", or why not and what to do about it.
    """
    if torch.cuda.is_available():
        _look_at_gpu(torch.cuda.current_device())
    states = {name: _STATUS[name] for name in NAMES}
    for name in ("cuda", "triton"):
        if states[name] == AVAILABLE and device_of(name) == "cuda" and not torch.cuda.is_available():
            states[name] = "torch sees no CUDA device on this machine (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
    return states


def device_of(name: str) -> str:
    """The type of the tensors on which a backend is checked: "cuda" or "cpu"."""
    return "cpu" if name in _SERVING["cpu"] else "cuda"


def choose(name: str, device_type: str, device: int = 0) -> str:
    """The backend that serves a call.

    "auto" is the first available of cuda, triton, reference for CUDA tensors, of cpu, reference for CPU tensors, and
    the reference for all others. The CUDA kernels are available where they are built for every GPU that torch sees, and
    can be loaded on those that were asked for; a first call within torch.compile does not look. Where kernels are meant
    to serve and others do, or none, it warns, once.

    Args:
        name: "auto", "cuda", "triton", "cpu" or "reference".
        device_type: the tensors' `device.type`.
        device: their `device.index`, if they are CUDA tensors.

    Returns:
        "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: no backend has that name, or it does not compute on such tensors.
        RuntimeError: the backend asked for is not available.
    """
    # In the hot path, and traced by torch.compile: look-ups of strings in what does not change, nothing else.
    if device_type == "cuda" and not torch.compiler.is_compiling() and device not in _gpus_seen:
        _look_at_gpu(device)
    if name == "auto":
        chosen = _AUTO.get(device_type, "reference")
        if chosen == "reference" and device_type in _SERVING and not torch.compiler.is_compiling():
            _warn_of_fallback(device_type)
        return chosen
    check_name(name)
    if name not in _SERVING.get(device_type, ("reference",)):
        raise ValueError(f"backend: {name!r} does not compute on {device_type} tensors; pass backend='auto'")
    if _STATUS[name] != AVAILABLE:
        raise RuntimeError(f"backend {name!r}: {_STATUS[name]}")
    return name


def check_name(name: str) -> None:
    """ValueError for what is neither "auto" nor a backend's name."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {NAMES}, got {name!r}")


def _look_at_gpu(device: int) -> None:
    """Takes the CUDA kernels back where a GPU here cannot run them, or where they cannot be loaded on this one.

    It looks once a GPU, and not when this module is imported, for to ask anything starts CUDA in this process, and to
    load a kernel takes memory on the GPU: that is done only on those that are used.
    """
    if device in _gpus_seen or CUDA_ON_HOST or _STATUS["cuda"] != AVAILABLE:
        return
    try:
        problem = _not_built_for_a_gpu() or _not_loaded(device)
    except (RuntimeError, AssertionError):  # a GPU in exclusive use, a forked process: the call itself will say so
        return
    _gpus_seen.add(device)
    if problem:
        _STATUS["cuda"] = problem
        _AUTO["cuda"] = next(name for name in _SERVING["cuda"] if _STATUS[name] == AVAILABLE)
        if _AUTO["cuda"] != "reference":  # of which the call warns
            warnings.warn(f"selfreg_fast: cuda tensors take {_AUTO['cuda']}. cuda: {problem}", stacklevel=4)


def _not_built_for_a_gpu() -> str:
    """Which GPU here the kernels have no code for, and what to do about it; "" if there is none."""
    archs = build_record().get("archs", [])
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if runs_on(capability, archs):
            continue
        number = ".".join(map(str, capability))
        gpu = f"{torch.cuda.get_device_name(device)} (compute capability {number})"
        return f"built for {', '.join(archs)}, not for the {gpu}: " + (
            "the kernels need 8.0 or newer"
            if capability < (8, 0)
            else f"to reinstall: SELFREG_FAST_CUDA_ARCHS={number} {_REINSTALL}"
        )
    return ""


def _not_loaded(device: int) -> str:
    """Why a kernel cannot be loaded on this GPU, in CUDA's words, and what to do about it; "" if it can."""
    error = torch.ops.selfreg_fast.load_cuda(device)
    if not error:
        return ""
    nvcc = build_record().get("nvcc") or "unknown"
    return (
        f"cannot be loaded on GPU {device}: {error}. Built with nvcc {nvcc}: an older driver needs the kernels of an "
        f"older nvcc. To reinstall: {_REINSTALL}"
    )


_gpus_seen: set[int] = set()


def runs_on(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether kernels built for `archs` ("8.0", "9.0a", "9.0+PTX", ...) run on a GPU of this compute capability.

    Machine code runs on GPUs of the same major version that are not older, that of "a" only on its own, that of "f" on
    its family; PTX on all that are not older
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#binary-compatibility).
    """
    for arch in archs:
        built = tuple(int(number) for number in re.findall(r"\d+", arch))
        if capability == built or (
            capability > built and "a" not in arch and (capability[0] == built[0] or arch.endswith("+PTX"))
        ):
            return True
    return not archs  # what an installation does not say is no reason


def _warn_of_fallback(device_type: str) -> None:
    if device_type in _warned:
        return
    _warned.add(device_type)
    reasons = "; ".join(f"{n}: {_STATUS[n]}" for n in _SERVING[device_type] if n != "reference")
    warnings.warn(f"selfreg_fast: {device_type} tensors take the slow reference. {reasons}", stacklevel=2)
