"""The Triton backend: `exit_loss` with the schema of the operator (csrc/operator.h), and `scale_`.

It runs on CUDA tensors, and with TRITON_INTERPRET=1 on CPU tensors. Nothing here waits for the GPU: what the means
divide by stays on the device. The kernels are compiled at the first call with new options or another number of
channels or exits; sizes and strides are arguments. :func:`warmup` compiles ahead of time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..backends import TRITON_INTERPRETED
from . import kernels, resize

__all__ = ["exit_loss", "scale_", "warmup"]

RAW, RENORMALIZED, ARGMAX = 0, 1, 2
MEAN, SUM, NONE = 0, 1, 2
PIXELS, CHANNELS, ROWS, APART = 0, 1, 2, 3

# Registers a thread of rows of some twenty channels: room for 11 warps a multiprocessor. Before 3.9 Triton would spill
# then, and gets no limit.
ROW_REGISTERS = 184 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 255
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
    B, C = first.shape[:2]
    H, W = size
    n, pixels = len(exits), B * H * W
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    entries = (len(teachers) + 1) * n
    shape = (len(teachers) + 1, n, *((B, H, W) if reduction == NONE else ()))
    whole = [z.shape[2] > H and z.shape[3] > W for z in exits]  # its gradient is 0 in most places
    grads = {i: (torch.zeros_like if whole[i] else torch.empty_like)(exits[i]) for i in wanted}
    if pixels == 0:
        losses = first.new_zeros(shape, dtype=dtype)
        return losses.new_zeros(()), losses, list(grads.values())
    losses = first.new_empty(shape, dtype=dtype)

    with _on_its_device(first):
        options = constants(n, teachers, temperature, target, label_smoothing, mask_soft, detach_teacher, bool(wanted))
        places = [grads.get(i, exits[i]) for i in range(n)]  # each exit's gradient, or what has its strides
        wide = dtype == torch.float64 or options["LEARN"]
        plain = class_weight is None and pixel_weight is None and not label_smoothing and not mask_soft
        others = [i for i in range(n) if tuple(exits[i].shape[2:]) != (H, W)]
        resized: _Resized | None = None
        if others:
            held = 0 if wide else rows_held(options, labels is not None)
            resized = _Resized(exits, others, wanted, (B, C, H, W), dtype, align_corners, held, plain, options["UNIT"])
            walk, strides, config = (B, H, W), [list(z.stride()) for z in (*exits, *places)], resized.config
        else:
            walk, strides, order = _runs(first.shape, exits, [_like_gradient(z) for z in places])
            vector = vector_length(walk, C, strides, order, [*exits, *grads.values()])
            config = {} if wide else row_tiles(C, vector, rows_held(options, labels is not None), order, plain)
            config = config or block_tiles(C, dtype, order)
            config |= _layout(walk, strides, config["BC"], config["BP"])
        tiles = resized.tiles if resized else triton.cdiv(walk[1] * walk[2], config["BP"])
        programs = walk[0] * tiles
        partials = None if reduction == NONE else losses.new_empty((entries, programs))
        norms, gains = _norms(
            labels, class_weight, pixel_weight, C, pixels, ignore_index, mask_soft, reduction, losses,
            weights if wanted and grad_losses is None else (), grad_losses if wanted else None,
        )  # fmt: skip
        data = (_coded(strides), labels, class_weight, pixel_weight, gains, losses, partials)
        numbers = (*walk[1:], tiles, pixels, programs, ignore_index, float(temperature), float(label_smoothing))
        also = resized.arguments if resized else None
        if "K" in config:
            options = {key: options[key] for key in ("TEACHERS", "TARGET", "UNIT", "SMOOTH", "MASK_SOFT")}
            options["WANTED"] = sum(1 << i for i in wanted)
            outs = tuple(places) if wanted else ()
            kernels.exit_rows_kernel[(programs,)](
                tuple(exits), outs, *data, also, C, *numbers, **options, **config, **FUSED
            )
        else:
            given = tuple(grads.get(i) for i in range(n))
            kernels.exit_blocks_kernel[(programs,)](
                tuple(exits), given, *data, also, C, *numbers, **options, **config, **FUSED
            )
        if resized:
            resized.collect(places)
        if partials is not None:
            _finish(partials, norms, losses, n)
        if weights:
            total = losses.new_empty(())
            kernels.total_kernel[(1,)](losses, _pairs(weights), total, ENTRIES=entries, num_warps=1, **FUSED)
        else:
            total = losses.new_zeros(())
    return total, losses, list(grads.values())


def _like_gradient(exit: Tensor) -> Tensor:
    """What has the strides of a gradient, so that a launch is cut the same with it and without: the exit (or gradient),
    unless numbers of it share places, being expanded."""
    shares = any(n > 1 and step == 0 for n, step in zip(exit.shape, exit.stride(), strict=True))
    return torch.empty_like(exit, device="meta") if shares else exit


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
    output_stride: float = 1,
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
        output_stride: how many times larger than the exits, which then are all of one size, the output is; at least 1.
            Outputs of less than 128 rows or columns that it does not divide may need another compilation.
    """
    if device is None:
        device = "cpu" if TRITON_INTERPRETED else "cuda"
    shape = (2, num_classes, 32, 32)
    size = (round(32 * output_stride),) * 2
    exits = [torch.zeros(shape, dtype=dtype, device=device).to(memory_format=memory_format) for _ in range(num_exits)]
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [t % num_exits for t in teachers]
    weights = [1.0] * ((len(rows) + 1) * num_exits)
    y = None if labels is None else torch.zeros((2, *size), dtype=labels, device=device)
    c = torch.ones(num_classes, dtype=accurate, device=device) if class_weight else None
    p = torch.ones((2, *size), dtype=accurate, device=device) if pixel_weight else None
    kind = ARGMAX if target == "argmax" else RENORMALIZED if renormalize else RAW
    options = (rows, temperature, kind, 255, label_smoothing, False, detach_teacher, MEAN, size, False)
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


def vector_length(
    sizes: Sequence[int], C: int, strides: Sequence[Sequence[int]], order: int, tensors: Sequence[Tensor]
) -> int:
    """How many neighbours in memory can be accessed at once, wherever a tile begins: 4, or 1.

    Not 2: sizes that 2 divides and 4 does not are rare, and would be one more compilation.
    """
    if order == PIXELS:
        inner = [sizes[2], *(step for s in strides for step in s[:3])]
    elif order == ROWS:
        inner = [sizes[2] * C]
    else:
        return 1
    places = [x.data_ptr() // x.element_size() for x in tensors]
    return 4 if math.gcd(4, *inner, *places) == 4 else 1


def rows_held(options: dict[str, Any], labels: bool) -> int:
    """How many rows of a pixel exit_rows_kernel has in registers: the teachers' targets, and an exit's exponentials."""
    if options["TARGET"] == ARGMAX:
        return 1
    two = labels and options["TARGET"] == RENORMALIZED and bool(options["TEACHERS"])
    return len(options["TEACHERS"]) + 1 + two


def row_tiles(C: int, vector: int, held: int, order: int, plain: bool) -> dict[str, Any]:
    """Tiles of the kernel that keeps rows in registers; nothing where they do not fit. Nothing is measured at run time.

    A thread has up to 128 numbers of the rows held: all channels of `each` pixels, or, where a pixel is shared by
    `groups` threads of neighbouring lanes (channels adjacent) or of as many (half) warps (pixels adjacent), a part.
    """
    channels, groups, each, warps = 1, 1, 1, 4
    held = max(2, held)  # where nobody teaches logits and exponentials, too
    limits = {}
    if order == ROWS and held * C > 96:
        order = CHANNELS
    if order == ROWS:
        channels, warps = triton.next_power_of_2(C), 2  # a single one would exchange by shuffles, and spill
    elif order == CHANNELS:
        groups = channels = 8 if held * triton.cdiv(C, 8) <= 128 else 32
    elif held * C <= 128:
        # Pixels have numbers besides their rows: four leave less room for these.
        each = max(v for v in (1, 2, 4) if v <= vector and held * C * v <= (72 if v == 4 else 128))
        warps = 1
        if plain:  # as many registers as it needs, not as many as there are; with weights it needs more
            limits = {"maxnreg": 128 if held * C * each <= (64 if each == 1 else 48) else ROW_REGISTERS}
    else:
        while held * triton.cdiv(C, groups) > 80 and groups < 32:
            groups *= 2
        channels, warps, vector = 2 * groups, min(groups, max(4, groups // 2)), 1
    if order == APART or held * triton.cdiv(C, groups) > (80 if groups == 32 and order == PIXELS else 128):
        return {}
    pixels = 32 * warps * each // groups
    if TRITON_INTERPRETED:  # an operation takes the same time on any tile that stays in cache
        channels = triton.next_power_of_2(C if order == ROWS else triton.cdiv(C, 2))
        pixels, limits = max(16, 32768 // channels), {}
    tiles = triton.cdiv(C, channels)
    row = {"BC": channels, "BP": pixels, "K": tiles, "LAST": C - (tiles - 1) * channels}
    return {**row, "VEC": vector, "ORDER": order, "num_warps": warps, **limits}


def block_tiles(C: int, dtype: torch.dtype, order: int) -> dict[str, int]:
    """Tiles of the kernel that walks over blocks of channels.

    A thread has a pixel and 4 channels of every exit; where channels are adjacent in memory, 8 of them, a sector of 32
    bytes, lie in neighbouring threads.
    """
    if TRITON_INTERPRETED:  # an operation takes the same time on any tile that stays in cache
        channels = min(triton.next_power_of_2(C), 1024)
        return {"BC": channels, "BP": max(16, 32768 // channels), "ORDER": CHANNELS if order == ROWS else order}
    if order in (CHANNELS, ROWS):
        channels, pixels, order = 8, 32 if dtype == torch.float64 else 64, CHANNELS
    else:
        channels, pixels = 2 if dtype == torch.float64 else 4, 128
    return {"BC": min(triton.next_power_of_2(C), channels), "BP": pixels, "num_warps": 4, "ORDER": order}


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
    shape: Sequence[int], exits: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[tuple[int, int, int], list[list[int]], int]:
    """The sizes (B, H, W) to walk over, strides of exits and gradients, and what is adjacent in memory.

    Dimensions are merged where all tensors allow it: to images that are one run of pixels, (B, 1, H W), if their rows
    follow each other, and to one run in all for channels_last.
    """
    B, C, H, W = shape
    strides = [list(z.stride()) for z in (*exits, *grads)]
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
        whole = B == H == 1 and all(s[3] == C for s in strides)
        order = ROWS if whole and C <= 32 and C not in (8, 16, 32) else CHANNELS
    else:
        order = APART
    return (B, H, W), strides, order


def _layout(
    sizes: tuple[int, int, int], strides: Sequence[Sequence[int]], channels: int, pixels: int
) -> dict[str, Any]:
    """The compile-time options of the main kernel about memory, with tiles of `channels` and `pixels`."""
    _, H, W = sizes
    reach = max(channels * s[1] + (H * s[2] + W * s[3] if H > 1 else pixels * s[3]) for s in strides)
    return {"ROWWISE": H > 1, "WIDE": reach >= 2**31}


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


# ---- exits of other sizes than the output's --------------------------------------------------------------------------


class _Resized:
    """What they need: tables of where the output lies on them, and room for their gradients' parts."""

    def __init__(
        self,
        exits: Sequence[Tensor],
        others: Sequence[int],
        wanted: Sequence[int],
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        align_corners: bool,
        held: int,
        plain: bool,
        unit: bool,
    ) -> None:
        """`others`: which they are; `shape`: (B, C, H, W) of the output; `held`: see rows_held, 0 where none may be."""
        B, C, H, W = shape
        tall, broad = _bits(z.shape[2] > H for z in exits), _bits(z.shape[3] > W for z in exits)
        self.halo = int(tall | broad != 0)
        self.shape = shape
        self.tile = R, X = resized_tile(H, W, C, self.halo)
        down, across = tiles_along(H, R, self.halo), tiles_along(W, X, self.halo)
        self.tiles = down * across
        self.collected = [i for i in others if i in wanted and not tall & broad & 1 << i]
        rows, begin, widest, reach = [], 0, 1, 0
        for i, z in enumerate(exits):
            h, w = z.shape[2:]
            patch = most(R, h, H, align_corners), most(X, w, W, align_corners)
            copy = h if h > H else patch[0], w if w > W else patch[1]
            rows.append((h, w, *copy, begin))
            if i in others:
                widest = max(widest, *patch)
                reach = max(reach, sum(d * s for d, s in zip((C, h, w), z.stride()[1:], strict=True)))
            if i in self.collected:
                width = copy[1] if w > W else copy[1] * across
                reach = max(reach, C * copy[0] * width)
                begin += B * (1 if h > H else down) * C * copy[0] * width
        self.sizes = tuple(tuple(2 * x + 3 for x in row) for row in rows)
        device = exits[0].device
        self.most = max(sum(z.shape[2:]) for z in exits)
        self.copies = torch.empty(begin, dtype=dtype, device=device)
        self.places = torch.empty((len(exits), H + W), dtype=torch.int32, device=device)
        self.parts = torch.empty((2, len(exits), self.most), dtype=torch.int32, device=device)
        weights = torch.empty((len(exits), H + W), dtype=dtype, device=device)
        block = 1024
        longest = max(H, W, *(d for z in exits for d in z.shape[2:]))
        resize.axes_kernel[(triton.cdiv(longest, block), len(exits), 2)](
            self.sizes, self.places, weights, self.parts, H, W, self.most, int(align_corners),
            R=R, X=X, HALO=self.halo, BLOCK=block, **FUSED,
        )  # fmt: skip
        self.arguments = (self.sizes, self.places, weights, self.copies)
        read = max(4, triton.next_power_of_2(widest))
        reached = max(8, read)  # of products on tensor cores the least
        one_size = len({tuple(z.shape[2:]) for z in exits}) == 1
        self.config = {
            **resized_tiles(C, dtype, R * X, read, 0 if self.halo else held, one_size, plain and unit),
            **({"TALL": tall, "BROAD": broad} if self.halo else {}),
            "FULL": _bits(i not in others for i in range(len(exits))),
            "SAME": others[0] if len({tuple(exits[i].shape[2:]) for i in others}) == 1 else -1,
            "X": X,
            "L": reached,
            "PATCH": read,
            "ROWWISE": False,
            "WIDE": reach >= 2**31,
        }

    def collect(self, grads: Sequence[Tensor]) -> None:
        """Adds up the parts of the gradients."""
        if not self.collected:
            return
        B, C, H, W = self.shape
        block = 1 << 14 if TRITON_INTERPRETED else 512
        sizes = [grads[i].shape[2:] for i in self.collected]
        programs = max(B * h * triton.cdiv(C * w, block) for h, w in sizes)
        strides = tuple(tuple(2 * x + 3 for x in g.stride()) for g in grads)
        resize.collect_kernel[(programs, len(grads))](
            self.copies, tuple(grads), strides, self.sizes, self.places, self.parts, B, C, H, W, self.most,
            COLLECTED=sum(1 << i for i in self.collected), R=self.tile[0], X=self.tile[1], HALO=self.halo, BLOCK=block,
            **FUSED,
        )  # fmt: skip


def most(count: int, size: int, to: int, align_corners: bool) -> int:
    """The most positions of an exit that `count` neighbouring ones of the output lie on. See csrc/axis.h."""
    step, unit = (size - 1, max(to - 1, 1)) if align_corners else (size, to)
    if size > to:
        return 2 * count
    return min(size, (min(count, to) - 1) * step // unit + 3)


def tiles_along(size: int, tile: int, halo: int) -> int:
    """See resize.py."""
    return max(1, -(-(size - halo) // (tile - halo)))


def _bits(where: Iterable[bool]) -> int:
    return sum(1 << i for i, here in enumerate(where) if here)


def resized_tile(H: int, W: int, C: int, halo: int) -> tuple[int, int]:
    """Rows and columns of a tile: products on tensor cores sum over 16 at least."""
    if TRITON_INTERPRETED and not halo:
        rows, most_columns = min(64, triton.next_power_of_2(H)), (1 << 12) // min(triton.next_power_of_2(C), 32)
        return rows, min(most_columns, triton.next_power_of_2(W))
    return 16, 16


def resized_tiles(
    C: int, dtype: torch.dtype, pixels: int, read: int, held: int, one_size: bool, plain: bool
) -> dict[str, Any]:
    """Tiles of the main kernel: all channels of a pixel in one thread, where they may be and fit, else some of them.

    In shared memory, and in registers on the way there, is a patch of `read` rows and columns, of a tile's channels.
    Exits of sizes of their own have addresses of their own, for which registers are needed, too.
    """
    row = {"BP": pixels, "ORDER": PIXELS, "num_warps": 8, "num_stages": 1}
    if held and C <= 32 and (read <= 16 or TRITON_INTERPRETED):
        channels = triton.next_power_of_2(C)
        if read > 8:
            channels = triton.next_power_of_2(triton.cdiv(C, 2)) if TRITON_INTERPRETED else min(8, channels)
        tiles = triton.cdiv(C, channels)
        if plain and one_size and 1 < held and held * C <= 64 and read <= 4 and not TRITON_INTERPRETED:
            row["maxnreg"] = 128  # two programs a multiprocessor
        return {"BC": channels, "K": tiles, "LAST": C - (tiles - 1) * channels, "VEC": 1, **row}
    channels = 8 if one_size and read <= 16 and dtype != torch.float64 else 4
    if TRITON_INTERPRETED:
        channels = max(channels, (1 << 18) // pixels)
    return {"BC": min(channels, triton.next_power_of_2(C)), **row}


# ---- phases 0 and 3 --------------------------------------------------------------------------------------------------


def _norms(
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    C: int,
    pixels: int,
    ignore_index: int,
    mask_soft: bool,
    reduction: int,
    losses: Tensor,
    weights: Sequence[float],
    grad_losses: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What label losses and soft losses are multiplied with, [2] float64, and the gains of norms_kernel."""
    counts, programs = None, 0
    if reduction == MEAN and (labels is not None or pixel_weight is not None):
        block = 1 << 16 if TRITON_INTERPRETED else 2048
        programs = triton.cdiv(pixels, block)
        counts = losses.new_empty((2, programs))
        kernels.count_kernel[(programs,)](
            labels, class_weight, pixel_weight, counts, C, pixels, programs, ignore_index,
            MASK_SOFT=mask_soft, BP=block, **FUSED,
        )  # fmt: skip
    norms = losses.new_empty(2, dtype=torch.float64)
    summed = reduction != NONE and (weights or grad_losses is not None)
    gains = torch.empty_like(losses) if summed else grad_losses  # a map the kernels take as it is
    n, entries = losses.shape[1], losses.shape[0] * losses.shape[1]
    kernels.norms_kernel[(1,)](
        counts, _pairs(weights), grad_losses, norms, gains if summed else None, programs,
        float(pixels if reduction == MEAN else 1), N=n, ENTRIES=entries, BLOCK=4096, num_warps=8, **FUSED,
    )  # fmt: skip
    return norms, gains


def _finish(partials: Tensor, norms: Tensor, losses: Tensor, n: int) -> None:
    entries, programs = partials.shape
    kernels.finish_kernel[(entries,)](partials, norms, losses, programs, n, BLOCK=4096, num_warps=8, **FUSED)
