"""Fused and reference losses from the same seed: do they train alike?

In float64 the two curves of the loss may differ by rounding only. In less precision every step rounds otherwise, and
how far that takes two computations of the same mathematics apart is measured on the reference itself: several runs that
differ in the order of the images within their batches, in which mean losses, mean gradients and batch normalisation are
sums, and so in nothing but the order of summation. The fused losses agree with the reference if they are no farther
from its runs than those are from each other, and that is little.

The setting is one in which it is little, and a wrong loss therefore shows. At the ablation's learning rate a difference
grows tenfold in about eight steps; at a thirtieth of it, it stays what it is while the loss still falls. And a ReLU
whose input is within a rounding of zero passes a gradient or none: in float32 some do in every step, and part the
curves a thousand times farther than rounding does. So the ReLUs are replaced by a smooth function. All terms are on
from the first step: SR-F on features and SR-L at a temperature, MEA with its image-level part. Targets are
renormalised: with raw powers at this temperature the loss hardly falls, and a difference grows; float64 compares them,
too.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from tqdm import tqdm

from .training import ALL, CLASSES, MOMENTUM, PRESETS, Data, Preset, QuickNetwork, Run, batches

EXACT = 1e-9  # of every loss, in float64
RUN = Run(ALL, 0, temperature=2.0, renormalize=True)
PARTS = ("total", "mea", "sr_f", "sr_l")


class SmoothNetwork(QuickNetwork):
    """The quick network, with SiLU for ReLU."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, name, nn.SiLU())


PRESET = PRESETS["quick"]._replace(network=SmoothNetwork, crop=(48, 64), learning_rate=0.005)


class Precision(NamedTuple):
    name: str
    dtype: torch.dtype  # of the parameters
    autocast: torch.dtype | None = None
    small: float = 0.0  # spread of the reference's runs, as a share of the loss, up to which it says something
    orders: int = 5  # runs of the reference
    run: Run = RUN


PRECISIONS = (
    Precision("fp64", torch.float64, orders=2),
    Precision("fp64, raw powers", torch.float64, orders=2, run=RUN._replace(renormalize=False)),
    Precision("fp32", torch.float32, small=1e-5),
    Precision("bf16 autocast", torch.float32, torch.bfloat16, small=2**-8),  # halves: one rounding
    Precision("fp16 autocast, GradScaler", torch.float32, torch.float16, small=2**-11),
)


def curve(data: Data, preset: Preset, precision: Precision, backend: str, steps: int, order: int = 0) -> Tensor:
    """The losses at each of so many steps of training, (steps, 4): the total, and its parts before their weights.

    Args:
        data, preset: on what; its network, crop, batch and learning rate count.
        precision: of everything but the loss, which takes the exits as they come; its run is the objective.
        backend: of the loss.
        steps: how many.
        order: of the images in each batch, 0 or the seed of a permutation.
    """
    run, device = precision.run, data.class_weight.device
    torch.manual_seed(run.seed)
    model = preset.network(len(CLASSES)).to(device, precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), preset.learning_rate, momentum=MOMENTUM)
    in_fp16 = precision.autocast == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=in_fp16)
    criterion = run.criterion(data.class_weight.to(precision.dtype), backend)
    epochs = (batches(data.train, preset, run.seed, epoch) for epoch in itertools.count())
    shuffled = torch.Generator().manual_seed(order)
    losses = []
    with _fast_convolutions(in_fp16 and device.type == "cpu"):
        for images, labels in itertools.islice(itertools.chain.from_iterable(epochs), steps):
            if order:
                permutation = torch.randperm(len(images), generator=shuffled).to(device)
                images, labels = images[permutation], labels[permutation]
            with torch.autocast(device.type, precision.autocast, enabled=precision.autocast is not None):
                logits, image_logits, features = model(images.to(precision.dtype))
            output = criterion(logits, labels, **run.arguments(image_logits, features))
            optimizer.zero_grad()
            scaler.scale(output.total).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(torch.stack(output).detach())
    return torch.stack(losses)


@contextmanager
def _fast_convolutions(in_fp16_on_cpu: bool) -> Iterator[None]:
    """Without oneDNN, whose float16 convolutions take ten times as long in the backward as PyTorch's own."""
    before = mkldnn.enabled
    mkldnn.enabled = before and not in_fp16_on_cpu
    try:
        yield
    finally:
        mkldnn.enabled = before


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference between two curves, in any step, of the total or one of its parts."""
    return (one - other).abs().max().item()


def compare(
    data: Data, backend: str, steps: int, preset: Preset = PRESET, precisions: Sequence[Precision] = PRECISIONS
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
                **{f"first_{part}": loss for part, loss in zip(PARTS, references[0][0].tolist(), strict=True)},
                **{f"last_{part}": loss for part, loss in zip(PARTS, references[0][-1].tolist(), strict=True)},
                "fused_to_reference": distance(fused, references[0]),
                "fused_to_references": statistics.median(distance(fused, r) for r in references),
                "between_references": statistics.median(between),
                "most_between_references": max(between),
            }
        )
    return rows


def agrees(row: dict[str, Any]) -> bool:
    """fp64: every loss of every step to 1e-9. Else: within the spread of the reference's own runs, a small one."""
    if row["precision"].startswith("fp64"):
        return bool(row["fused_to_reference"] <= EXACT)
    small = next(p.small for p in PRECISIONS if p.name == row["precision"])
    spread = row["most_between_references"]
    return bool(row["fused_to_references"] <= spread <= small * row["last_total"])


def report(rows: Sequence[dict[str, Any]]) -> int:
    """Prints the rows; 1 if the curves of a precision do not agree."""
    for row in rows:
        print(
            f"{row['precision']:26} loss {row['first_total']:.4f} to {row['last_total']:.4f} in {row['steps']} steps; "
            f"to the reference {row['fused_to_reference']:.2e}, to all its runs {row['fused_to_references']:.2e}; "
            f"between these {row['between_references']:.2e}, at most {row['most_between_references']:.2e}: "
            f"{'agrees' if agrees(row) else 'DIFFERS'}"
        )
    return int(not all(map(agrees, rows)))
