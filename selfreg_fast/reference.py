"""The specification: every loss of the package in plain PyTorch, formula by formula.

Read it beside Zhang et al., "Self-Regulation for Semantic Segmentation" (ICCV 2021, arXiv 2108.09702). The fused
kernels compute exactly these functions; the tests compare them with these functions in float64.

Notation. An *exit* z is a tensor (B, C, ...): a feature map or class logits; sigma is the softmax over its C channels
at one pixel j; t is the teacher, s the student, y the label; tau the temperature; w_j the weight of pixel j (1 by
default, 0 where it does not count) and M = sum_j w_j. Exits are ordered shallow (0) to deep (N-1).

    soft, raw power     L(t->s) = -tau^2 / M  sum_j w_j sum_c  sigma(t_j)_c^(1/tau)  log sigma(s_j)_c^(1/tau)
    soft, renormalised  L(t->s) = -tau^2 / M  sum_j w_j sum_c  softmax(t_j/tau)_c  log softmax(s_j/tau)_c
    argmax              L(t->s) = -1 / M      sum_j w_j log sigma(s_j)[argmax_c t_jc]
    labels              CE(s)   = F.cross_entropy(s, y), with its class weights, label smoothing and ignored labels

Gradients, which the kernels write directly. At one pixel, with l = log sigma(s) and d l_c / d s_k = [c = k] - sigma_k,
any target row q gives

    d/ds_k ( -sum_c q_c l_c ) = (sum_c q_c) sigma(s)_k - q_k                                                        (1)

so that every term is (1) with its own q, and the terms on one exit add up in q: one read of the exit, one write of its
gradient. In particular, for a detached teacher,

    raw power:     (tau/M) (P sigma(s) - p)    p = sigma(t)^(1/tau), P = sum_c p_c  (P <= C^(1 - 1/tau), not 1)
    renormalised:  (tau/M) (softmax(s/tau) - softmax(t/tau))
    argmax, label: (1/M) (sigma(s) - onehot)

A teacher that is not detached also gets, since d p_c / d t_k = (p_c / tau) ([c = k] - sigma_k),

    raw power:     -(1/M) (p_k l_k - sigma(t)_k sum_c p_c l_c)          l = log sigma(s)
    renormalised:  -(tau/M) (q_k l_k - q_k sum_c q_c l_c)               q = softmax(t/tau), l = log softmax(s/tau)

Half-precision exits are computed in float32, as the kernels do; float64 stays float64.

Every function takes the arguments of the fused one, so that either can stand for the other; `backend` has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_label_values, is_real, largest, named
from .distributed import Group, check_group, count_dtype, mean_over_ranks

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


class SelfRegulationOutput(NamedTuple):
    """What `self_regulation_loss` returns, all differentiable: back-propagate `total`.

    Attributes:
        total: mea_weight MEA + sr_f_weight SR-F + sr_l_weight SR-L. (`sum(output)` is that and its parts again.)
        mea: MEA, with seg_weight, cls_weight and exit_weights, without mea_weight.
        sr_f: SR-F, without sr_f_weight.
        sr_l: SR-L, without sr_l_weight.
    """

    total: Tensor
    mea: Tensor
    sr_f: Tensor
    sr_l: Tensor

    def __getattr__(self, name: str) -> Any:
        hint = f": a tuple of losses has none, use .total.{name}" if hasattr(Tensor, name) else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __mul__(self, factor: Any) -> NoReturn:  # of a tuple it would be so many copies
        raise TypeError(f"{type(self).__name__}: a tuple of losses is not multiplied; to scale the loss, scale .total")

    def __rmul__(self, factor: Any) -> Any:
        return self.__mul__(factor)

    def __format__(self, spec: str) -> str:
        if spec:
            raise TypeError(f"{type(self).__name__}: a tuple of losses has no format {spec!r}; format .total")
        return repr(self)


def _new_output(cls: type[SelfRegulationOutput], *args: Any, **kwargs: Any) -> SelfRegulationOutput:
    if len(args) == 1 and not kwargs:  # torch.amp.GradScaler.scale, and whatever else makes a tuple of its items
        raise TypeError(f"{cls.__name__}: expected total, mea, sr_f, sr_l; to scale the loss, scale .total")
    return _make_output(cls, *args, **kwargs)


# NamedTuple takes no __new__ in the class, and a subclass would be no named tuple to torch.compile.
_make_output = SelfRegulationOutput.__new__
SelfRegulationOutput.__new__ = _new_output  # type: ignore[method-assign, assignment]


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which exits of `dtype` are computed and losses returned: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, *, temperature: float, renormalize: bool, target: str
) -> Tensor:
    """L(t->s) at every pixel: exits (B, C, ...) to a map (B, ...)."""
    if target == "argmax":
        return F.cross_entropy(student, teacher.argmax(1), reduction="none")
    if renormalize:
        log_q, log_p = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    else:
        log_q, log_p = F.log_softmax(student, 1) / temperature, F.log_softmax(teacher, 1) / temperature
    p = log_p.exp()
    return -(temperature**2) * (p * log_q.masked_fill(p == 0, 0)).sum(1)  # 0 log 0 = 0


@named
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
    """`losses[0, i]`: label loss of exit i; `losses[1 + r, i]`: loss of exit i taught by exit `teachers[r]`.

    See `exit_loss_matrix` for the arguments.
    """
    check_group(process_group, reduction)
    temperature, label_smoothing = float(temperature), float(label_smoothing)
    if size is None:
        size = largest(exits).shape[2:] if labels is None else labels.shape[1:]
    exits = at_output_size(exits, size, align_corners)
    first = exits[0]
    weight = torch.ones_like(first[:, 0]) if pixel_weight is None else pixel_weight.to(first.dtype)
    zero = torch.zeros_like(weight)
    soft_weight, rows = weight, []

    if labels is None:
        rows.append([_reduce(zero, zero, zero.sum(), reduction)] * len(exits))
    else:
        if validate and is_real(labels):
            check_label_values(labels, first.shape[1], ignore_index)
        labels = labels.long()
        valid = labels != ignore_index
        # Other labels make the loss NaN; on a GPU they would end the process.
        known = (labels >= 0) & (labels < first.shape[1])
        unknown = valid & ~known
        label_weight = torch.where(valid, weight, zero)
        # What does not count is left out, for 0 times an infinite class weight would be NaN.
        labels = labels.masked_fill(~known | (label_weight == 0), ignore_index)
        soft_weight = label_weight if mask_soft else weight
        if class_weight is not None:
            class_weight = class_weight.to(first.dtype)
            left_out = labels == ignore_index
            norm = label_weight * class_weight[labels.masked_fill(left_out, 0)].masked_fill(left_out, 0)
        else:
            norm = label_weight
        divisor = _divisor(norm, process_group)
        row = []
        for z in exits:
            ce = F.cross_entropy(
                _where_counted(z, label_weight),
                labels,
                class_weight,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction="none",
            )
            row.append(_reduce(ce.masked_fill(unknown, math.nan), label_weight, divisor, reduction))
        rows.append(row)

    divisor = _divisor(soft_weight, process_group)
    counted = [_where_counted(z, soft_weight) for z in exits]
    for t in teachers:
        teacher = counted[t].detach() if detach_teacher else counted[t]
        row = []
        for i, student in enumerate(counted):
            loss = zero
            if i != t % len(exits):  # nobody teaches itself
                loss = soft_cross_entropy(
                    student, teacher, temperature=temperature, renormalize=renormalize, target=target
                )
            row.append(_reduce(loss, soft_weight, divisor, reduction))
        rows.append(row)
    return torch.stack([torch.stack(row) for row in rows])


@named
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
    """SR-F = sum_{i >= 1} L(exit 0 -> exit i): the shallowest exit teaches every deeper one its details."""
    return exit_loss_matrix(
        features,
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
    )[1].sum(0)


@named
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
    """SR-L = sum_{k < N-1} L(exit N-1 -> exit k): the deepest exit teaches every shallower one its semantics."""
    return exit_loss_matrix(
        logits,
        teachers=(len(logits) - 1,),
        temperature=temperature,
        renormalize=renormalize,
        target=target,
        size=size,
        align_corners=align_corners,
        pixel_weight=pixel_weight,
        reduction=reduction,
        detach_teacher=detach_teacher,
        process_group=process_group,
    )[1].sum(0)


@named
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
    """MEA, segmentation part = sum_i exit_weights_i CE(exit i, labels): every exit learns from the labels."""
    row = exit_loss_matrix(
        logits,
        labels,
        ignore_index=ignore_index,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        size=size,
        align_corners=align_corners,
        pixel_weight=pixel_weight,
        reduction=reduction,
        process_group=process_group,
        validate=validate,
    )[0]
    weights = [1.0] * len(logits) if exit_weights is None else [float(w) for w in exit_weights]
    return sum((w * loss for w, loss in zip(weights, row, strict=True)), start=torch.zeros_like(row[0]))


@named
def presence_vector(labels: Tensor, num_classes: int, *, ignore_index: int = 255) -> Tensor:
    """1 where a class occurs in an image, else 0: labels (B, ...) to float32 (B, num_classes)."""
    flat = (labels if labels.dim() > 1 else labels[:, None]).flatten(1).long()
    valid = (flat != ignore_index) & (flat >= 0) & (flat < num_classes)
    present = labels.new_zeros(labels.shape[0], num_classes + 1, dtype=torch.float32)
    return present.scatter_(1, flat.masked_fill(~valid, num_classes), 1.0)[:, :num_classes]


@named
def presence_loss(image_logits: Sequence[Tensor], presence: Tensor, *, process_group: Group = None) -> Tensor:
    """MEA, image-level part = sum_i BCE(sigmoid(image_logits_i), presence), each a mean over images and classes."""
    check_group(process_group)
    images = presence.shape[0]
    how = "mean" if images > 0 else "sum"  # the mean over no image would be NaN
    image_logits = [z.to(loss_dtype(z.dtype)) for z in image_logits]
    losses = [F.binary_cross_entropy_with_logits(z, presence.to(z.dtype), reduction=how) for z in image_logits]
    loss = torch.stack(losses).sum()
    if process_group is None:
        return loss
    of_all = mean_over_ranks(loss.new_full((), images, dtype=count_dtype(loss.device)), process_group)
    return loss * (images / of_all).to(loss.dtype) if images > 0 else loss


@named
def presence_distillation_loss(image_logits: Sequence[Tensor], *, process_group: Group = None) -> Tensor:
    """The published code's SR-L = sum_{k < N-1} BCE(sigmoid(image_logits_k), sigmoid(image_logits_{N-1}).detach())."""
    deepest = image_logits[-1].detach()
    return presence_loss(
        image_logits[:-1], deepest.to(loss_dtype(deepest.dtype)).sigmoid(), process_group=process_group
    )


def seg_weight_of(seg_weight: float | None, image_logits: Sequence[Tensor] | None) -> float:
    """The weight of MEA's segmentation part: the published code's beside an image-level part, 1 alone."""
    return float(seg_weight) if seg_weight is not None else 1.0 if image_logits is None else 0.8


@named
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
    """total = mea_weight MEA + sr_f_weight SR-F + sr_l_weight SR-L, with MEA = seg_weight CE + cls_weight BCE.

    A part whose weight is None is left out and returned as 0; a part of weight 0 is computed but does not count.
    """
    if size is None:
        size = labels.shape[1:]
    mea_weight, sr_f_weight, sr_l_weight = (
        None if w is None else float(w) for w in (mea_weight, sr_f_weight, sr_l_weight)
    )
    resize: dict[str, Any] = {
        "size": size,
        "align_corners": align_corners,
        "pixel_weight": pixel_weight,
        "reduction": reduction,
        "process_group": process_group,
    }
    soft: dict[str, Any] = {
        "temperature": temperature,
        "renormalize": renormalize,
        "target": target,
        "detach_teacher": detach_teacher,
    }
    shape = (labels.shape[0], *size) if reduction == "none" else ()
    mea = sr_f = sr_l = logits[0].new_zeros(shape, dtype=loss_dtype(logits[0].dtype))
    if mea_weight is not None:
        mea = seg_weight_of(seg_weight, image_logits) * mea_loss(
            logits,
            labels,
            ignore_index=ignore_index,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            exit_weights=exit_weights,
            validate=validate,
            **resize,
        )
        if image_logits is not None:
            if presence is None:
                presence = presence_vector(labels, image_logits[0].shape[1], ignore_index=ignore_index)
            image_mea = presence_loss(image_logits, presence, process_group=process_group)
            mea = mea + float(cls_weight) * image_mea.to(mea.dtype)
    if sr_f_weight is not None:
        sr_f = sr_f_loss(logits if features is None else features, **soft, **resize)
    if sr_l_weight is not None:
        sr_l = sr_l_loss(logits, **soft, **resize)
    parts = ((mea_weight, mea), (sr_f_weight, sr_f), (sr_l_weight, sr_l))
    terms = [weight * part for weight, part in parts if weight]  # of a part of weight 0 nothing, be it infinite
    if not terms:  # 0, but a function of the logits
        terms = [torch.zeros_like(mea) + z.flatten()[:0].sum().to(mea.dtype) for z in logits]
    return SelfRegulationOutput(torch.stack(terms).sum(0), mea, sr_f, sr_l)


def at_output_size(exits: Sequence[Tensor], size: Sequence[int], align_corners: bool) -> list[Tensor]:
    """The exits in at least float32, those of 4 and 5 dimensions resized to `size`."""
    exits = [z.to(loss_dtype(z.dtype)) for z in exits]
    if exits[0].dim() < 4:
        return exits
    mode = "bilinear" if exits[0].dim() == 4 else "trilinear"
    return [
        z
        if z.shape[2:] == torch.Size(size)
        else F.interpolate(z, size=tuple(size), mode=mode, align_corners=align_corners)
        for z in exits
    ]


def _where_counted(z: Tensor, weight: Tensor) -> Tensor:
    """Zeros at pixels of weight 0: a NaN there must reach neither the loss nor any gradient."""
    return z.masked_fill((weight == 0).unsqueeze(1), 0)


def _divisor(norm: Tensor, process_group: Group) -> Tensor:
    """M: the sum of `norm`; with a process group the mean of the ranks' sums, see `distributed`."""
    total = norm.sum()
    return total if process_group is None else mean_over_ranks(total, process_group).to(total.dtype)


def _reduce(loss: Tensor, weight: Tensor, divisor: Tensor, reduction: str) -> Tensor:
    """The weighted map, its sum, or its sum over `divisor`; 0 where nothing counts."""
    loss = loss * weight
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    # Divided by infinity, gradients would be 0 beside a loss of NaN.
    safe = divisor.masked_fill(divisor.isinf(), math.nan).masked_fill(divisor == 0, 1)
    return torch.where(divisor == 0, 0.0 * total, total / safe)
