"""The Triton backend: `exit_loss` with the schema of the operator (csrc/ops.cpp), and `scale_`.

It runs on CUDA tensors, and with TRITON_INTERPRET=1 on CPU tensors. Nothing here waits for the GPU: what the means
divide by stays on the device. The kernels are compiled at the first call with new options or another number of
channels or exits; sizes and strides are arguments. :func:`warmup` compiles ahead of time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..backends import TRITON_INTERPRETED
from . import kernels

__all__ = ["exit_loss", "scale_", "warmup"]

RAW, RENORMALIZED, ARGMAX = 0, 1, 2
MEAN, SUM, NONE = 0, 1, 2
PIXELS, CHANNELS, APART = 0, 1, 2

# As Triton has always compiled; versions from 3.9 on warn where it is left open.
FUSED: dict[str, Any] = {} if TRITON_INTERPRETED else {"enable_fp_fusion": True}


def exit_loss(
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
    """Losses, their weighted sum, and the gradients of the `wanted` exits: see :func:`selfreg_fast.ops.exit_loss`."""
    first = exits[0]
    B, C, H, W = first.shape
    n, pixels = len(exits), B * H * W
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    entries = (len(teachers) + 1) * n
    shape = (len(teachers) + 1, n, *((B, H, W) if reduction == NONE else ()))
    grads = {i: torch.empty_like(exits[i]) for i in wanted}
    if pixels == 0:
        losses = first.new_zeros(shape, dtype=dtype)
        return losses.new_zeros(()), losses, list(grads.values())
    losses = first.new_empty(shape, dtype=dtype)

    with _on_its_device(first):
        norms = _norms(first, labels, class_weight, pixel_weight, ignore_index, mask_soft, reduction, dtype)
        outs = [grads.get(i) for i in range(n)]
        sizes, strides, order = _runs(first.shape, exits, outs)
        config = block_sizes(C, dtype, order)
        layout = _layout(sizes, strides, order, config["BC"], config["BP"])
        tiles = triton.cdiv(sizes[1] * sizes[2], config["BP"])
        programs = sizes[0] * tiles
        partials = None if reduction == NONE else losses.new_empty((entries, programs))
        kernels.exit_loss_kernel[(programs,)](
            tuple(exits),
            tuple(outs),
            _coded(strides),
            labels,
            class_weight,
            pixel_weight,
            grad_losses,
            _pairs(weights) if wanted and grad_losses is None else (),
            norms,
            losses,
            partials,
            C,
            sizes[1],
            sizes[2],
            tiles,
            pixels,
            programs,
            ignore_index,
            float(temperature),
            float(label_smoothing),
            **constants(n, teachers, temperature, target, label_smoothing, mask_soft, detach_teacher, bool(wanted)),
            **layout,
            **config,
            **FUSED,
        )
        if partials is not None:
            _finish(partials, norms, losses, n)
        if weights:
            total = losses.new_empty(())
            kernels.total_kernel[(1,)](losses, _pairs(weights), total, ENTRIES=entries, num_warps=1, **FUSED)
        else:
            total = losses.new_zeros(())
    return total, losses, list(grads.values())


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """grads *= factor, a scalar tensor, in place; where it is 1, which only the device knows, nothing is moved.

    The gradients are dense, as :func:`exit_loss` makes them.
    """
    block = 1 << 20 if TRITON_INTERPRETED else 2048
    for grad in grads:
        n = grad.numel()
        if n:
            with _on_its_device(grad):
                kernels.scale_kernel[(triton.cdiv(n, block),)](grad, factor, n, BLOCK=block, **FUSED)


def warmup(
    num_classes: int,
    num_exits: int,
    *,
    teachers: Sequence[int] = (0, -1),
    labels: torch.dtype | None = torch.int64,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    renormalize: bool = False,
    target: str = "soft",
    class_weight: bool = False,
    label_smoothing: float = 0.0,
    pixel_weight: bool = False,
    detach_teacher: bool = True,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: torch.device | str | None = None,
) -> None:
    """Compiles what a training step with these options needs, so that its first iteration does not wait.

    Args:
        num_classes: channels of the exits.
        num_exits: N.
        teachers: indices of exits, as for :func:`selfreg_fast.exit_loss_matrix`; SR-F is taught by 0, SR-L by -1.
        labels: dtype of the labels; None: there are none.
        dtype: of the exits.
        temperature: only whether it is 1 matters.
        renormalize: as in the loss.
        target: "soft" or "argmax".
        class_weight: whether there are class weights.
        label_smoothing: only whether it is 0 matters.
        pixel_weight: whether there are pixel weights.
        detach_teacher: as in the loss.
        memory_format: of the exits.
        device: of the exits; default: the current CUDA device.
    """
    if device is None:
        device = "cpu" if TRITON_INTERPRETED else "cuda"
    shape = (2, num_classes, 8, 8)
    exits = [torch.zeros(shape, dtype=dtype, device=device).to(memory_format=memory_format) for _ in range(num_exits)]
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [t % num_exits for t in teachers]
    weights = [1.0] * ((len(rows) + 1) * num_exits)
    y = None if labels is None else torch.zeros((2, 8, 8), dtype=labels, device=device)
    c = torch.ones(num_classes, dtype=accurate, device=device) if class_weight else None
    p = torch.ones((2, 8, 8), dtype=accurate, device=device) if pixel_weight else None
    kind = ARGMAX if target == "argmax" else RENORMALIZED if renormalize else RAW
    options = (rows, temperature, kind, 255, label_smoothing, False, detach_teacher, MEAN, shape[2:], False)
    everyone = range(num_exits)
    if dtype == torch.float16:  # its gradients are computed in the backward
        losses = exit_loss(exits, y, c, p, None, weights, (), *options)[1]
        exit_loss(exits, y, c, p, losses, (), everyone, *options)
    else:
        total, _, grads = exit_loss(exits, y, c, p, None, weights, everyone, *options)
        scale_(grads, total)


def _on_its_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# ---- launch parameters -----------------------------------------------------------------------------------------------


def block_sizes(C: int, dtype: torch.dtype, order: int) -> dict[str, int]:
    """Channels and pixels of a tile, and warps. Nothing is measured at run time.

    A thread has a pixel and 4 channels of every exit; where channels are adjacent in memory, 8 of them, a sector of 32
    bytes, lie in neighbouring threads.
    """
    if TRITON_INTERPRETED:  # an operation takes the same time on any tile that stays in cache
        channels = min(triton.next_power_of_2(C), 1024)
        return {"BC": channels, "BP": max(16, 32768 // channels)}
    if order == CHANNELS:
        return {"BC": min(triton.next_power_of_2(C), 8), "BP": 32 if dtype == torch.float64 else 64, "num_warps": 4}
    return {"BC": min(triton.next_power_of_2(C), 2 if dtype == torch.float64 else 4), "BP": 128, "num_warps": 4}


def constants(
    n: int,
    teachers: Sequence[int],
    temperature: float,
    target: int,
    label_smoothing: float,
    mask_soft: bool,
    detach_teacher: bool,
    gradient: bool,
) -> dict[str, Any]:
    """The compile-time options of the main kernel. At temperature 1 both soft targets are the same."""
    if target == RENORMALIZED and temperature == 1:
        target = RAW
    return {
        "TEACHERS": tuple(teachers),
        "ROWS": tuple(teachers.index(i) if i in teachers else -1 for i in range(n)),
        "TARGET": target,
        "UNIT": temperature == 1,
        "SMOOTH": label_smoothing != 0,
        "MASK_SOFT": mask_soft,
        "LEARN": gradient and not detach_teacher and target != ARGMAX and bool(teachers),
        "GRADIENT": gradient,
    }


def _runs(
    shape: Sequence[int], exits: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[tuple[int, int, int], list[list[int]], int]:
    """The sizes (B, H, W) to walk over, strides of exits and gradients, and what is adjacent in memory.

    Dimensions are merged where all tensors allow it: to images that are one run of pixels, (B, 1, H W), if their rows
    follow each other, and to one run in all for channels_last.
    """
    B, _, H, W = shape
    strides = [list((z if g is None else g).stride()) for z, g in zip([*exits, *exits], [*exits, *grads], strict=True)]
    if H == 1 or W == 1 or all(s[2] == W * s[3] for s in strides):
        for s in strides:
            s[3] = s[2] if W == 1 else s[3]
        H, W = 1, H * W
        if B == 1 or W == 1 or all(s[0] == W * s[3] for s in strides):
            for s in strides:
                s[3] = s[0] if W == 1 else s[3]
            B, W = 1, B * W
    for s in strides:  # a dimension of one element has any stride: the same for all
        s[0] = s[0] if B > 1 else 0
        s[2] = s[2] if H > 1 else 0
        s[3] = s[3] if W > 1 else 1
    if all(s[3] == 1 for s in strides):
        order = PIXELS
    elif all(s[1] == 1 for s in strides):
        order = CHANNELS
    else:
        order = APART
    return (B, H, W), strides, order


def _layout(
    sizes: tuple[int, int, int], strides: Sequence[Sequence[int]], order: int, channels: int, pixels: int
) -> dict[str, Any]:
    """The compile-time options of the main kernel about memory, with tiles of `channels` and `pixels`."""
    _, H, W = sizes
    reach = max(channels * s[1] + (H * s[2] + W * s[3] if H > 1 else pixels * s[3]) for s in strides)
    return {"ORDER": order, "ROWWISE": H > 1, "WIDE": reach >= 2**31}


def _coded(strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Strides as the kernel takes them: once where they are all the same, and 2 stride + 3, odd and not 1.

    Triton would compile anew for every 1 and every multiple of 16 in a tuple.
    """
    coded = tuple(tuple(2 * x + 3 for x in s) for s in strides)
    return coded[:1] if all(s == coded[0] for s in coded) else coded


def _pairs(numbers: Sequence[float]) -> tuple[float, ...]:
    """Each number as two that fit float32, in which Triton passes them; their sum is good for float64."""
    pairs: list[float] = []
    for x in numbers:
        high: float = struct.unpack("f", struct.pack("f", x))[0]
        pairs += (high, x - high)
    return tuple(pairs)


# ---- phases 0 and 3 --------------------------------------------------------------------------------------------------


def _norms(
    first: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    mask_soft: bool,
    reduction: int,
    dtype: torch.dtype,
) -> Tensor:
    """What label losses and soft losses are multiplied with, [2] float64: 1, or 1 over the divisor of their mean."""
    pixels = first.numel() // first.shape[1]
    if reduction != MEAN:
        return first.new_ones(2, dtype=torch.float64)
    if labels is None and pixel_weight is None:
        return first.new_full((2,), 1 / pixels, dtype=torch.float64)
    block = 1 << 16 if TRITON_INTERPRETED else 2048
    programs = triton.cdiv(pixels, block)
    partials = first.new_empty((2, programs), dtype=dtype)
    kernels.count_kernel[(programs,)](
        labels, class_weight, pixel_weight, partials, first.shape[1], pixels, programs, ignore_index,
        MASK_SOFT=mask_soft, BP=block, **FUSED,
    )  # fmt: skip
    norms = first.new_empty(2, dtype=torch.float64)
    _finish(partials, None, norms, 0)
    return norms


def _finish(partials: Tensor, norms: Tensor | None, out: Tensor, n: int) -> None:
    entries, programs = partials.shape
    kernels.finish_kernel[(entries,)](partials, norms, out, programs, n, BLOCK=1024, **FUSED)
