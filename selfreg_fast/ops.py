"""The operator `selfreg_fast::exit_loss`: one launch for all losses, and all gradients when asked for.

Schema and argument contract: `csrc/ops.cpp`. Here: its Python form on every backend, and its fake kernel for
`torch.compile`. The Triton kernels serve the same schema under a name of their own, so that they need no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import CPU_KERNELS, CUDA_KERNELS, CUDA_ON_HOST, TRITON_KERNELS

SCHEMA = (
    "(Tensor[] exits, Tensor? labels, Tensor? class_weight, Tensor? pixel_weight, Tensor? grad_losses, "
    "float[] weights, int[] wanted, int[] teachers, float temperature, int target, int ignore_index, "
    "float label_smoothing, bool mask_soft, bool detach_teacher, int reduction, SymInt[] size, "
    "bool align_corners) -> (Tensor, Tensor, Tensor[])"
)
OPERATORS = {
    "cpu": "exit_loss",
    "cuda": "exit_loss_cuda_on_host" if CUDA_ON_HOST else "exit_loss",
    "triton": "exit_loss_triton",
}
MOST_EXITS = {"cuda": 16}  # of a launch: kMaxCudaExits
TARGETS = {"raw": 0, "renormalized": 1, "argmax": 2}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


def resizes(backend: str, exit_size: Sequence[int], size: Sequence[int]) -> bool:
    """Whether the backend's kernels interpolate from `exit_size` to `size`; else the exit is resized beforehand.

    On a GPU, exits larger than the output are left to `F.interpolate`: what it makes of them is no larger than they.
    """
    return backend == "cpu" or (backend == "cuda" and exit_size[0] <= size[0] and exit_size[1] <= size[1])


class Options(NamedTuple):
    """What the launch computes; see :func:`selfreg_fast.exit_loss_matrix`."""

    teachers: tuple[int, ...]
    temperature: float
    target: str
    ignore_index: int
    label_smoothing: float
    mask_soft: bool
    detach_teacher: bool
    reduction: str
    size: tuple[int, int]
    align_corners: bool


def exit_loss(
    backend: str,
    exits: Sequence[Tensor],
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    grad_losses: Tensor | None,
    weights: Sequence[float],
    wanted: Sequence[int],
    options: Options,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, their weighted sum, and the gradients of the `wanted` exits.

    Args:
        backend: "cpu", "cuda" or "triton".
        exits: N tensors (B, C, h, w), any strides, of the size (H, W) = `options.size` or of one that :func:`resizes`
            allows.
        labels: (B, H, W) uint8, int32 or int64.
        class_weight: (C,) in the losses' dtype.
        pixel_weight: (B, H, W) in the losses' dtype.
        grad_losses: gradient of the losses, of their shape and dtype, from which the exits' gradients follow.
        weights: (T + 1) N numbers, used as `grad_losses` where that is None; empty: the total is 0.
        wanted: indices of the exits whose gradients are to be written.
        options: the rest.

    Returns:
        total (), losses (T + 1, N) or (T + 1, N, B, H, W), gradients of exits[i] for i in wanted.
    """
    most = MOST_EXITS.get(backend)
    if most is not None and len(exits) > most:
        return _exit_loss_in_passes(
            most, backend, exits, labels, class_weight, pixel_weight, grad_losses, weights, wanted, options
        )
    operator = getattr(torch.ops.selfreg_fast, OPERATORS[backend])
    result: tuple[Tensor, Tensor, list[Tensor]] = operator(
        exits,
        labels,
        class_weight,
        pixel_weight,
        grad_losses,
        weights,
        wanted,
        options.teachers,
        options.temperature,
        TARGETS[options.target],
        options.ignore_index,
        options.label_smoothing,
        options.mask_soft,
        options.detach_teacher,
        REDUCTIONS[options.reduction],
        options.size,
        options.align_corners,
    )
    return result


def _exit_loss_in_passes(
    most: int,
    backend: str,
    exits: Sequence[Tensor],
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    grad_losses: Tensor | None,
    weights: Sequence[float],
    wanted: Sequence[int],
    options: Options,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """:func:`exit_loss` of more exits than a launch takes: some teachers with some students at a time.

    Every entry of the losses belongs to one pass, where alone it has a weight; so totals and gradients add up.
    """
    n, rows = len(exits), len(options.teachers) + 1
    order = [*options.teachers, *(e for e in range(n) if e not in options.teachers)]  # then blocks are slices
    learns = not options.detach_teacher and options.target != "argmax"
    total: Tensor | None = None
    losses: Tensor | None = None
    grads: dict[int, Tensor] = {}
    if grad_losses is not None:
        grad_losses = torch.stack([grad_losses[:, e] for e in order], 1)
    step = min(max(rows - 1, 1), most // 2)
    for t0 in range(0, max(rows - 1, 1), step):
        t1 = min(t0 + step, rows - 1)
        room = most - (t1 - t0)
        spans = [(s, min(s + room, b)) for a, b in ((0, t0), (t1, n)) for s in range(a, b, room)]
        for s0, s1 in spans:
            first = (s0, s1) == spans[0]  # here the teachers are students, too
            members = [*order[t0:t1], *order[s0:s1]]
            owned = [(1, t0 + 1, t1 + 1, t1 - t0, s0, s1)]  # block's row and rows, block's column and columns
            owned += [(1, t0 + 1, t1 + 1, 0, t0, t1)] if first else []
            owned += [(0, 0, 1, t1 - t0, s0, s1)] if t0 == 0 else []
            owned += [(0, 0, 1, 0, t0, t1)] if t0 == 0 and first else []
            block = [[0.0] * len(members) for _ in range(t1 - t0 + 1)]
            block_grad = None
            if grad_losses is not None:
                block_grad = grad_losses.new_zeros((len(block), len(members), *grad_losses.shape[2:]))
            for row, r0, r1, column, c0, c1 in owned:
                if block_grad is not None and grad_losses is not None:
                    block_grad[row : row + r1 - r0, column : column + c1 - c0] = grad_losses[r0:r1, c0:c1]
                if weights:
                    for r in range(r0, r1):
                        for c in range(c0, c1):
                            block[row + r - r0][column + c - c0] = weights[r * n + order[c]]
            teachers_too = learns or (first and (t0 == 0 or t1 - t0 > 1))
            block_wanted = [i for i, e in enumerate(members) if e in wanted and (teachers_too or i >= t1 - t0)]
            block_total, block_losses, block_grads = exit_loss(
                backend,
                [exits[e] for e in members],
                labels,
                class_weight,
                pixel_weight,
                block_grad,
                [w for row in block for w in row] if weights else (),
                block_wanted,
                options._replace(teachers=tuple(range(t1 - t0))),
            )
            total = block_total if total is None else total + block_total
            if losses is None:
                losses = block_losses.new_zeros((rows, n, *block_losses.shape[2:]))
            for row, r0, r1, column, c0, c1 in owned:
                losses[r0:r1, c0:c1] = block_losses[row : row + r1 - r0, column : column + c1 - c0]
            for i, g in zip(block_wanted, block_grads, strict=True):
                e = members[i]
                grads[e] = grads[e] + g if e in grads else g
    assert total is not None and losses is not None
    back = [order.index(e) for e in range(n)]
    return total, torch.stack([losses[:, c] for c in back], 1), [grads[e] for e in wanted]


def _fake_exit_loss(
    exits: Sequence[Tensor],
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    grad_losses: Tensor | None,
    weights: Sequence[float],
    wanted: Sequence[int],
    teachers: Sequence[int],
    temperature: float,
    target: int,
    ignore_index: int,
    label_smoothing: float,
    mask_soft: bool,
    detach_teacher: bool,
    reduction: int,
    size: Sequence[int],
    align_corners: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    first = exits[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    maps = (first.shape[0], *size) if reduction == REDUCTIONS["none"] else ()
    losses = first.new_empty((len(teachers) + 1, len(exits), *maps), dtype=dtype)
    return losses.new_empty(()), losses, [torch.empty_like(exits[i]) for i in wanted]


def scale_(backend: str, grads: Sequence[Tensor], factor: Tensor) -> None:
    """grads *= factor, a scalar tensor, in place: on a GPU no more than a launch where it is 1."""
    if backend == "cpu":
        torch._foreach_mul_(list(grads), factor)
    elif backend == "cuda":
        getattr(torch.ops.selfreg_fast, "scale_cuda_on_host_" if CUDA_ON_HOST else "scale_")(grads, factor)
    else:
        from . import triton

        triton.scale_(grads, factor)


def _triton_exit_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    from . import triton  # takes a second to import, and may never be needed

    return triton.exit_loss(*arguments)


if CPU_KERNELS:
    torch.library.register_fake("selfreg_fast::exit_loss", _fake_exit_loss)
if CUDA_KERNELS and CUDA_ON_HOST:
    torch.library.register_fake("selfreg_fast::exit_loss_cuda_on_host", _fake_exit_loss)
if TRITON_KERNELS:
    _library = torch.library.Library("selfreg_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
    _library.define("exit_loss_triton" + SCHEMA)  # type: ignore[no-untyped-call]
    _library.impl(  # type: ignore[no-untyped-call]
        "exit_loss_triton", _triton_exit_loss, "CompositeExplicitAutograd"
    )
    torch.library.register_fake("selfreg_fast::exit_loss_triton", _fake_exit_loss, lib=_library)
