"""The public losses: validate the arguments, choose the backend, sum rows of the exit-loss matrix.

Every function here equals the function of the same name in `reference`, which holds the formulas.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, checks, reference
from .backends import choose
from .distributed import Group, check_group, count_dtype, mean_over_ranks
from .ops import Options
from .reference import SelfRegulationOutput, loss_dtype

__all__ = [
    "SelfRegulationOutput",
    "exit_loss_matrix",
    "mea_loss",
    "presence_distillation_loss",
    "presence_loss",
    "presence_vector",
    "self_regulation_loss",
    "sr_f_loss",
    "sr_l_loss",
]

VALIDATE = os.environ.get("SELFREG_FAST_VALIDATE") == "1"


@checks.named
def exit_loss_matrix(
    exits: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    teachers: Sequence[int] = (),
    temperature: float = 1.0,
    renormalize: bool = False,
    target: str = "soft",
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
    mask_soft: bool = False,
    reduction: str = "mean",
    detach_teacher: bool = True,
    process_group: Group = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""All label losses and all teacher-to-student losses of N exits, each exit read once.

        losses[0, i] = CE(z_i, labels)        losses[1 + r, i] = L(z_teachers[r] → z_i), 0 for i = teachers[r]

    L(t → s) = -τ² mean_pixels Σ_c σ(t)_c^(1/τ) log σ(s)_c^(1/τ), with σ the softmax over channels; with `renormalize`
    -τ² mean_pixels Σ_c softmax(t/τ)_c log softmax(s/τ)_c; with `target="argmax"` CE(s, argmax_c t).

    SR-F is the row of teacher 0, SR-L the row of teacher N-1, MEA row 0, deep mutual learning all rows: any weighted
    sum of this matrix is a training objective.

    Args:
        exits: N tensors, shallow to deep, all (B, C), (B, C, L), (B, C, H, W) or (B, C, D, H, W); float32, float16,
            bfloat16 or float64, one dtype; any strides. (B, C, H, W) may differ in (H, W): they are resized bilinearly,
            within the kernels. (B, C, D, H, W) may differ in (D, H, W): `F.interpolate` resizes them trilinearly, in
            float32 or float64, which takes the memory of every exit at output size.
        labels: (B, ...) uint8, int32 or int64 class indices, `ignore_index` where there is none. None: row 0 is 0.
        teachers: distinct indices of exits, negative ones counted from the deepest.
        temperature: tau > 0, from 1e-15 to 1e15.
        renormalize: False: teacher and student are softmax powers, sigma(z)^(1/tau). True: softmax(z / tau).
        target: "soft", or "argmax": the teacher's most likely class is a hard label (tau plays no part).
        ignore_index: label that does not count.
        class_weight: (C,) floating, as `weight` of `F.cross_entropy`. Without label smoothing that of a class which no
            label has plays no part, be it infinite.
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        size: output (H, W), or (D, H, W). None: the labels' size, else the largest exit's.
        align_corners: as in `F.interpolate`.
        pixel_weight: (B, ...) floating, at output size: weighs label and soft losses.
        mask_soft: True: soft losses, too, skip pixels whose label is ignored.
        reduction: "mean": over the weights of the pixels that count (and the class weights, for labels), exactly 0
            where none does. "sum": no division. "none": the weighted map of every entry.
        detach_teacher: True: teachers get no gradient from their students.
        process_group: the ranks over which the gradients are averaged (those of DDP or FSDP): a
            `torch.distributed.ProcessGroup`, or "world" for the default group. The mean then is over the pixels of all
            ranks, however unevenly they are spread: each rank's loss is its own sum, divided by the mean of the ranks'
            divisors, so that the mean over the ranks, of the losses as of their gradients, is that of one process with
            all images. Every rank of the group has to call, with the same options; one without a pixel that counts adds
            exactly 0. That takes one all-reduce of two numbers, for which NCCL lets no process wait. None: the mean
            over this process's pixels.
        backend: "auto", "cpu", "cuda", "triton" or "reference", see `backends`.
        validate: True: look for labels out of range on a GPU, too, which waits for it. Else such a label makes the loss
            NaN there. The environment variable SELFREG_FAST_VALIDATE=1 does the same for every call.

    Returns:
        (T + 1, N) losses, or (T + 1, N, B, ...) with `reduction="none"`; float32, or float64 for float64 exits;
        differentiable once with respect to the exits. (The gradient itself can be differentiated by what it was given,
        as learned weights of losses need it: of the total cheaply, else by the reference and its memory.)

    Warns:
        UserWarning: once a process: an exit's aspect ratio is 1.5 times the output's or more, both of at least 8 x 8
            (axes may be swapped); labels for exits of one channel (their loss is 0 always).

    Accuracy:
        Against float64 on the same exits, of a fused backend, u = 2e-6 (1e-14 for float64 exits). A mean loss L errs by
        at most u (L + 1), for soft targets u (L + max(tau, tau^2)). An element of its gradient errs by at most u w / M,
        for soft targets u w tau P / M (w: the pixel's weight, M: the sum of the weights, P: the sum of the target, 1
        where it is renormalised), to which float16 exits add 2^-10 and bfloat16 exits 2^-7 of the element itself.
        docs/accuracy.md has it for every option.

    Raises:
        TypeError, ValueError: an argument is not as described; also a label outside [0, C) that is not ignored, on a
            CPU or with `validate`.
        ValueError: `process_group` with a `reduction` other than "mean".
        RuntimeError: `backend` is not available here, or torch.distributed is not initialised for `process_group`.

    Source: Zhang et al., ICCV 2021 (soft targets, rows); Hinton et al., 2015 (`renormalize=True`).
    """
    return _losses(
        exits,
        labels,
        weights=None,
        teachers=teachers,
        temperature=temperature,
        renormalize=renormalize,
        target=target,
        ignore_index=ignore_index,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        size=size,
        align_corners=align_corners,
        pixel_weight=pixel_weight,
        mask_soft=mask_soft,
        reduction=reduction,
        detach_teacher=detach_teacher,
        process_group=process_group,
        backend=backend,
        validate=validate,
    )[1]


@checks.named
def sr_f_loss(
    features: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    renormalize: bool = False,
    target: str = "soft",
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
    detach_teacher: bool = True,
    process_group: Group = None,
    backend: str = "auto",
) -> Tensor:
    r"""SR-F: the shallowest exit teaches every deeper one its details.

        SR-F = Σ_{i ≥ 1} L(z_0 → z_i)

    Args:
        features: N >= 2 exits, shallow to deep: feature maps or logits, as in `exit_loss_matrix`.
        temperature: tau > 0.
        renormalize: False: softmax powers, sigma(z)^(1/tau). True: softmax(z / tau).
        target: "soft", or "argmax": the teacher's most likely class is a hard label.
        size: output (H, W) to which all are resized. None: the largest exit's.
        align_corners: as in `F.interpolate`.
        pixel_weight: (B, ...) floating, at output size.
        reduction: "mean", "sum" or "none": a map.
        detach_teacher: True: the teacher gets no gradient.
        process_group: None, "world" or a `ProcessGroup`: the mean over the pixels of all its ranks.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        A scalar, or the (B, ...) map with `reduction="none"`; float32, or float64 for float64 exits.

    Raises:
        TypeError, ValueError, RuntimeError: as `exit_loss_matrix`; ValueError for fewer than two exits.

    Source: Zhang et al., ICCV 2021.
    """
    n = checks.count(features, "features", at_least=2)
    return _row_sum(
        features,
        [0.0] * n + [0.0] + [1.0] * (n - 1),
        name="features",
        teachers=(0,),
        temperature=temperature,
        renormalize=renormalize,
        target=target,
        size=size,
        align_corners=align_corners,
        pixel_weight=pixel_weight,
        reduction=reduction,
        detach_teacher=detach_teacher,
        process_group=process_group,
        backend=backend,
    )


@checks.named
def sr_l_loss(
    logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    renormalize: bool = False,
    target: str = "soft",
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
    detach_teacher: bool = True,
    process_group: Group = None,
    backend: str = "auto",
) -> Tensor:
    r"""SR-L: the deepest exit teaches every shallower one its semantics.

        SR-L = Σ_{k < N-1} L(z_{N-1} → z_k)

    Args:
        logits: N >= 2 exits, shallow to deep, as in `exit_loss_matrix`.
        temperature: tau > 0.
        renormalize: False: softmax powers, sigma(z)^(1/tau). True: softmax(z / tau).
        target: "soft", or "argmax": the teacher's most likely class is a hard label.
        size: output (H, W) to which all are resized. None: the largest exit's.
        align_corners: as in `F.interpolate`.
        pixel_weight: (B, ...) floating, at output size.
        reduction: "mean", "sum" or "none": a map.
        detach_teacher: True: the teacher gets no gradient.
        process_group: None, "world" or a `ProcessGroup`: the mean over the pixels of all its ranks.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        A scalar, or the (B, ...) map with `reduction="none"`; float32, or float64 for float64 exits.

    Raises:
        TypeError, ValueError, RuntimeError: as `exit_loss_matrix`; ValueError for fewer than two exits.

    Source: Zhang et al., ICCV 2021.
    """
    n = checks.count(logits, "logits", at_least=2, instead="mea_loss takes one")
    return _row_sum(
        logits,
        [0.0] * n + [1.0] * (n - 1) + [0.0],
        name="logits",
        teachers=(n - 1,),
        temperature=temperature,
        renormalize=renormalize,
        target=target,
        size=size,
        align_corners=align_corners,
        pixel_weight=pixel_weight,
        reduction=reduction,
        detach_teacher=detach_teacher,
        process_group=process_group,
        backend=backend,
    )


@checks.named
def mea_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    exit_weights: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
    process_group: Group = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""MEA (multi-exit architecture), segmentation part: every exit learns from the labels.

        MEA = Σ_i exit_weights[i] CE(z_i, labels)

    Args:
        logits: N >= 1 exits (B, C, ...) of class logits, as in `exit_loss_matrix`.
        labels: (B, ...) uint8, int32 or int64.
        exit_weights: N numbers; default 1 for every exit.
        ignore_index: label that does not count, 255.
        class_weight: (C,) floating, as `weight` of `F.cross_entropy`.
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        size: output (H, W) to which all are resized. None: the labels' size.
        align_corners: as in `F.interpolate`.
        pixel_weight: (B, ...) floating, at output size.
        reduction: "mean", over the pixels that count, 0 where none does; "sum"; or "none": a map.
        process_group: None, "world" or a `ProcessGroup`: the mean over the pixels of all its ranks.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        validate: True: look for labels out of range on a GPU, too, which waits for it.

    Returns:
        A scalar, or the (B, ...) map with `reduction="none"`; float32, or float64 for float64 exits.

    Raises:
        TypeError, ValueError, RuntimeError: as `exit_loss_matrix`.

    Source: Zhang et al., ICCV 2021.
    """
    n = checks.count(logits, "logits")
    checks.check_tensor(labels, "labels")  # for None would be no error, but no label losses
    return _row_sum(
        logits,
        checks.exit_weights_of(exit_weights, n),
        labels,
        name="logits",
        ignore_index=ignore_index,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        size=size,
        align_corners=align_corners,
        pixel_weight=pixel_weight,
        reduction=reduction,
        process_group=process_group,
        backend=backend,
        validate=validate,
    )


@checks.named
def self_regulation_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    features: Sequence[Tensor] | None = None,
    image_logits: Sequence[Tensor] | None = None,
    presence: Tensor | None = None,
    mea_weight: float | None = 1.0,
    sr_f_weight: float | None = 1.0,
    sr_l_weight: float | None = 1.0,
    seg_weight: float | None = None,
    cls_weight: float = 0.2,
    temperature: float = 1.0,
    renormalize: bool = False,
    target: str = "soft",
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    exit_weights: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
    detach_teacher: bool = True,
    process_group: Group = None,
    backend: str = "auto",
    validate: bool = False,
) -> SelfRegulationOutput:
    r"""The whole Self-Regulation objective; without `features`, in one launch that also writes the gradients.

        total = mea_weight MEA + sr_f_weight SR-F + sr_l_weight SR-L
        MEA = seg_weight Σ_i exit_weights[i] CE(z_i, labels) + cls_weight Σ_i BCE(image_logits[i], presence)

    To begin with: `sr_f_weight=0.1, sr_l_weight=0.1`, temperature 1, on MEA alone (None for both) for a quarter of the
    steps. Above temperature 1 `renormalize=True`: raw powers do not sum to 1, and outgrow MEA.

    Args:
        logits: N >= 2 exits (B, C, ...) of class logits, shallow to deep, as in `exit_loss_matrix`; one will do where
            neither SR-F nor SR-L runs on them.
        labels: (B, ...) uint8, int32 or int64.
        features: N' >= 2 feature maps, shallow to deep, for SR-F; None: SR-F runs on `logits`. They are resized to the
            same output size; to compare them at their own size, add `sr_f_loss` to the other terms yourself.
        image_logits: image-level predictions (B, C) before the sigmoid, one for each exit; None: MEA is its
            segmentation part.
        presence: (B, C) 1 where the class occurs in the image, else 0; None: made from `labels`.
        mea_weight: weight of MEA in the total. 0: computed and returned, but without part in the total; None: left out
            and returned as 0.
        sr_f_weight: the same of SR-F.
        sr_l_weight: the same of SR-L.
        seg_weight: weight of MEA's segmentation part; None: 0.8 with `image_logits`, as in the published code, else 1.
        cls_weight: weight of its image-level part; the default is the published code's.
        exit_weights: N numbers, weights of the exits' label losses; default 1.
        temperature: tau > 0.
        renormalize: False: softmax powers, sigma(z)^(1/tau). True: softmax(z / tau).
        target: "soft", or "argmax": the teacher's most likely class is a hard label.
        ignore_index: label that does not count in MEA.
        class_weight: (C,) floating, as `weight` of `F.cross_entropy`.
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        size: output (H, W) to which all are resized. None: the labels' size.
        align_corners: as in `F.interpolate`.
        pixel_weight: (B, ...) floating, at output size: weighs all three parts.
        reduction: "mean", over the pixels that count, 0 where none does; "sum"; or "none": maps.
        detach_teacher: True: teachers get no gradient from their students.
        process_group: None, "world" or a `ProcessGroup`: the mean over the pixels of all its ranks. `features` and
            `image_logits` take an all-reduce more, each.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        validate: True: look for labels out of range on a GPU, too, which waits for it.

    Returns:
        `SelfRegulationOutput(total, mea, sr_f, sr_l)`: scalars (maps with `reduction="none"`), float32 or float64;
        each is differentiable. Back-propagate `total`, the sum of the weighted parts: that is the fast path, and the
        sum over the tuple would count everything twice. `mea` has `seg_weight`, `cls_weight` and `exit_weights` in it,
        and no part has `mea_weight`, `sr_f_weight` or `sr_l_weight`.

    Raises:
        TypeError, ValueError, RuntimeError: as `exit_loss_matrix`; ValueError for fewer than two exits, for
            `image_logits` of other classes than the logits, or with `reduction="none"` (there is no image-level map).

    Source: Zhang et al., ICCV 2021, with the weights 0.8 and 0.2 of its published code.
    """
    taught = sr_l_weight is not None or (sr_f_weight is not None and features is None)
    instead = "mea_loss takes one, and so does this with sr_f_weight=None and sr_l_weight=None, or enable_sr(False)"
    n = checks.count(logits, "logits", at_least=2 if taught else 1, instead=instead)
    checks.check_tensor(labels, "labels")
    exit_weights = checks.exit_weights_of(exit_weights, n)
    mea_weight = checks.part_weight(mea_weight, "mea_weight")
    sr_f_weight = checks.part_weight(sr_f_weight, "sr_f_weight")
    sr_l_weight = checks.part_weight(sr_l_weight, "sr_l_weight")
    seg_weight = reference.seg_weight_of(checks.part_weight(seg_weight, "seg_weight"), image_logits)
    cls_weight = checks.number(cls_weight, "cls_weight")
    if features is not None or image_logits is not None or mea_weight is None:  # else the launch's checks are enough
        checks.check_exits(logits, "logits")
        checks.check_labels(labels, logits[0])
        if size is None and logits[0].dim() >= 4:
            size = tuple(labels.shape[1:])
    if features is not None:
        checks.count(features, "features", at_least=2)
        checks.check_exits(features, "features")
        checks.check_same_images(features[0], logits[0])
    if image_logits is None and presence is not None:
        raise ValueError("presence is used with image_logits only, but image_logits is None")
    if image_logits is not None:
        if reduction == "none":
            raise ValueError('image_logits cannot be used with reduction="none": an image-level loss has no map')
        checks.check_image_logits_of(image_logits, logits)

    soft: dict[str, Any] = {
        "temperature": temperature,
        "renormalize": renormalize,
        "target": target,
        "detach_teacher": detach_teacher,
    }
    shared: dict[str, Any] = {
        "size": size,
        "align_corners": align_corners,
        "pixel_weight": pixel_weight,
        "reduction": reduction,
        "process_group": process_group,
        "backend": backend,
    }
    # One row of weights for the labels, one for each teacher that takes part.
    rows = [[0.0] * n if mea_weight is None else [mea_weight * seg_weight * w for w in exit_weights]]
    teachers = []
    if sr_f_weight is not None and features is None:
        teachers.append(0)
        rows.append([0.0] + [sr_f_weight] * (n - 1))
    if sr_l_weight is not None:
        teachers.append(n - 1)
        rows.append([sr_l_weight] * (n - 1) + [0.0])
    total, losses = _losses(
        logits,
        None if mea_weight is None else labels,
        name="logits",
        weights=[w for row in rows for w in row],
        teachers=teachers,
        ignore_index=ignore_index,
        class_weight=None if mea_weight is None else class_weight,
        label_smoothing=0.0 if mea_weight is None else label_smoothing,
        validate=validate,
        **soft,
        **shared,
    )
    zero = losses.new_zeros(losses.shape[2:])
    mea = _weighted(losses[0], [seg_weight * w for w in exit_weights]) if mea_weight is not None else zero
    sr_l = losses[-1].sum(0) if sr_l_weight is not None else zero
    sr_f = losses[1].sum(0) if 0 in teachers else zero
    if sr_f_weight is not None and features is not None:
        sr_f = sr_f_loss(features, **soft, **shared)
        if sr_f_weight:
            total = total + sr_f_weight * sr_f
    if mea_weight is not None and image_logits is not None:
        if presence is None:
            presence = presence_vector(labels, image_logits[0].shape[1], ignore_index=ignore_index)
        image_mea = cls_weight * presence_loss(image_logits, presence, process_group=process_group).to(mea.dtype)
        mea = mea + image_mea
        if mea_weight:
            total = total + mea_weight * image_mea
    return SelfRegulationOutput(total, mea, sr_f, sr_l)


@checks.named
def presence_loss(image_logits: Sequence[Tensor], presence: Tensor, *, process_group: Group = None) -> Tensor:
    r"""MEA, image-level part: every exit predicts which classes occur in the image.

        Σ_i BCE(sigmoid(image_logits[i]), presence)

    Args:
        image_logits: one (B, K) floating tensor for each exit, before the sigmoid.
        presence: (B, K) 1 where the class occurs, else 0 (or probabilities), see `presence_vector`.
        process_group: as in `exit_loss_matrix`: the mean is over the images of all its ranks.

    Returns:
        A scalar: the sum over exits of the mean over images and classes; 0 where there is no image.

    Raises:
        TypeError, ValueError: not tensors, not floating, or shapes other than (B, K); a wrong `process_group`.

    Source: Zhang et al., ICCV 2021, computed by `F.binary_cross_entropy_with_logits`.
    """
    checks.check_image_logits(image_logits)
    checks.check_tensor(presence, "presence")
    if presence.is_complex():
        raise TypeError(f"presence: expected 0, 1 or probabilities, got {presence.dtype}")
    checks.check_device(presence, "presence", image_logits[0], "image_logits[0]")
    if presence.shape != image_logits[0].shape:
        raise ValueError(f"presence: expected shape {tuple(image_logits[0].shape)}, got {tuple(presence.shape)}")
    return reference.presence_loss(image_logits, presence, process_group=process_group)


@checks.named
def presence_distillation_loss(image_logits: Sequence[Tensor], *, process_group: Group = None) -> Tensor:
    r"""The published code's SR-L: the deepest image-level prediction teaches the shallower ones.

        Σ_{k < N-1} BCE(sigmoid(z_k), sigmoid(z_{N-1})), z_{N-1} detached

    Args:
        image_logits: N >= 2 floating tensors (B, K), before the sigmoid, shallow to deep.
        process_group: as in `exit_loss_matrix`: the mean is over the images of all its ranks.

    Returns:
        A scalar: the sum over exits of the mean over images and classes; 0 where there is no image.

    Raises:
        TypeError, ValueError: not tensors, not floating, fewer than two, or shapes other than (B, K); a wrong
            `process_group`.

    Source: the published code of Zhang et al., ICCV 2021.
    """
    checks.check_image_logits(image_logits, 2)
    return reference.presence_distillation_loss(image_logits, process_group=process_group)


@checks.named
def presence_vector(labels: Tensor, num_classes: int, *, ignore_index: int = 255) -> Tensor:
    """Which classes occur in each image.

    Args:
        labels: (B, ...) uint8, int32 or int64 class indices.
        num_classes: K.
        ignore_index: label that does not count.

    Returns:
        (B, K) float32, 1 where the class occurs, else 0.

    Raises:
        TypeError, ValueError: labels are not (B, ...) integers, or `num_classes` is not a positive integer; on a CPU,
            also a label outside [0, K) that is not ignored.
    """
    checks.check_labels(labels)
    if not checks.is_integer(num_classes) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")
    ignore_index = checks.checked_ignore_index(ignore_index)
    if checks.has_values(labels):
        checks.check_label_values(labels, num_classes, ignore_index)
    return reference.presence_vector(labels, num_classes, ignore_index=ignore_index)


def _losses(
    exits: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    weights: list[float] | None,
    name: str = "exits",
    teachers: Sequence[int] = (),
    temperature: float = 1.0,
    renormalize: bool = False,
    target: str = "soft",
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
    mask_soft: bool = False,
    reduction: str = "mean",
    detach_teacher: bool = True,
    process_group: Group = None,
    backend: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """The exit-loss matrix and its sum under `weights` (row by row, (T + 1) N numbers), from one launch."""
    n = checks.count(exits, name)
    checks.check_exits(exits, name)
    first = exits[0]
    checks.check_options(
        temperature=temperature,
        target=target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        renormalize=renormalize,
        align_corners=align_corners,
        mask_soft=mask_soft,
        detach_teacher=detach_teacher,
        validate=validate,
    )
    ignore_index = int(ignore_index)
    teachers = checks.teachers_of(teachers, n)
    check_group(process_group, reduction)
    if labels is not None:
        checks.check_labels(labels, first)
        checks.warn_of_one_class(first)
    elif mask_soft:
        raise ValueError("mask_soft=True needs labels, got labels=None")
    spatial = checks.output_size(exits, labels, size, name)
    if labels is not None:
        checks.check_map(labels, "labels", first, spatial)
    if pixel_weight is not None:
        checks.check_tensor(pixel_weight, "pixel_weight", floating=True)
        checks.check_map(pixel_weight, "pixel_weight", first, spatial)
    if class_weight is not None:
        checks.check_class_weight(class_weight, first)

    chosen = choose(backend, first.device.type, first.device.index or 0)
    on_gpu = first.device.type != "cpu"
    if labels is not None and ((validate or VALIDATE) if on_gpu else chosen == "reference") and checks.is_real(labels):
        checks.check_label_values(labels, first.shape[1], ignore_index)
    dtype = loss_dtype(first.dtype)
    scale = None
    if process_group is not None:
        counts = _counts(first, spatial, labels, class_weight, pixel_weight, ignore_index, mask_soft)
        divisors = mean_over_ranks(counts, process_group)
        label, soft = (1 / divisors).masked_fill(divisors == 0, 0).to(dtype)
        scale = torch.stack([label] + [soft] * len(teachers)).unsqueeze(1)
        reduction = "sum"
    if chosen == "reference":
        losses = reference.exit_loss_matrix(
            exits,
            labels,
            teachers=teachers,
            temperature=temperature,
            renormalize=renormalize,
            target=target,
            ignore_index=ignore_index,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            size=spatial,
            align_corners=align_corners,
            pixel_weight=pixel_weight,
            mask_soft=mask_soft,
            reduction=reduction,
            detach_teacher=detach_teacher,
        )
        if scale is not None:
            losses = losses * scale
        return _weighted(losses.flatten(0, 1), weights) if weights else losses.new_zeros(()), losses

    for argument, t in (("pixel_weight", pixel_weight), ("class_weight", class_weight)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{argument}: the fused losses have no gradient for it; pass {argument}.detach()")

    if first.dim() == 5 and any(z.shape[2:] != spatial for z in exits):  # no kernel interpolates between voxels
        exits = reference.at_output_size(exits, spatial, align_corners)
    as_4d = [_as_4d(z) for z in exits]
    options = Options(
        teachers=teachers,
        temperature=float(temperature),
        target="argmax" if target == "argmax" else "renormalized" if renormalize else "raw",
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        mask_soft=mask_soft,
        detach_teacher=detach_teacher or target == "argmax",
        reduction=reduction,
        size=(spatial[0], spatial[1]) if first.dim() == 4 else (as_4d[0].shape[2], as_4d[0].shape[3]),
        align_corners=align_corners,
    )
    total, losses = autograd.exit_loss(
        chosen,
        as_4d,
        None if labels is None else _map_as_3d(labels),
        None if class_weight is None else class_weight.to(dtype).contiguous(),
        None if pixel_weight is None else _map_as_3d(pixel_weight.to(dtype)),
        scale,
        tuple(weights) if weights is not None and reduction != "none" else (),
        options,
    )
    if reduction == "none":
        losses = losses.reshape(*losses.shape[:3], *spatial)
        total = _weighted(losses.flatten(0, 1), weights) if weights else total
    return total, losses


def _counts(
    first: Tensor,
    spatial: tuple[int, ...],
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    mask_soft: bool,
) -> Tensor:
    """(2,): what the sums of label losses and of soft losses are divided by, for the pixels of this process."""
    dtype = count_dtype(first.device)
    if pixel_weight is None:
        soft = first.new_full((), first.shape[0] * math.prod(spatial), dtype=dtype)
    else:
        soft = pixel_weight.sum(dtype=dtype)
    if labels is None:
        return torch.stack([torch.zeros_like(soft), soft])
    classes = labels.long()
    ignored = classes == ignore_index
    weight = ~ignored if pixel_weight is None else pixel_weight.masked_fill(ignored, 0)
    label = counted = weight.sum(dtype=dtype)
    if class_weight is not None:
        # A label out of range is the launch's to tell; of what does not count, any weight is left out.
        nowhere = (weight == 0) | (classes < 0) | (classes >= first.shape[1])
        class_weight = class_weight.to(loss_dtype(first.dtype))
        label = (weight * class_weight[classes.masked_fill(nowhere, 0)].masked_fill(nowhere, 0)).sum(dtype=dtype)
    counts = torch.stack([label, counted if mask_soft else soft])
    return counts.masked_fill(counts.isinf(), math.nan)  # 1 / inf would leave out what made it so


def _row_sum(exits: Sequence[Tensor], weights: list[float], labels: Tensor | None = None, **options: Any) -> Tensor:
    return _losses(exits, labels, weights=weights, **options)[0]


def _weighted(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_i weights_i losses_i over the first dimension; an entry of weight 0 has no part in it, be it infinite."""
    terms = [loss if w == 1 else w * loss for w, loss in zip(weights, losses.unbind(0), strict=True) if w != 0]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(losses[0])


def _as_4d(z: Tensor) -> Tensor:
    """(B, C), (B, C, L) and (B, C, D, H, W) as (B, C, H, W)."""
    if z.dim() == 5:
        return z.flatten(2, 3)
    return z if z.dim() == 4 else z[:, :, None] if z.dim() == 3 else z[:, :, None, None]


def _map_as_3d(m: Tensor) -> Tensor:
    """(B,), (B, L) and (B, D, H, W) as (B, H, W), contiguous."""
    m = m.contiguous()
    if m.dim() == 4:
        return m.flatten(1, 2)
    return m if m.dim() == 3 else m[:, None] if m.dim() == 2 else m[:, None, None]
