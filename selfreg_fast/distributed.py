"""Means over the pixels of all ranks: what a loss with `process_group` divides by.

A mean over the union of the ranks' pixels, sum_r S_r / sum_r D_r of the ranks' sums S_r and divisors D_r, is the mean
over the ranks of S_r / D, with D = mean_r D_r. So a rank divides its own sum by D instead of D_r: data-parallel
training, which averages the ranks' gradients, then has the gradient of one process that sees all pixels.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | str | None"  # text, as a torch without distributed has no such class


def check_group(process_group: Group, reduction: str = "mean") -> None:
    """An error that says what is wrong with `process_group`, if anything is."""
    if process_group is None:
        return
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "process_group: torch.distributed is not initialised; call torch.distributed.init_process_group() before"
        )
    check_kind(process_group, reduction)


def check_kind(process_group: Group, reduction: str = "mean") -> None:
    """What can be said of `process_group` before torch.distributed is initialised."""
    if process_group is None:
        return
    if isinstance(process_group, str):
        if process_group != "world":
            raise ValueError(f"process_group: expected a ProcessGroup, 'world' or None, got {process_group!r}")
    elif not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup, 'world' or None, "
            f"got {type(process_group).__name__}"
        )
    if reduction != "mean":
        raise ValueError(
            f'process_group averages over the pixels of all ranks: it needs reduction="mean", got {reduction!r}'
        )


def mean_over_ranks(counts: Tensor, process_group: Group) -> Tensor:
    """The mean of `counts` over the ranks of the group, from one all-reduce, in float64 where the device has it."""
    if counts.requires_grad and torch.is_grad_enabled():
        raise ValueError("process_group: a divisor of all ranks has no gradient; detach pixel_weight and class_weight")
    group = None if isinstance(process_group, str) else process_group
    counts = counts.to(count_dtype(counts.device), copy=True)
    dist.all_reduce(counts, group=group)
    return counts / dist.get_world_size(group)


def count_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
