"""The exit-loss matrix as a differentiable function of the exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, passes
from .ops import Options

# Whether the backward that runs was asked to retain its graph. torch's own, but not public: it may go.
_KEEPS_GRAPH = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
# Whether torch.func transforms this call; without it, torch's own error says less.
_IN_FUNCTORCH = getattr(torch._C, "_are_functorch_transforms_active", None)


def exit_loss(
    backend: str,
    exits: Sequence[Tensor],
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    scale: Tensor | None,
    weights: tuple[float, ...],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """`(total, losses)` of :func:`selfreg_fast.passes.exit_loss`, both differentiable with respect to the exits.

    With `weights`, the gradients of the total are written by the forward launch itself. `scale` (T + 1, 1) multiplies
    the losses' rows, and the total and the gradients accordingly.
    """
    if _IN_FUNCTORCH is not None and not torch.compiler.is_compiling() and _IN_FUNCTORCH():
        raise RuntimeError("selfreg_fast: the fused losses do not work under torch.func; pass backend='reference'")
    wanted: tuple[int, ...] = ()
    if torch.is_grad_enabled():
        wanted = tuple(i for i, z in enumerate(exits) if z.requires_grad and _learns(i, labels is not None, options))
    try:
        total, losses = _ExitLoss.apply(  # type: ignore[no-untyped-call]
            backend, labels, class_weight, pixel_weight, scale, weights, wanted, options, *exits
        )
        return total, losses
    except (RuntimeError, ValueError):
        if labels is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, exits[0].shape[1], options.ignore_index)  # the kernel met a label out of range
        raise


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """ValueError with value and position of the first label that is neither a class nor ignored."""
    labels = labels.long()  # a uint8 tensor compared with 300 is compared with 44
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"labels: expected classes in [0, {num_classes}) or ignore_index={ignore_index}, "
            f"got {labels[position].item()} at {position}"
        )


def _learns(i: int, labelled: bool, options: Options) -> bool:
    """Whether any of the losses has a gradient for exit i: from the labels, from a teacher, or as one that learns.

    Also one of weight 0 in the total: the losses are differentiable, too.
    """
    if labelled or any(t != i for t in options.teachers):
        return True
    return i in options.teachers and not options.detach_teacher


class _ExitLoss(torch.autograd.Function):
    """One launch forward. Backward: the saved gradients, or the same launch again with the losses' gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        labels: Tensor | None,
        class_weight: Tensor | None,
        pixel_weight: Tensor | None,
        scale: Tensor | None,
        weights: tuple[float, ...],
        wanted: tuple[int, ...],
        options: Options,
        *exits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # In float16 a gradient already divided by the number of pixels underflows before a loss scaler multiplies it:
        # there the backward recomputes, with the scaled gradient.
        now = wanted if weights and exits[0].dtype != torch.float16 else ()
        if scale is None:
            total, losses, grads = passes.exit_loss(
                backend, exits, labels, class_weight, pixel_weight, None, weights, now, options
            )
        else:  # on the device, so it cannot be in `weights`: what these have in the total is given as a gradient
            gains = scale * _times(scale.new_ones(()), weights, len(exits)) if weights else None
            total, losses, grads = passes.exit_loss(
                backend, exits, labels, class_weight, pixel_weight, gains, (), now, options
            )
            if gains is not None:
                total = (gains * losses).masked_fill(gains == 0, 0).sum()
            losses = losses * scale
        ctx.backend, ctx.weights, ctx.wanted, ctx.options, ctx.saved = backend, weights, wanted, options, len(grads)
        ctx.save_for_backward(labels, class_weight, pixel_weight, scale, *exits, *grads)
        return total, losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: under checkpointing it may recompute.
        labels, class_weight, pixel_weight, scale, *tensors = ctx.saved_tensors
        exits, grads = tensors[: len(tensors) - ctx.saved], tensors[len(tensors) - ctx.saved :]
        if not ctx.weights:
            grad_total = None  # that total is the constant 0
        with torch.no_grad():
            if not ctx.wanted or (grad_total is None and grad_losses is None):
                grads = []
            elif grads and grad_total is not None and grad_losses is None:
                grads = _scaled(ctx.backend, grads, grad_total)
            else:
                if grad_total is not None:
                    from_total = _times(grad_total, ctx.weights, len(exits))
                    grad_losses = from_total if grad_losses is None else grad_losses + from_total
                assert grad_losses is not None
                if scale is not None:
                    grad_losses = grad_losses * scale
                grads = passes.exit_loss(
                    ctx.backend,
                    exits,
                    labels,
                    class_weight,
                    pixel_weight,
                    grad_losses.contiguous(),
                    (),
                    ctx.wanted,
                    ctx.options,
                )[2]
        if grads and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _OnceDifferentiable.apply(len(grads), *grads, *exits)  # type: ignore[no-untyped-call]
        result: list[Tensor | None] = [None] * len(exits)
        if grads:
            for i, g in zip(ctx.wanted, grads, strict=True):
                result[i] = g
        return None, None, None, None, None, None, None, None, *result


class _OnceDifferentiable(torch.autograd.Function):
    """Passes on gradients that are functions of the exits; differentiating them again is an error that says so."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "selfreg_fast: the fused losses are differentiable once; for second derivatives pass backend='reference'"
        )


def _times(x: Tensor, weights: tuple[float, ...], n: int) -> Tensor:
    """(T + 1, N): a scalar tensor times each weight. No tensor of the weights: making one on a GPU waits for it."""
    return torch.stack(torch._foreach_mul([x] * len(weights), list(weights))).view(-1, n)


def _scaled(backend: str, grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    """The saved gradients times `factor`: in place in a graph's last backward, for which nobody keeps them."""
    if _is_one(factor):
        return grads
    if torch.compiler.is_compiling() or _KEEPS_GRAPH is None or _KEEPS_GRAPH():
        return [g * factor for g in grads]
    ops.scale_(backend, grads, factor)
    return grads


def _is_one(x: Tensor) -> bool:
    """Whether a CPU scalar is 1, where looking costs nothing: not on a GPU (a sync), nor in a traced graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.item() == 1
