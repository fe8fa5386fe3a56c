"""More exits than one launch takes: some teachers with some students at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import ops
from .ops import Options


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
    """`ops.exit_loss` of any number of exits."""
    most = ops.MOST_EXITS.get(backend, len(exits))
    run = ops.exit_loss if len(exits) <= most else partial(_in_passes, most)
    return run(backend, exits, labels, class_weight, pixel_weight, grad_losses, weights, wanted, options)


def _in_passes(
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
    """Launches of at most `most` exits.

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
            block_total, block_losses, block_grads = ops.exit_loss(
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
