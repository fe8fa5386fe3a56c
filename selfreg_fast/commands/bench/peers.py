"""Who is compared: the fused losses, the formulas typed in, the reference, eager PyTorch at its best, Liger-Kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, reference
from ...backends import AVAILABLE, backends
from .cases import (
    FUSED,
    FUSED_SR_L,
    LIGER,
    REFERENCE,
    REFERENCE_COMPILED,
    TRITON,
    WRITTEN,
    Case,
)

Exits = Sequence[Tensor]
Loss = Callable[[Exits, Tensor], Tensor]

IGNORE = 255
SEG_WEIGHT = 0.8  # of the label losses in the objective, as in the published code
ANOTHER_VALUE = (LIGER, FUSED_SR_L)  # peers whose loss is not the reference's: see there


class CannotRun(Exception):
    """A peer for which this machine lacks something; the text says what."""


class Peer(NamedTuple):
    """A loss, and what must first be done to the exits, which is timed apart and part of the forward."""

    loss: Loss
    prepare: Callable[[Exits], Exits] = lambda exits: exits


def build(name: str, case: Case, device: str) -> Peer:
    """The peer of that name, one that fits the case. CannotRun: why there is none here."""
    if name == FUSED:
        return Peer(fused(case, device))
    if name == TRITON:
        return Peer(fused(case, "triton"))
    if name == FUSED_SR_L:  # beside the objective: how much the other terms add
        return Peer(fused(case._replace(terms="sr-l"), device))
    if name == LIGER:
        return liger(case, device)
    if name == WRITTEN:
        return Peer(resized(as_written(case.terms, case.temperature), case.size))
    if name in (REFERENCE, REFERENCE_COMPILED):
        eager = ours(reference, case._replace(size=case.output))  # given, since torch.compile cannot find it
    else:
        eager = resized(tuned(case.terms, case.temperature), case.size)
    return Peer(torch.compile(eager, fullgraph=True, dynamic=False) if "compiled" in name else eager)


def fused(case: Case, backend: str) -> Loss:
    """This package's kernels."""
    if backend == "triton" and not torch.cuda.is_available():
        raise CannotRun("Triton's kernels need a GPU")
    if (state := backends()[backend]) != AVAILABLE:
        raise CannotRun(state)
    return ours(functional, case, backend=backend)


def ours(library: ModuleType, case: Case, **backend: str) -> Loss:
    """This package's function for the terms, fused or from its reference."""
    options: dict[str, Any] = {"size": case.size, **backend}
    soft = {"temperature": case.temperature}

    def loss(exits: Exits, labels: Tensor) -> Tensor:
        value: Tensor
        if case.terms == "objective":
            weighted = {"seg_weight": SEG_WEIGHT, "ignore_index": IGNORE}
            value = library.self_regulation_loss(exits, labels, **weighted, **soft, **options).total
        elif case.terms == "mea":
            value = library.mea_loss(exits, labels, ignore_index=IGNORE, **options)
        else:
            value = (library.sr_f_loss if case.terms == "sr-f" else library.sr_l_loss)(exits, **soft, **options)
        return value

    return loss


def as_written(terms: str, tau: float) -> Loss:
    """The formulas as one types them in: softmax, power, logarithm, product, for each pair of exits."""

    def soft(teacher: Tensor, student: Tensor) -> Tensor:
        p = F.softmax(teacher.detach(), 1) ** (1 / tau)
        q = F.softmax(student, 1) ** (1 / tau)
        return -(tau**2) * (p * q.log()).sum(1).mean()

    def sr_f(exits: Exits, labels: Tensor) -> Tensor:
        return torch.stack([soft(exits[0], z) for z in exits[1:]]).sum()

    def sr_l(exits: Exits, labels: Tensor) -> Tensor:
        return torch.stack([soft(exits[-1], z) for z in exits[:-1]]).sum()

    def mea(exits: Exits, labels: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(z, labels, ignore_index=IGNORE) for z in exits]).sum()

    def objective(exits: Exits, labels: Tensor) -> Tensor:
        return SEG_WEIGHT * mea(exits, labels) + sr_f(exits, labels) + sr_l(exits, labels)

    return {"sr-f": sr_f, "sr-l": sr_l, "mea": mea, "objective": objective}[terms]


def tuned(terms: str, tau: float) -> Loss:
    """Eager PyTorch as a careful user writes it: one log_softmax an exit, one exp a teacher, no power, no logarithm."""

    def soft(p: Tensor, log_q: Tensor) -> Tensor:
        # A sum returned in float16 overflows. One in float32 costs a copy, which the other dtypes need not pay.
        total = (p * log_q).sum(dtype=torch.float32 if p.dtype == torch.float16 else None)
        return (-tau * log_q.shape[1] / log_q.numel()) * total.to(reference.loss_dtype(p.dtype))

    def loss(exits: Exits, labels: Tensor) -> Tensor:
        log_q = [F.log_softmax(z, 1) for z in exits]
        parts = []
        if terms != "sr-l":
            p = (log_q[0].detach() / tau).exp()
            parts += [soft(p, log) for log in log_q[1:]]
        if terms != "sr-f":
            p = (log_q[-1].detach() / tau).exp()
            parts += [soft(p, log) for log in log_q[:-1]]
        if terms == "objective":
            hard = torch.stack([F.nll_loss(log, labels, ignore_index=IGNORE) for log in log_q]).sum()
            parts.append(SEG_WEIGHT * hard.to(parts[0].dtype))
        return torch.stack(parts).sum()

    return loss


def resized(loss: Loss, size: tuple[int, int] | None) -> Loss:
    """A loss of exits that are first resized to `size`."""
    if size is None:
        return loss
    return lambda exits, labels: loss([F.interpolate(z, size=size, mode="bilinear") for z in exits], labels)


def liger(case: Case, device: str) -> Peer:
    """SR-L by Liger-Kernel's KL divergence, whose value has the teacher's entropy in it; the gradient is the same.

    It covers exits of the output's size. It wants rows of classes, (B H W, C): copies of NCHW exits, made in `prepare`,
    and a log_softmax by PyTorch.
    """
    if device != "cuda":
        raise CannotRun("its kernels are written in Triton, which needs a GPU")
    if find_spec("liger_kernel") is None:
        raise CannotRun("not installed: pip install liger-kernel")
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence, tau = LigerKLDIVLoss(reduction="batchmean"), case.temperature

    def rows(exits: Exits) -> Exits:
        return [z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]) for z in exits]

    def loss(exits: Exits, labels: Tensor) -> Tensor:
        p = (F.log_softmax(exits[-1].detach(), 1) / tau).exp()
        return torch.stack([tau * divergence(F.log_softmax(z, 1), p) for z in exits[:-1]]).sum()

    return Peer(loss, rows)
