"""The operator `selfreg_fast::exit_loss`: one launch for all losses, and all gradients when asked for.

Schema and argument contract: `csrc/operator.h`. Here: its Python form on every backend, and its fake kernel for
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
MOST_EXITS = {"cuda": 16}  # of one launch: kMaxCudaExits; more take passes.py
TARGETS = {"raw": 0, "renormalized": 1, "argmax": 2}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


class Options(NamedTuple):
    """What the launch computes; see `exit_loss_matrix`."""

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
        exits: N tensors (B, C, h, w), any strides, of the size (H, W) = `options.size` or of any other, which is
            resized.
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
