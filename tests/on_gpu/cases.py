"""Losses and gradients of every way through the kernels, against the reference in float64.

    python -m on_gpu.cases BACKEND [--first | --tiny] [--part K/N]

Memory that nobody has written yet is filled with NaN, each case runs twice and has to give the same bits, and errors
are measured against the bounds that the package promises (tests/support.py). `--tiny` is for compute-sanitizer, under
which everything is slow: a case of each kind of kernel, on few pixels, in memory as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from support import (
    in_double,
    leaves,
    magnitudes,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    share_of_bound,
    share_where_rounded,
    upstream,
)
from torch import Tensor

import selfreg_fast as srf
from selfreg_fast import reference
from selfreg_fast.backends import device_of

from . import REHEARSAL, emit, say

DTYPES = ("float32", "bfloat16", "float16")
# What is asked for. The first two take the kernels' common way, whose gradients are written forward and backward; the
# others, which are asked for in turns, the ways for what is rare.
COMMON = ("objective", "matrix")
RARE: dict[str, dict[str, Any]] = {
    "smoothed": {"teachers": (0, -1), "temperature": 2, "label_smoothing": 0.1, "weighted": True},
    "renormalised": {"teachers": (0, -1), "temperature": 3, "renormalize": True},
    "argmax": {"teachers": (1, 0), "target": "argmax"},
    "maps": {"teachers": (-1,), "temperature": 2, "reduction": "none"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "objective": {"teachers": (0, -1), "temperature": 2},
    "matrix": {"teachers": (0, -1), "temperature": 2},
    "learning": {"teachers": (0, -1), "temperature": 2, "detach_teacher": False},
    **RARE,
}
# On a GPU, rows are multiplied until an exit has about so many elements: more tiles than blocks run at a time.
ELEMENTS = 1 if REHEARSAL else 2_000_000


class Case(NamedTuple):
    """Three exits of `channels`, in images of two, resized to `size` if they have `own` sizes."""

    what: str  # the kernels that it is for
    channels: int
    size: tuple[int, int]
    kind: str = "matrix"
    dtype: str = "float32"
    layout: str = "contiguous"
    own: tuple[tuple[int, int], ...] = ()
    tiny: bool = False  # also for compute-sanitizer

    @property
    def name(self) -> str:
        sizes = "" if not self.own else " from " + ", ".join(f"{h}x{w}" for h, w in dict.fromkeys(self.own))
        return f"{self.what}, C {self.channels}, {self.size[0]}x{self.size[1]}{sizes}, {self.kind}, {self.dtype}"


def _in_turns(cases: Sequence[Case], kinds: Sequence[str], dtypes: Sequence[str] = DTYPES) -> list[Case]:
    """The cases with the kinds and the dtypes in turns."""
    turns = zip(cases, itertools.cycle(kinds), itertools.cycle(dtypes))
    return [case._replace(kind=kind, dtype=dtype) for case, kind, dtype in turns]


EVEN, TWO, ODD = (6, 8), (6, 7), (5, 7)  # accesses of four pixels, of two, of one
WIDE = (40, 321)  # several blocks side by side
EIGHTH = ((3, 4),) * 3
SEVERAL = ((3, 4), (5, 7), (9, 12))
BESIDE = ((12, 16), (24, 32), (3, 4))  # smaller than the output, or of its size
MIXED = ((12, 16), (24, 32), (40, 36))  # smaller than the output, of its size, larger


def cuda_cases() -> list[Case]:
    """Every shape of csrc/cuda's kernels; tests/test_gpu_stages.py holds them against the list of what is compiled."""
    planes = [Case("planes", c, EVEN) for c in (7, 12, 19, 21, 24, 27, 30, 32, 40, 59)]
    planes += [Case("planes", 7, TWO), *(Case("planes", c, ODD) for c in (5, 13, 21))]
    planes += [Case("planes, over warps", c, ODD) for c in (150, 256, 600)]
    rare = [Case("planes", c, EVEN) for c in (8, 12, 22, 30)] + [Case("planes", 6, TWO)]
    rare += [Case("planes", c, ODD) for c in (3, 13, 21)] + [Case("planes, over warps", 150, EVEN)]
    found = _in_turns(planes, COMMON) + _in_turns(rare, list(RARE))

    last = {"layout": "channels_last"}
    rows = [Case("rows", c, ODD, **last) for c in (5, 13, 21, 32)]
    found += _in_turns(rows, COMMON, ("float32",)) + _in_turns(rows, list(RARE))
    found += _in_turns([Case("rows", c, EVEN, **last) for c in (5, 13, 19, 21, 24)], COMMON, DTYPES[1:])
    lanes = [Case("lanes", c, ODD, **last) for c in (40, 100, 160, 256, 300)]
    lanes += [Case("lanes", c, ODD, **last) for c in (41, 99, 150, 250, 301)]
    found += _in_turns(lanes, COMMON) + _in_turns(lanes, list(RARE), DTYPES[1:] + DTYPES[:1])

    small = [Case("small exits", c, (24, 32), own=EIGHTH) for c in (5, 13, 19, 21, 30, 40, 200)]
    small += [Case("small exits", 21, (24, 32), own=SEVERAL), Case("small exits", 12, (24, 33), own=EIGHTH, **last)]
    small += [Case("small exits", 19, WIDE, own=((5, 41),) * 3)]
    beside = [Case("beside small exits", 21, WIDE, own=((20, 161), WIDE, (5, 41)))]
    beside += [Case("beside small exits", c, (24, 32), own=BESIDE) for c in (5, 13, 40)]
    halves = [Case("small exits", c, (24, 32), own=((12, 16),) * 3) for c in (5, 13, 21, 40)]
    larger = [Case("larger", c, (24, 32), own=MIXED) for c in (5, 21, 300)]
    found += _in_turns(small, COMMON) + _in_turns(beside, COMMON, DTYPES[1:] + DTYPES[:1])
    found += _in_turns(beside, list(RARE)) + _in_turns(halves, list(RARE)) + _in_turns(halves[2:], list(RARE)[1:])
    found += _in_turns(larger, COMMON, DTYPES[1:])

    blocks = [
        Case("blocks", 1, ODD),
        Case("blocks", 21, EVEN),
        Case("blocks", 300, ODD),
        Case("blocks", 40, ODD, **last),
    ]
    blocks += [Case("blocks, resized", 21, (24, 32), own=MIXED), Case("blocks, resized", 300, (8, 8), own=EIGHTH)]
    found += _in_turns(blocks, ["matrix", *RARE, "learning"], ("float64",))
    many = [Case("blocks", 1100, EVEN), Case("blocks", 1100, ODD, **last), Case("blocks", 21, ODD)]
    many += [Case("blocks, resized", 650, (8, 8), own=EIGHTH)]
    return _marked(found + _in_turns(many, ["learning"]))


def triton_cases() -> list[Case]:
    """Every kind of tile of selfreg_fast/triton's kernels. Each is compiled, for some ten seconds: few."""
    last = {"layout": "channels_last"}
    found = [Case("rows of pixels", c, EVEN) for c in (7, 21, 30)] + [Case("rows of pixels", 21, ODD)]
    found += [Case("over warps", c, ODD) for c in (59, 150)]
    found += [Case("rows", c, ODD, **last) for c in (5, 21)] + [Case("lanes", c, ODD, **last) for c in (32, 150, 300)]
    found += [Case("small exits", c, (24, 32), own=EIGHTH) for c in (21, 40)]
    found += [Case("resized", 13, (24, 32), own=SEVERAL), Case("resized", 13, (24, 32), own=MIXED)]
    found = _in_turns(found, COMMON)
    found += _in_turns([Case("rows of pixels", 12, EVEN), Case("rows", 12, EVEN, **last)], list(RARE))
    blocks = [Case("blocks", 1100, ODD), Case("blocks", 12, EVEN), Case("blocks", 40, ODD, **last)]
    blocks += [Case("blocks, transposed", 12, ODD, layout="transposed")]
    return _marked(found + _in_turns(blocks, ["matrix", "learning"], ("float32", "float64")))


def _marked(cases: list[Case]) -> list[Case]:
    """The first cases of each kind of kernel, with and without what is rare, are the tiny ones."""
    seen: set[tuple[str, bool]] = set()
    marked = []
    for case in cases:
        key = case.what, case.kind in COMMON
        marked.append(case._replace(tiny=key not in seen and case.channels > 1))
        seen |= {key} if case.channels > 1 else set()
    return marked


def first_cases() -> list[Case]:
    """One of each dtype and layout, as they are and resized."""
    found = []
    for dtype, layout in itertools.product((*DTYPES, "float64"), ("contiguous", "channels_last")):
        found.append(Case("same size", 21, EVEN, "objective", dtype, layout))
        found.append(Case("resized", 21, (24, 32), "objective", dtype, layout, EIGHTH))
    return found


# ---------------------------------------------------------------------------------------------------- a case, computed


@contextlib.contextmanager
def poison(wanted: bool) -> Iterator[None]:
    """Fills memory that torch hands out with NaN, and bytes with 255: what is read before it is written shows."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def arguments(case: Case, device: str, rows: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Exits and options, made on the CPU and copied: on the GPU nothing else writes them. `rows`: times as many."""
    height, width = case.size
    size = height * rows, width
    sizes = [(h * rows, w) for h, w in case.own] or [size] * 3
    dtype = getattr(torch, case.dtype)
    exits = make_exits(3, (2, case.channels, *size), dtype=dtype, sizes=sizes, layout=case.layout)
    kwargs = dict(OPTIONS[case.kind])
    kinds = (torch.int64, torch.int32, torch.uint8)
    kwargs["labels"] = make_labels(
        (2, *size), case.channels, dtype=kinds[case.channels % (3 if case.channels < 255 else 2)]
    )
    if kwargs.pop("weighted", False):
        kwargs["class_weight"] = make_class_weight(case.channels)
        kwargs["pixel_weight"] = make_pixel_weight((2, *size))
    if case.own:
        kwargs["size"] = size
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return [z.to(device) for z in exits], there


def computed(module: Any, case: Case, exits: Sequence[Tensor], kwargs: dict[str, Any]) -> list[Tensor]:
    """[losses, gradient of each exit]: of the objective's total, or of the matrix under a random gradient.

    The mean's gradient is multiplied by the number of pixels, or in float16 it would underflow.
    """
    inputs, kwargs = leaves(exits), dict(kwargs)
    labels = kwargs.pop("labels")
    if case.kind == "objective":
        del kwargs["teachers"]
        loss = module.self_regulation_loss(inputs, labels, **kwargs).total
    else:
        loss = module.exit_loss_matrix(inputs, labels, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, given(case, loss, labels.numel()))]


def given(case: Case, loss: Tensor, pixels: int) -> Tensor:
    """The gradient of the loss."""
    return (1 if case.kind == "maps" else pixels) * upstream("one" if case.kind == "objective" else "random", loss)


def share(
    case: Case, actual: Sequence[Tensor], exits: Sequence[Tensor], kwargs: dict[str, Any], interpreted: bool
) -> float:
    """The largest error as a share of what the package promises."""
    exactly, doubles = in_double(kwargs), [z.double() for z in exits]
    exact = computed(reference, case, doubles, exactly)
    labels = kwargs["labels"]
    grad = given(case, exact[0], labels.numel())
    if case.kind == "objective":
        weights = torch.ones((3, 3), dtype=torch.float64, device=grad.device)
        weights[1, 0] = weights[2, 2] = 0  # teachers do not teach themselves
        losses, *gradients = magnitudes(exits, weights * grad, **exactly)
        added = [(weights * losses).sum(), *gradients]
    else:
        added = magnitudes(exits, grad, **exactly)
    dtype = exits[0].dtype
    if dtype == torch.float64:  # which the reference rounds as well
        tau = kwargs.get("temperature", 1)
        return share_where_rounded(exits, actual, exact, added, labels.shape[1:], tau, bool(case.own))
    # In bfloat16, Triton's interpreter cuts off where a GPU rounds to the nearest.
    return share_of_bound(actual, exact, added, dtype, 2 if interpreted and dtype == torch.bfloat16 else 1)


def check(case: Case, backend: str, poisoned: bool, exact: bool, rows: int) -> dict[str, Any]:
    """Computes a case twice. Its record: whether it passed, how far it is from the bound, what is wrong with it."""
    exits, kwargs = arguments(case, device_of(backend), rows)
    with poison(poisoned):
        first, second = (computed(srf, case, exits, kwargs | {"backend": backend}) for _ in range(2))
    wrong = []
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        wrong.append("two runs differ, or there is a NaN")
    if not all(x.cpu().isfinite().all() for x in first):
        wrong.append("not finite")
    used = share(case, first, exits, kwargs, REHEARSAL and backend == "triton") if exact else None
    if used is not None and not used <= 1:
        wrong.append(f"{used:.3g} times the promised bound")
    return {"name": case.name, "backend": backend, "passed": not wrong, "share_of_bound": used, "wrong": wrong}


def gpu_is_lost() -> bool:
    """Whether a kernel has left this process without a GPU, as an access beyond all memory does."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return not REHEARSAL
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m on_gpu.cases", description=__doc__)
    parser.add_argument("backend", choices=["cuda", "triton"])
    parser.add_argument("--first", action="store_true", help="a call of each dtype and layout; ends where one fails")
    parser.add_argument("--tiny", action="store_true", help="for compute-sanitizer")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="without the first N")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="selfreg_fast: logits of one channel")
    cases = first_cases() if options.first else triton_cases() if options.backend == "triton" else cuda_cases()
    part, parts = map(int, options.part.split("/"))
    cases = [case for case in cases if case.tiny or not options.tiny][part - 1 :: parts][options.after :]
    failed, worst, begin = 0, (0.0, "none"), time.monotonic()
    for number, case in enumerate(cases, options.after + 1):
        print(case.name, flush=True)  # before it is computed: it may be the last one
        # Of float64's resized exits, what the reference rounds grows with the number of rows.
        few = options.first or options.tiny or (case.own and case.dtype == "float64")
        rows = max(1, ELEMENTS // (2 * case.channels * case.size[0] * case.size[1])) | 1  # odd: widths stay as they are
        start = time.monotonic()
        try:
            record = check(case, options.backend, not options.tiny, not options.tiny, 1 if few else rows)
        except Exception as error:
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
            record = {"name": case.name, "backend": options.backend, "passed": False, "wrong": [wrong]}
        emit("check", **record, seconds=round(time.monotonic() - start, 3))
        worst = max(worst, (record.get("share_of_bound") or 0.0, case.name))
        if not record["passed"]:
            failed += 1
            say(f"FAILED {case.name}: {'; '.join(record['wrong'])}")
            if options.first:
                return 1
            if gpu_is_lost():
                say("and no call works after it" + ("" if options.tiny else ": the other cases go on in a new process"))
                if options.tiny:  # which would go on without its sanitizer
                    return 1
                again = [sys.executable, "-m", "on_gpu.cases", options.backend]
                done = subprocess.run([*again, "--part", options.part, "--after", str(number)])
                return done.returncode or 1
    if not options.tiny:
        told = f"{len(cases) - failed} of {len(cases)} cases passed in {time.monotonic() - begin:.0f} s"
        say(f"{options.backend}: {told}; the largest error is {worst[0]:.0%} of what is promised ({worst[1]})")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
