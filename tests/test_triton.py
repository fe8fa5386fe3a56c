"""The Triton kernels as a GPU would get them: compiled for sm_90 on any machine, without spills, once for all sizes.

Their results are compared with the reference in the other files, on a GPU or in Triton's interpreter. Here a process of
its own runs the real launchers on CPU tensors, with a driver that compiles for an H100 and launches nothing, or
executes the machine code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine_code
import pytest
from machine_code import Case

from benchmarks.counted import on_triton

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

Report = dict[str, Any]

PARTS = 2  # of LAUNCHES, which may compile beside each other

EIGHTH: Report = {"size": (2, 64, 128), "exit_sizes": [(8, 16)] * 5}

PYRAMID: Report = {"size": (2, 64, 128), "exit_sizes": [(2, 4), (4, 8), (8, 16), (16, 32), (64, 128)]}

# What compiles: C, dtype, and how it differs from five exits, of which the first and the last teach, with labels, of a
# size that vectors of 4 divide.
LAUNCHES: dict[str, Report] = {
    "19-float32": {"channels": 19, "dtype": "float32"},
    "21-float32": {"channels": 21, "dtype": "float32"},
    "21-float32-odd": {"channels": 21, "dtype": "float32", "size": (2, 33, 65)},
    "21-bfloat16": {"channels": 21, "dtype": "bfloat16"},
    "21-float16-recomputed": {"channels": 21, "dtype": "float16", "recompute": True},
    "21-float32-temperature": {"channels": 21, "dtype": "float32", "temperature": 2.0},
    "21-float32-renormalised": {"channels": 21, "dtype": "float32", "temperature": 2.0, "target": 1},
    "21-float32-argmax": {"channels": 21, "dtype": "float32", "target": 2},
    "21-float32-learning": {"channels": 21, "dtype": "float32", "temperature": 2.0, "detach": False},
    "21-float32-weights": {"channels": 21, "dtype": "float32", "weights": True, "smoothing": 0.1},
    "21-float32-channels_last": {"channels": 21, "dtype": "float32", "temperature": 2.0, "channels_last": True},
    "21-bfloat16-channels_last": {"channels": 21, "dtype": "bfloat16", "channels_last": True},
    "21-float32-maps": {"channels": 21, "dtype": "float32", "recompute": True, "reduction": 2},
    "32-float32-channels_last": {"channels": 32, "dtype": "float32", "temperature": 2.0, "channels_last": True},
    "150-float32": {"channels": 150, "dtype": "float32", "temperature": 2.0},
    "150-bfloat16": {"channels": 150, "dtype": "bfloat16"},
    "150-float64": {"channels": 150, "dtype": "float64"},
    "150-bfloat16-channels_last": {"channels": 150, "dtype": "bfloat16", "channels_last": True},
    "1000-float32": {"channels": 1000, "dtype": "float32"},
    "19-bfloat16-resized": {"channels": 19, "dtype": "bfloat16", **EIGHTH},
    "21-float32-resized": {"channels": 21, "dtype": "float32", "temperature": 2.0, **EIGHTH},
    "21-float32-resized-learning": {"channels": 21, "dtype": "float32", "temperature": 2.0, "detach": False, **EIGHTH},
    "21-float32-resized-half": {"channels": 21, "dtype": "float32", "size": (2, 64, 128), "exit_sizes": [(32, 64)] * 5},
    "21-bfloat16-resized-mixed": {"channels": 21, "dtype": "bfloat16", **PYRAMID},
}


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_is_spilled(part: int) -> None:
    """No kernel of a training step keeps registers in memory."""
    for name, kernels in _in_a_process_of_its_own("launches", part).items():
        assert any(k["kernel"].startswith("exit_") for k in kernels)
        for k in kernels:
            print(f"{name}: {k['kernel']}: {k['registers']} registers, {k['shared']} bytes shared")
            assert k["stack"] == 0, (name, k)


@pytest.mark.long
def test_machine_code_computes() -> None:
    """What has been compiled for sm_90, in float32, is executed, instruction by instruction."""
    _in_a_process_of_its_own("computes")


@pytest.mark.long
def test_few_kernels_are_compiled() -> None:
    """Crops of 20 sizes, even, odd and 1, of two batch sizes, with other ignored labels, temperatures and weights need
    no others; after `warmup`, a step on real sizes compiles nothing. And strides of 2^31 elements and more are kept."""
    found = _in_a_process_of_its_own("counts")
    for counts in found["crops"]:  # of exits of the output's size; of exits of an eighth of it
        assert counts["exit_rows_kernel"] >= 1
        assert all(count <= 3 for count in counts.values()), counts
    before, after = found["warmup"]
    assert before["exit_rows_kernel"] == 2
    assert before == after
    assert found["strides"] == {"near": False, "far": True, "far_image": False}


def _in_a_process_of_its_own(*task: Any) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [p for p in sys.path if p and Path(p).is_dir()]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as cache:
        environment.setdefault("TRITON_CACHE_DIR", cache)
        run = subprocess.run(
            [sys.executable, __file__, *map(str, task)], env=environment, capture_output=True, text=True, timeout=1800
        )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------- in the other process


def _kernels(launchers: Any) -> dict[str, Any]:
    from triton.runtime.jit import JITFunction

    modules = (launchers.kernels, launchers.resize)
    found = {name: kernel for module in modules for name, kernel in vars(module).items()}
    return {name: kernel for name, kernel in found.items() if isinstance(kernel, JITFunction)}


def _binaries(launchers: Any) -> list[tuple[str, Any]]:
    """What has been compiled so far."""
    kernels = _kernels(launchers).items()
    return [
        (name, b) for name, kernel in kernels if 0 in kernel.device_caches for b in kernel.device_caches[0][0].values()
    ]


def _counts(launchers: Any) -> dict[str, int]:
    names = [name for name, _ in _binaries(launchers)]
    return {name: names.count(name) for name in names}


def _step(
    launchers: Any,
    size: Sequence[int],
    channels: int,
    dtype: str,
    *,
    temperature: float = 1.0,
    target: int = 0,
    detach: bool = True,
    weights: bool = False,
    smoothing: float = 0.0,
    recompute: bool = False,
    channels_last: bool = False,
    reduction: int = 0,
    ignore_index: int = 255,
    weight: float = 0.8,
    exit_sizes: Sequence[Sequence[int]] | None = None,
) -> None:
    """Five exits of one training step: forward and gradient."""
    import torch

    b, h, w = size
    layout = torch.channels_last if channels_last else torch.contiguous_format
    exits = [
        torch.empty((b, channels, *s), dtype=getattr(torch, dtype), memory_format=layout)
        for s in exit_sizes or [(h, w)] * 5
    ]
    accurate = torch.float64 if dtype == "float64" else torch.float32
    labels = torch.zeros(size, dtype=torch.int64)
    class_weight = torch.ones(channels, dtype=accurate) if weights else None
    pixel_weight = torch.ones(size, dtype=accurate) if weights else None
    options = ([0, 4], temperature, target, ignore_index, smoothing, False, detach, reduction, size[1:], False)
    if recompute:
        losses = launchers.exit_loss(exits, labels, class_weight, pixel_weight, None, (), (), *options)[1]
        launchers.exit_loss(exits, labels, class_weight, pixel_weight, losses, (), range(5), *options)
        return
    total, _, grads = launchers.exit_loss(
        exits, labels, class_weight, pixel_weight, None, [weight] * 15, range(5), *options
    )
    launchers.scale_(grads, total)


def _resources(binary: Any) -> Report:
    """Registers, stack and shared memory, by cuobjdump, which comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}  # type: ignore[index]
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "shared": binary.metadata.shared}


def _forget(launchers: Any) -> None:
    for kernel in _kernels(launchers).values():
        kernel.device_caches.clear()


def _launches(launchers: Any, part: str) -> dict[str, list[Report]]:
    result, known = {}, {}
    for name, launch in list(LAUNCHES.items())[int(part) :: PARTS]:
        _forget(launchers)
        _step(launchers, **{"size": (2, 32, 64), **launch})
        for _, binary in _binaries(launchers):
            if binary.hash not in known:
                known[binary.hash] = _resources(binary)
        result[name] = [{"kernel": kernel, **known[binary.hash]} for kernel, binary in _binaries(launchers)]
    return result


def _crops(launchers: Any) -> list[dict[str, int]]:
    import random

    rng = random.Random(0)
    sizes = [(rng.choice((1, 4)), rng.randint(1, 200), rng.randint(1, 200)) for _ in range(16)]
    sizes += [(4, 128, 128), (2, 1, 1), (1, 16, 16), (16, 3, 1)]
    result = []
    for part in (1, 8):
        _forget(launchers)
        for i, size in enumerate(sizes):
            exit_size = tuple(-(-d // part) for d in size[1:])
            options = {"ignore_index": 255 - i, "weight": 0.1 * i, "temperature": 1.5 + i}
            _step(launchers, size, 21, "float32", exit_sizes=[exit_size] * 5, **options)
        result.append(_counts(launchers))
    return result


def _warmup(launchers: Any) -> list[dict[str, int]]:
    _forget(launchers)
    launchers.warmup(21, 5, dtype=_dtype("bfloat16"), device="cpu")
    launchers.warmup(21, 5, dtype=_dtype("bfloat16"), device="cpu", output_stride=8)
    before = _counts(launchers)
    _step(launchers, (3, 97, 64), 21, "bfloat16")
    _step(launchers, (3, 193, 128), 21, "bfloat16", exit_sizes=[(25, 16)] * 5)
    return [before, _counts(launchers)]


def _counts_of_all(launchers: Any) -> dict[str, Any]:
    return {"crops": _crops(launchers), "warmup": _warmup(launchers), "strides": _strides(launchers)}


# A pixel a thread, in either layout; a pixel over lanes, over warps; exits resized, of sizes that differ; a larger one.
MACHINE_CODE = (
    Case("planes", (1, 5, 7, 20), ((7, 20),) * 3, (0, 2)),
    Case("rows", (1, 5, 7, 19), ((7, 19),) * 2, (1,), channels_last=True),
    Case("lanes", (1, 40, 4, 9), ((4, 9),) * 2, (0,), channels_last=True),
    Case("warps", (1, 150, 3, 11), ((3, 11),) * 2, (1,)),
    Case("resized", (1, 5, 12, 20), ((6, 10), (3, 5), (12, 20)), (0, 2)),
    Case("larger", (1, 5, 12, 16), ((16, 20),) * 2, (0,)),
)


def _computes(launchers: Any) -> None:
    for case in MACHINE_CODE:
        machine_code.check(case, partial(on_triton.objective, launchers, case))


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _strides(launchers: Any) -> dict[str, bool]:
    import torch

    result = {}
    views = {"near": (1 << 24, 1 << 20, 1024, 1), "far": (1 << 40, 1 << 30, 1024, 1), "far_image": (1 << 33, 64, 8, 1)}
    for name, strides in views.items():
        exit = torch.empty_strided((2, 21, 8, 8), strides, device="meta")
        sizes, found, order = launchers._runs(exit.shape, [exit], [exit])
        result[name] = launchers._layout(sizes, found, 4, 128)["WIDE"]
    return result


if __name__ == "__main__":
    tasks = {"launches": _launches, "counts": _counts_of_all, "computes": _computes}
    handle = on_triton.execute if sys.argv[1] == "computes" else lambda *launch: None
    print(json.dumps(tasks[sys.argv[1]](on_triton.launchers(handle), *sys.argv[2:])))
