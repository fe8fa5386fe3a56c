"""Fused and reference losses from the same seed: do they train alike?

In float64 the two curves of the loss may differ by rounding only. In less precision rounding decides flips of later
roundings, and any two computations of the same mathematics part. How far is measured on the reference itself: several
runs that differ in the order of the images within their batches, in which mean losses, mean gradients and batch
normalisation are sums, and so in nothing but the order of summation. The fused losses agree with the reference if they
are no farther from its runs than those are from each other.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .training import ALL, CLASSES, PRESETS, Data, Preset, Run, batches

RUN = Run(ALL, 0, temperature=2.0)
EXACT = 1e-9  # of the loss, in float64


class Precision(NamedTuple):
    name: str
    dtype: torch.dtype  # of the parameters
    autocast: torch.dtype | None = None
    orders: int = 5  # runs of the reference


PRECISIONS = (
    Precision("fp64", torch.float64, orders=2),
    Precision("fp32", torch.float32),
    Precision("bf16 autocast", torch.float32, torch.bfloat16),
    Precision("fp16 autocast, GradScaler", torch.float32, torch.float16),
)


def curve(data: Data, preset: Preset, precision: Precision, backend: str, steps: int, order: int = 0) -> list[float]:
    """The loss at each of so many steps of training, SR terms switched on after a fifth of them.

    Args:
        data, preset: on what; its crop, batch and learning rate count.
        precision: of everything but the loss, which takes the exits as they come.
        backend: of the loss.
        steps: how many.
        order: of the images in each batch, 0 or the seed of a permutation.
    """
    device = data.class_weight.device
    torch.manual_seed(RUN.seed)
    model = preset.network(len(CLASSES)).to(device, precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), preset.learning_rate, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.autocast == torch.float16)
    criterion = RUN.criterion(data.class_weight.to(precision.dtype), backend)
    epochs = (batches(data.train, preset, RUN.seed, epoch) for epoch in itertools.count())
    shuffled = torch.Generator().manual_seed(order)
    losses = []
    for step, (images, labels) in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), steps)):
        if order:
            permutation = torch.randperm(len(images), generator=shuffled).to(device)
            images, labels = images[permutation], labels[permutation]
        criterion.enable_sr(step >= steps // 5)
        with torch.autocast(device.type, precision.autocast, enabled=precision.autocast is not None):
            logits, image_logits, features = model(images.to(precision.dtype))
        loss = criterion(logits, labels, **RUN.arguments(image_logits, features)).total
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between two curves."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def compare(
    data: Data,
    backend: str,
    steps: int,
    preset: Preset = PRESETS["quick"],
    precisions: Sequence[Precision] = PRECISIONS,
) -> list[dict[str, Any]]:
    """A row for each precision: how far the fused curve is from the reference's, and those from each other."""
    rows = []
    for precision in tqdm(precisions, desc="parity", unit="precision"):
        fused = curve(data, preset, precision, backend, steps)
        references = [curve(data, preset, precision, "reference", steps, order) for order in range(precision.orders)]
        between = [distance(a, b) for a, b in itertools.combinations(references, 2)]
        rows.append(
            {
                "precision": precision.name,
                "steps": steps,
                "first_loss": references[0][0],
                "last_loss": references[0][-1],
                "fused_to_reference": distance(fused, references[0]),
                "fused_to_references": statistics.median(distance(fused, r) for r in references),
                "between_references": statistics.median(between),
                "most_between_references": max(between),
            }
        )
    return rows


def agrees(row: dict[str, Any]) -> bool:
    """fp64: the loss of every step to 1e-9. Else: within the spread of the reference's own runs."""
    if row["precision"] == "fp64":
        return bool(row["fused_to_reference"] <= EXACT)
    return bool(row["fused_to_references"] <= row["most_between_references"])


def report(rows: Sequence[dict[str, Any]]) -> int:
    """Prints the rows; 1 if the curves of a precision do not agree."""
    for row in rows:
        print(
            f"{row['precision']:26} loss {row['first_loss']:.4f} to {row['last_loss']:.4f} in {row['steps']} steps; "
            f"to the reference {row['fused_to_reference']:.2e}, to all its runs {row['fused_to_references']:.2e}; "
            f"between these {row['between_references']:.2e}, at most {row['most_between_references']:.2e}: "
            f"{'agrees' if agrees(row) else 'DIFFERS'}"
        )
    return int(not all(map(agrees, rows)))
