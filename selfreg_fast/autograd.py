"""The exit-loss matrix as a differentiable function of the exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, passes, reference
from .checks import check_label_values, has_values, is_real
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
    """`(total, losses)` of `passes.exit_loss`, both differentiable with respect to the exits.

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
        if labels is not None and has_values(labels):
            check_label_values(labels, exits[0].shape[1], options.ignore_index)  # the kernel met one out of range
        raise


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
        if not ctx.wanted or (grad_total is None and grad_losses is None):
            return (None,) * (8 + len(exits))
        tracked = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        with torch.set_grad_enabled(tracked):
            if grads and grad_total is not None and grad_losses is None:
                if tracked:  # of copies, as a later backward may scale what is saved
                    grads = [g * grad_total for g in _once([g.clone() for g in grads], exits)]
                else:
                    grads = _scaled(ctx.backend, grads, grad_total)
            else:
                if grad_total is not None:
                    from_total = _times(grad_total, ctx.weights, len(exits))
                    grad_losses = from_total if grad_losses is None else grad_losses + from_total
                assert grad_losses is not None
                if scale is not None:
                    grad_losses = grad_losses * scale
                weighing = (labels, class_weight, pixel_weight)
                with torch.no_grad():
                    given = grad_losses.contiguous()
                    grads = passes.exit_loss(ctx.backend, exits, *weighing, given, (), ctx.wanted, ctx.options)[2]
                if tracked:
                    grads = _ByGradLosses.apply(  # type: ignore[no-untyped-call]
                        *weighing, ctx.wanted, ctx.options, grad_losses, *_once(grads, exits), *exits
                    )
        result: list[Tensor | None] = [None] * len(exits)
        for i, g in zip(ctx.wanted, grads, strict=True):
            result[i] = g
        return None, None, None, None, None, None, None, None, *result


def _once(values: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    """`values` as functions of the tensors `of`, whose derivative is an error by name."""
    return list(_OnceDifferentiable.apply(len(values), *values, *of))  # type: ignore[no-untyped-call]


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "selfreg_fast: the fused losses are differentiable once by their exits; for second derivatives pass "
            "backend='reference'"
        )


class _ByGradLosses(torch.autograd.Function):
    """Passes on the exits' gradients, which are linear in the gradient of the losses.

    With u the latter, the gradients are sum_e u_e (d losses_e / d exits); their derivative by u_e along v is the
    derivative of losses_e along v. It is rarely asked for (by learned weights of losses, as in GradNorm), and no launch
    has it: the reference computes it, twice through its graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor | None,
        class_weight: Tensor | None,
        pixel_weight: Tensor | None,
        wanted: tuple[int, ...],
        options: Options,
        grad_losses: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        grads, exits = tensors[: len(wanted)], tensors[len(wanted) :]
        ctx.wanted, ctx.options = wanted, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(labels, class_weight, pixel_weight, grad_losses, *exits)
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        labels, class_weight, pixel_weight, grad_losses, *exits = ctx.saved_tensors
        by_losses = None
        if ctx.needs_input_grad[5]:
            with torch.enable_grad():
                u = grad_losses.detach().requires_grad_()
                inputs = [z.detach().requires_grad_(i in ctx.wanted) for i, z in enumerate(exits)]
                losses = _of_reference(inputs, labels, class_weight, pixel_weight, ctx.options)
                by_losses = torch.zeros_like(u)
                if losses.requires_grad:
                    wanted = [inputs[i] for i in ctx.wanted]
                    grads = torch.autograd.grad(losses, wanted, u, create_graph=True, materialize_grads=True)
                    pairs = [(g, v) for g, v in zip(grads, along, strict=True) if v is not None and g.requires_grad]
                    if pairs:
                        (by_losses,) = torch.autograd.grad([g for g, _ in pairs], u, [v for _, v in pairs])
            if torch.is_grad_enabled():
                (by_losses,) = _once([by_losses], [*(v for v in along if v is not None), *exits])
        return None, None, None, None, None, by_losses, *along, *(None for _ in exits)


def _of_reference(
    exits: Sequence[Tensor],
    labels: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    options: Options,
) -> Tensor:
    """The losses of a launch, as the reference computes them."""
    taken: dict[str, Any] = options._asdict()
    target = taken.pop("target")
    return reference.exit_loss_matrix(
        exits,
        labels,
        class_weight=class_weight,
        pixel_weight=pixel_weight,
        renormalize=target == "renormalized",
        target="argmax" if target == "argmax" else "soft",
        **taken,
    )


def _times(x: Tensor, weights: tuple[float, ...], n: int) -> Tensor:
    """(T + 1, N): a scalar tensor times each weight. No tensor of the weights: making one on a GPU waits for it."""
    return torch.stack(torch._foreach_mul([x] * len(weights), list(weights))).view(-1, n)


def _scaled(backend: str, grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    """The saved gradients times `factor`: copies, but in a graph's last backward, which nobody else has them from."""
    if not is_real(factor) or _KEEPS_GRAPH is None or _KEEPS_GRAPH():
        return [g * factor for g in grads]
    if not _is_one(factor):
        ops.scale_(backend, grads, factor)
    return grads


def _is_one(x: Tensor) -> bool:
    """Whether a CPU scalar is 1, where looking costs nothing: not on a GPU (a sync), nor in a traced graph."""
    return has_values(x) and x.item() == 1
