"""What a process finds around it: environment variables, and memory that there is not."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import selfreg_fast
from selfreg_fast.backends import CUDA_ON_HOST, runs_on


def run(program: str, **environment: str) -> str:
    """What a program of its own prints; in tests/, for sys.path begins with the working directory."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ISA = """
import selfreg_fast, torch
print(torch.ops.selfreg_fast.isa())
"""


def test_an_empty_isa_is_none() -> None:
    """As after `SELFREG_FAST_ISA= python ...`: one of the machine's, as where it is unset."""
    assert run(ISA, SELFREG_FAST_ISA="") in ("baseline", "avx2", "avx512")


# 200,000 channels: 0.8 MB an exit, and two tiles of at least 64 pixels in scratch, 51 MB each.
NO_MEMORY = """
import resource, torch, selfreg_fast
torch.set_num_threads(1)
exits, labels = [torch.zeros(1, 200_000, 1, 1)], torch.zeros(1, 1, 1, dtype=torch.int64)
selfreg_fast.mea_loss([torch.zeros(1, 2, 1, 1)], labels, backend="cpu")
with open("/proc/self/statm") as pages:
    used = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    selfreg_fast.mea_loss(exits, labels, backend="cpu")
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(selfreg_fast.mea_loss(exits, labels, backend="cpu").item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_no_memory_for_scratch() -> None:
    """An error that says how much it would have been, not the end of the process; with more of it, all is well."""
    said, loss = run(NO_MEMORY).rsplit("\n", 1)
    found = re.search(r"out of memory: a thread could not have (\d+) bytes of scratch", said)
    assert found and int(found[1]) > 100_000_000, said
    assert abs(float(loss) - math.log(200_000)) < 1e-4


# A GPU that the process believes to be there, and CUDA kernels for other ones.
OLD_GPU = """
import sys, torch, selfreg_fast
backends = sys.modules["selfreg_fast.backends"]
backends._STATUS |= {"cuda": "available", "triton": "available"}
backends._AUTO["cuda"] = "cuda"
backends.CUDA_ON_HOST = ""
backends._SERVING["cuda"] = "cuda", "triton", "reference"
backends.build_record = lambda: {"archs": %r, "nvcc": "13.0"}
torch.ops.selfreg_fast.load_cuda = ["", "no image"].__getitem__
torch.cuda.current_device = lambda: 0
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda device: [(9, 0), %r][device]
torch.cuda.get_device_name = lambda device: "Tesla Old"
if %r:
    print(torch.compile(lambda: backends.choose("auto", "cuda"), fullgraph=True, backend="eager")(), end=" ")
torch.cuda.is_available = lambda: True
print(backends.choose("auto", "cuda"), selfreg_fast.backends()["cuda"])
try:
    backends.choose("cuda", "cuda")
except RuntimeError as error:
    print(error)
"""


def test_a_gpu_that_the_kernels_do_not_run_on() -> None:
    """`backends()` names it and says what to do, "auto" takes the next backend; torch.compile asks no GPU."""
    said = run(OLD_GPU % (["8.0", "9.0+PTX"], (7, 5), True)).splitlines()
    assert said[0].startswith("cuda triton built for 8.0, 9.0+PTX, not for the Tesla Old (compute capability 7.5): ")
    assert said[0].endswith("the kernels need 8.0 or newer") and said[1].startswith("backend 'cuda': built for 8.0")
    said = run(OLD_GPU % (["9.0"], (8, 6), False)).splitlines()
    assert "to reinstall: SELFREG_FAST_CUDA_ARCHS=8.6 pip install" in said[0]
    assert run(OLD_GPU % (["8.0", "9.0+PTX"], (12, 0), False)) == "cuda available"


LOADING = """
print(backends.choose("auto", "cuda", 0), selfreg_fast.backends()["cuda"])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print([backends.choose("auto", "cuda", 1) for _ in range(2)], len(caught), caught[0].message)
print(selfreg_fast.backends()["cuda"])
"""


def test_kernels_that_cannot_be_loaded_on_a_gpu() -> None:
    """Asked once a GPU, when it is used: "auto" goes on to the next backend with one warning, `backends()` says why."""
    before = OLD_GPU[: OLD_GPU.index("print(backends.choose")] % (["8.0", "9.0+PTX"], (9, 0), False)
    said = run(f"import warnings{before}{LOADING}").splitlines()
    assert said[0] == "cuda available"
    assert said[1].startswith(
        "['triton', 'triton'] 1 selfreg_fast: cuda tensors take triton. cuda: cannot be loaded on "
    )
    assert said[2].startswith("cannot be loaded on GPU 1: no image. Built with nvcc 13.0: ")


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (["8.0", "9.0+PTX"], [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        (["8.6"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["9.0a"], [(9, 0)], [(8, 0), (10, 0)]),
        (["9.0a+PTX"], [(9, 0)], [(10, 0)]),
        (["10.0f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ([], [(7, 5), (9, 0)], []),
    ],
)
def test_architectures_that_run_on_a_gpu(archs: list[str], runs: list[tuple[int, int]], does_not: list) -> None:
    assert all(runs_on(gpu, archs) for gpu in runs)
    assert not any(runs_on(gpu, archs) for gpu in does_not)


NO_IMAGE = r"no kernel image is available for execution on the device \(cudaErrorNoKernelImageForDevice\)"


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("cudaDeviceGetAttribute 35", r"driver version is insufficient .* \(cudaErrorInsufficientDriver\)"),
        ("cudaFuncSetAttribute 209", NO_IMAGE),
        ("cudaOccupancyMaxActiveBlocksPerMultiprocessor 2", r"out of memory \(cudaErrorMemoryAllocation\)"),
        ("cudaLaunchKernelEx 209", NO_IMAGE),
    ],
)
@pytest.mark.parametrize("size", [(6, 8), (3, 4)])
def test_the_first_error_of_cuda_is_the_one_told(
    monkeypatch: pytest.MonkeyPatch, fails: str, said: str, size: tuple[int, int]
) -> None:
    """Whatever fails first, with exits of either kind; nothing of it is kept, and the next call is right."""
    if not CUDA_ON_HOST or selfreg_fast.backends()["cuda"] != "available":
        pytest.skip("failures are injected where CUDA's runtime is the tests' own")
    exits = [torch.randn(1, 3, *size) for _ in range(2)]
    labels = torch.zeros(1, 6, 8, dtype=torch.uint8)

    def total() -> float:
        return selfreg_fast.self_regulation_loss(exits, labels, backend="cuda").total.item()

    expected = total()
    with ThreadPoolExecutor(1) as new_thread:  # which knows of no kernel yet
        monkeypatch.setenv("CUDA_ON_HOST_FAILS", fails)
        with pytest.raises(RuntimeError, match=f"CUDA: .*{said}"):
            new_thread.submit(total).result()
        monkeypatch.delenv("CUDA_ON_HOST_FAILS")
        assert new_thread.submit(total).result() == expected


def test_what_loading_a_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA_ON_HOST or selfreg_fast.backends()["cuda"] != "available":
        pytest.skip("failures are injected where CUDA's runtime is the tests' own")
    assert torch.ops.selfreg_fast.load_cuda(0) == ""
    monkeypatch.setenv("CUDA_ON_HOST_FAILS", "cudaFuncGetAttributes 209")
    assert re.fullmatch(NO_IMAGE, torch.ops.selfreg_fast.load_cuda(0))
