"""The Triton kernels, compiled for sm_90 on any machine, and what their launchers launch them with.

To be used in a process of its own, without TRITON_INTERPRET: Triton then takes the machine for one with an H100.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import struct
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from . import sass
from .kernels import Case, Launch

FORMATS = {"i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
FORMATS |= {"fp32": "f", "f32": "f", "fp64": "d"}


def launchers(launched: Callable[..., None]) -> Any:
    """The module of the launchers. Where they launch a kernel, it is compiled, and launched(kernel, compiled, grid,
    values of the parameters by name) is called."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())
    run = JITFunction.run

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched(self, binary, grid, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return binary

    JITFunction.run = compile_it  # type: ignore[method-assign]
    import selfreg_fast.triton as module

    return module


def launch(kernel: Any, binary: Any, grid: tuple[int, ...], values: dict[str, Any]) -> Launch:
    """What `launched` was called with, as a GPU gets it."""
    parameters = b""
    scratch = [("*i8", 0)] * 2  # the kernels want no memory besides
    for kind, value in [*_flat([(kind, values.get(name)) for name, kind in binary.src.signature.items()]), *scratch]:
        field = struct.Struct("Q" if kind[0] == "*" else FORMATS[kind])
        parameters += bytes(-len(parameters) % field.size)
        parameters += field.pack(value.data_ptr() if torch.is_tensor(value) else value)
    threads = 32 * binary.metadata.num_warps
    return Launch(_code(binary.asm["cubin"]), tuple(grid), (threads, 1), binary.metadata.shared, parameters)


@cache
def _code(cubin: bytes) -> sass.Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (kernel,) = sass.read(Path(file.name), lambda symbol: symbol).values()
        return kernel


def _flat(arguments: Iterable[tuple[Any, Any]]) -> list[tuple[str, Any]]:
    """Types and values, those in tuples one after the other, without constants."""
    flat = []
    for kind, value in arguments:
        if isinstance(kind, tuple):
            flat += _flat(zip(kind, value, strict=True))
        elif kind != "constexpr":
            flat.append((kind, value))
    return flat


class Memory:
    """That of tensors on the CPU, and nothing else."""

    def __init__(self, values: dict[str, Any]) -> None:
        tensors: list[torch.Tensor] = []
        rest = list(values.values())
        while rest:
            value = rest.pop()
            if torch.is_tensor(value):
                tensors.append(value)
            elif isinstance(value, (tuple, list)):
                rest += value
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.begins = sorted(storages)
        self.ends = [begin + storages[begin] for begin in self.begins]

    def _check(self, at: int, size: int) -> None:
        n = bisect.bisect(self.begins, at) - 1
        if n < 0 or at + size > self.ends[n]:
            raise IndexError(f"access to {size} bytes at {at:#x}, which are no tensor's")

    def load(self, at: int, size: int) -> int:
        self._check(at, size)
        return int.from_bytes(ctypes.string_at(at, size), "little")

    def store(self, at: int, size: int, value: int) -> None:
        self._check(at, size)
        ctypes.memmove(at, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"), size)


def execute(kernel: Any, binary: Any, grid: tuple[int, ...], values: dict[str, Any]) -> None:
    """Runs a launch: to be given to `launchers`."""
    it, memory = launch(kernel, binary, grid, values), Memory(values)
    program = sass.Program(it.kernel, it.parameters, it.grid, it.block, memory.load, memory.store)
    for z in range(it.grid[2] if len(it.grid) > 2 else 1):
        for y in range(it.grid[1] if len(it.grid) > 1 else 1):
            for x in range(it.grid[0]):
                program.run((x, y, z))


def objective(
    module: Any, case: Case, exits: list[torch.Tensor], labels: torch.Tensor | None
) -> tuple[torch.Tensor, float, list[torch.Tensor]]:
    """The matrix, the total and the gradients, by the launchers of `module`."""
    n = len(exits)
    weights = [0.8] * n + [1.0] * (len(case.teachers) * n)
    options = (case.teachers, case.temperature, module.RAW, 255, 0.0, False, True, module.MEAN, case.shape[2:], False)
    total, losses, gradients = module.exit_loss(exits, labels, None, None, None, weights, range(n), *options)
    return losses, float(total), gradients


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Which take no memory until they are written to: torch.zeros writes them."""
    return torch.from_numpy(numpy.zeros(math.prod(shape) * dtype.itemsize, numpy.uint8)).view(dtype).view(shape)


class Counted:
    """The main kernels' launches. One in a process."""

    def __init__(self) -> None:
        self.main: tuple[Any, ...] = ()
        self.launchers = launchers(self._launched)

    def _launched(self, kernel: Any, *rest: Any) -> None:
        name = kernel.fn.__name__
        if name == "axes_kernel":  # what the main kernel takes addresses from
            execute(kernel, *rest)
        elif name.startswith("exit_"):
            self.main = kernel, *rest

    def launch(self, case: Case, dtype: str) -> tuple[str, Launch, Memory, int]:
        """The kernel's name, the launch, its memory, and the output pixels x channels x exits of a program.

        All logits and labels are 0.
        """
        B, C, H, W = case.shape
        kind = getattr(torch, dtype)
        if case.channels_last:
            exits = [_zeros((B, *size, C), kind).movedim(-1, 1) for size in case.sizes]
        else:
            exits = [_zeros((B, C, *size), kind) for size in case.sizes]
        labels = _zeros((B, H, W), torch.int64) if case.labels else None
        objective(self.launchers, case, exits, labels)
        kernel, binary, grid, values = self.main
        it = launch(kernel, binary, grid, values)
        return kernel.fn.__name__, it, Memory(values), values["BP"] * C * len(exits)
