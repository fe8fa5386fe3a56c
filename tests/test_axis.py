"""Where an output's rows and columns lie on an exit: csrc/axis.h, by which the CPU's and the CUDA kernels go, against
exact fractions, F.interpolate and Triton's own."""

import ctypes
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfreg_fast.backends import TRITON_INTERPRETED

HERE = Path(__file__).parent
Axis = Callable[[int, int, bool], tuple[np.ndarray, np.ndarray, np.ndarray]]
# (positions of the exit, of the output): smaller, larger, the same; one of either; not whole ratios; larger than 2^31
# in products.
SIZES = [(41, 321), (64, 512), (7, 9), (300, 301), (9, 9), (1, 8), (2, 9), (8, 1), (1, 1), (130, 9), (21, 20)]
SIZES += [(40_000, 80_001)]


@pytest.fixture(scope="module")
def axis(tmp_path_factory: pytest.TempPathFactory) -> Axis:
    """low and weight of each position of the output; `first` of each of the exit."""
    library = tmp_path_factory.mktemp("axis") / "axis.so"
    source = HERE / "cpu_without_torch/axis.cpp"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{HERE.parent}/csrc", source, "-o", library]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).axis

    def of(size: int, to: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, weight, first = np.empty(to, np.int64), np.empty(to), np.empty(size, np.int64)
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (low, weight, first))
        function(ctypes.c_int64(size), ctypes.c_int64(to), ctypes.c_bool(align_corners), *pointers)
        return low, weight, first

    return of


def exact(size: int, to: int, align_corners: bool) -> list[Fraction]:
    """The definition: centres of pixels, or corners, on each other; not before the first nor after the last."""
    if align_corners:
        step = Fraction(size - 1, to - 1) if to > 1 else Fraction(0)
        return [o * step for o in range(to)]
    positions = (Fraction((2 * o + 1) * size, 2 * to) - Fraction(1, 2) for o in range(to))
    return [min(max(p, Fraction(0)), Fraction(size - 1)) for p in positions]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s[0]}-{s[1]}")
def test_positions(axis: Axis, sizes: tuple[int, int], align_corners: bool) -> None:
    """The nearest float64 to the exact weight, of a pair that exists; and the first position on or after each."""
    size, to = sizes
    low, weight, first = axis(size, to, align_corners)
    expected = exact(size, to, align_corners)
    assert low.tolist() == [max(min(int(p), size - 2), 0) for p in expected]
    assert weight.tolist() == [float(p - int(before)) for p, before in zip(expected, low, strict=True)]
    for position in range(size):
        (after,) = np.nonzero(low >= position)
        assert first[position] == (after[0] if len(after) else to), position


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", SIZES[:-1], ids=lambda s: f"{s[0]}-{s[1]}")
def test_as_interpolate(axis: Axis, sizes: tuple[int, int], align_corners: bool) -> None:
    """F.interpolate of an exit that holds its own positions. It rounds the ratio of the sizes, relative to itself, and
    then each position that it multiplies it with; of the longest it is off by 1e-3, so that one is left out."""
    size, to = sizes
    low, weight, _ = axis(size, to, align_corners)
    numbers = torch.arange(size, dtype=torch.float64).view(1, 1, 1, size)
    there = F.interpolate(numbers, size=(1, to), mode="bilinear", align_corners=align_corners).flatten().numpy()
    assert np.abs(low + weight - there).max() <= 4 * size * np.finfo(float).eps


@pytest.mark.skipif(not TRITON_INTERPRETED, reason="Triton's kernels run on its interpreter only")
@pytest.mark.parametrize("align_corners", [False, True])
def test_as_triton(axis: Axis, align_corners: bool) -> None:
    from selfreg_fast.triton import resize

    small = SIZES[:-1]
    for size, to in small:
        coded = (tuple(2 * x + 3 for x in (1, size, 1, 1, 0)),)  # one exit of one row
        places, weights = torch.zeros(1, 1 + to, dtype=torch.int32), torch.zeros(1, 1 + to, dtype=torch.float64)
        parts = torch.zeros(2, 1, 1 + size, dtype=torch.int32)
        resize.axes_kernel[(1, 1, 2)](
            coded, places, weights, parts, 1, to, 1 + size, int(align_corners), R=2, X=16, HALO=0, BLOCK=512
        )
        low, weight, _ = axis(size, to, align_corners)
        assert places[0, 1:].tolist() == low.tolist(), (size, to)
        assert weights[0, 1:].tolist() == weight.tolist(), (size, to)
