"""One run of the ablation: CamVid in memory, a multi-exit network, five objectives, an epoch at a time.

What is random in an epoch (the order, and each image's scale, crop and flip) follows from the seed and the epoch's
number alone. Runs of one seed therefore see the same images whatever their objective, and a run that goes on from its
checkpoint sees what it would have seen.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfreg_fast import SelfRegulationLoss
from selfreg_fast.commands.data import DataError, Folder, Sample
from selfreg_fast.commands.demo import MultiExitNet, enet_class_weight

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
THIN = ("pole", "sign", "pedestrian", "cyclist")
VOID = 11
SCALES = (0.8, 1.6)  # of a training image; at the smallest the crop is the whole image
POWER = 0.9  # of the poly schedule
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4

# What the objective is made of: options of SelfRegulationLoss. Only the exits that are trained get labels, and without
# the other exits there are no image-level predictions either.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "deepest exit only": {"sr_f_weight": None, "sr_l_weight": None, "exit_weights": (0.0, 0.0, 0.0, 1.0)},
    "MEA": {"sr_f_weight": None, "sr_l_weight": None},
    "MEA + SR-F": {"sr_l_weight": None},
    "MEA + SR-L": {"sr_f_weight": None},
    "MEA + SR-F + SR-L": {},
}
BASELINE, ALL = "deepest exit only", "MEA + SR-F + SR-L"


class Network(MultiExitNet):
    """The demo's network with features of as many channels at every exit: the last before the logits.

    Returns:
        Of `forward`, for images (B, 3, H, W): logits and image-level predictions as of :class:`MultiExitNet`, and four
        features (B, hidden, H/s, W/s).
    """

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # type: ignore[override]
        x, logits, image_logits, features = self.stem(images), [], [], []
        for stage, head, image_head in zip(self.stages, self.exits, self.image_heads, strict=True):
            x = hidden = stage(x)
            *body, last = head.children()
            for layer in body:
                hidden = layer(hidden)
            features.append(hidden)
            logits.append(last(hidden))
            image_logits.append(image_head(logits[-1].mean((2, 3))))
        return logits, image_logits, features


class FullNetwork(Network):
    """3.8 million parameters in the backbone, as a ResNet-18 of half the width at its end."""

    widths = (64, 128, 256, 256)
    hidden = (128, 128, 128, 128)


class QuickNetwork(Network):
    """As small as two CPU cores can train fifteen times in ten minutes."""

    widths = (16, 32, 64, 64)
    hidden = (32, 32, 32, 32)


class Preset(NamedTuple):
    """How large everything is."""

    name: str
    network: type[Network]
    side: int  # the images' shorter side
    crop: tuple[int, int]  # height and width of a training sample
    batch: int
    epochs: int
    every: int  # epochs between evaluations
    learning_rate: float


PRESETS = {
    "full": Preset("full", FullNetwork, 360, (288, 384), 16, 100, 10, 0.1),
    "quick": Preset("quick", QuickNetwork, 90, (72, 96), 8, 20, 5, 0.15),
}


class Run(NamedTuple):
    """What one training is: an objective and a seed, the settings of the SR terms, the epochs."""

    objective: str
    seed: int
    temperature: float = 1.0
    renormalize: bool = False
    sr_f_weight: float = 1.0
    sr_l_weight: float = 1.0
    sr_f_on: str = "features"  # or "logits"
    published: bool = False  # targets and SR-L of the published code
    warmup: float = 0.5  # part of the epochs without SR terms
    epochs: int | None = None  # None: the preset's

    @property
    def settings(self) -> str:
        """Those that are not the defaults, in words; "" if all are."""
        words = {
            "temperature": f"τ = {self.temperature:g}",
            "renormalize": "renormalised",
            "sr_f_weight": f"SR-F × {self.sr_f_weight:g}",
            "sr_l_weight": f"SR-L × {self.sr_l_weight:g}",
            "sr_f_on": f"SR-F on {self.sr_f_on}",
            "published": "as published",
            "warmup": f"warm-up {100 * self.warmup:g} %",
            "epochs": f"{self.epochs} epochs",
        }
        return ", ".join(text for field, text in words.items() if getattr(self, field) != self._field_defaults[field])

    @property
    def name(self) -> str:
        """Of its files."""
        text = f"{self.objective} {self.settings}".replace("τ", "t").replace("×", "x")
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text).split()) + f"-{self.seed}"

    def criterion(self, class_weight: Tensor, backend: str = "auto") -> SelfRegulationLoss:
        options = {"sr_f_weight": self.sr_f_weight, "sr_l_weight": self.sr_l_weight, **OBJECTIVES[self.objective]}
        variant = SelfRegulationLoss.published if self.published else SelfRegulationLoss
        return variant(
            seg_weight=0.8,  # of every objective, with image-level predictions or not: as the results here were found
            temperature=self.temperature,
            renormalize=self.renormalize,
            ignore_index=VOID,
            class_weight=class_weight,
            backend=backend,
            **options,
        )

    def arguments(self, image_logits: list[Tensor], features: list[Tensor]) -> dict[str, Any]:
        """What the criterion gets beside logits and labels."""
        return {
            "image_logits": None if self.objective == BASELINE else image_logits,
            "features": features if self.sr_f_on == "features" else None,
        }


class Split(NamedTuple):
    """Images (N, 3, H, W) and labels (N, H, W), uint8, on the device that trains."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    train: Split
    val: Split
    class_weight: Tensor  # (C,)


class _CamVid(Folder):
    """All of it at the preset's size."""

    validation_count = 101

    def __init__(self, root: Path, side: int) -> None:
        self.side = side
        super().__init__(root, ignore_index=VOID)


def load(root: Path, preset: Preset, device: torch.device) -> Data:
    """CamVid, reduced to the preset's size. DataError: it is not CamVid."""
    source = _CamVid(root, preset.side)
    if len(source.names) != len(CLASSES):
        raise DataError(f"--data {root}: expected CamVid's {len(CLASSES)} classes, found {len(source.names)}")
    weight = enet_class_weight(source.shares).to(device)
    return Data(_stacked(source.all_training(), device), _stacked(source.validation(), device), weight)


def _stacked(samples: Iterable[Sample], device: torch.device) -> Split:
    images, labels = zip(*samples, strict=True)
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Split(stack.to(device), torch.from_numpy(np.stack(labels)).to(device))


def batches(split: Split, preset: Preset, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches, augmented: images (B, 3, h, w) around 0, labels (B, h, w), uint8."""
    rng = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(split.images), generator=rng)
    size = split.images.shape[2:]
    for chosen in order.split(preset.batch):
        if len(chosen) < preset.batch:
            return
        numbers = torch.rand(4, len(chosen), generator=rng)
        scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** numbers[0]  # as often twice as large as half as large
        # Where in the image, from -1 to 1, the crop's pixels lie: a matrix [x from x, 0, shift; 0, y from y, shift].
        part = [torch.clamp(c / s / scale, max=1) for c, s in zip(preset.crop, size, strict=True)]
        shift = [(2 * n - 1) * (1 - p) for n, p in zip(numbers[1:3], part, strict=True)]
        mirror = 1 - 2 * (numbers[3] < 0.5).float()
        zero = torch.zeros_like(scale)
        theta = torch.stack([part[1] * mirror, zero, shift[1], zero, part[0], shift[0]], 1).view(-1, 2, 3)
        device = split.images.device
        grid = F.affine_grid(theta, [len(chosen), 1, *preset.crop], align_corners=False).to(device)
        chosen = chosen.to(device)
        images = F.grid_sample(split.images[chosen].float(), grid, padding_mode="border", align_corners=False)
        labels = split.labels[chosen, None].float()
        labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="border", align_corners=False)
        yield normalized(images), labels[:, 0].to(torch.uint8)


def normalized(images: Tensor) -> Tensor:
    """Images from 0 to 255 around 0, channels last: on CPU and GPU alike convolutions are faster so."""
    return ((images.float() - 127.5) / 64).contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def predict(model: Network, images: Tensor) -> Tensor:
    """The class at each pixel at each exit, (N, B, H, W), for images as loaded."""
    with autocast(images.device):
        logits = model(normalized(images))[0]
    size = images.shape[2:]
    return torch.stack([F.interpolate(z.float(), size, mode="bilinear").argmax(1) for z in logits])


def evaluate(model: Network, split: Split, batch: int) -> Tensor:
    """IoU of each class at each exit on the whole split, (N, C)."""
    model.eval()
    classes, exits = len(CLASSES), len(model.strides)
    confusion = torch.zeros(exits, classes * classes, device=split.images.device)
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        counted = labels != VOID
        for total, predicted in zip(confusion, predict(model, images), strict=True):
            pairs = labels[counted].long() * classes + predicted[counted]
            total += torch.bincount(pairs, minlength=classes * classes)
    model.train()
    confusion = confusion.view(exits, classes, classes).double()
    both = confusion.diagonal(dim1=1, dim2=2)
    return (both / (confusion.sum(1) + confusion.sum(2) - both)).cpu()


def columns() -> list[str]:
    """Of the rows that a run yields: one for each exit at each evaluation."""
    return [
        *"preset objective settings seed epoch epochs exit".split(),
        *"loss miou thin_miou".split(),
        *CLASSES,
        *"seconds cpu_seconds".split(),
    ]


def train(
    run: Run,
    preset: Preset,
    data: Data,
    folder: Path,
    backend: str = "auto",
    common: dict[str, Any] | None = None,
    deadline: float = float("inf"),
    advance: Callable[[str], object] = lambda text: None,
) -> bool:
    """Trains, or goes on from FOLDER/NAME.pt, which is written after each epoch; FOLDER/NAME.csv when all is done.

    Runs with MEA are the same until the SR terms come: a seed's first leaves its state at that epoch to the others.

    Args:
        run, preset, data: what.
        folder: of the checkpoint and of the results.
        backend: of the loss.
        common: goes into every row.
        deadline: by `time.monotonic()`; after it no epoch is begun.
        advance: called after each epoch with something to say.

    Returns:
        Whether all is done.

    Raises:
        ValueError: the checkpoint is that of another preset.
    """
    device = data.class_weight.device
    preset = preset._replace(epochs=run.epochs or preset.epochs)
    torch.manual_seed(run.seed)
    model = preset.network(len(CLASSES)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), preset.learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    criterion = run.criterion(data.class_weight, backend)
    checkpoint = folder / f"{run.name}.pt"
    start = math.ceil(run.warmup * preset.epochs)
    shared = folder / f"warm-up-{start}-of-{preset.epochs}-{run.seed}.pt"
    shares = run.objective != BASELINE
    described = {**preset._asdict(), "network": preset.network.__name__}
    state: dict[str, Any] = {"preset": described, "epoch": 0, "rows": [], "seconds": 0.0, "cpu_seconds": 0.0}
    if (path := checkpoint).exists() or (shares and (path := shared).exists()):
        loaded = torch.load(path, map_location=device, weights_only=True)
        if loaded["preset"] != state["preset"]:
            raise ValueError(f"{path} was written by {loaded['preset']}, expected {state['preset']}")
        state = loaded
        state["rows"] = [{**row, "objective": run.objective, "settings": run.settings} for row in state["rows"]]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(state["epoch"], preset.epochs):
        if time.monotonic() > deadline:
            return False
        wall, cpu = time.perf_counter(), time.process_time()
        criterion.enable_sr(epoch >= start)
        loss = train_epoch(run, preset, model, criterion, optimizer, data.train, epoch)
        ious = None
        if (epoch + 1) % preset.every == 0 or epoch + 1 == preset.epochs:
            ious = evaluate(model, data.val, preset.batch)
        state["epoch"] = epoch + 1
        state["seconds"] += time.perf_counter() - wall
        state["cpu_seconds"] += time.process_time() - cpu
        if ious is not None:
            state["rows"] += [{**(common or {}), **row} for row in _rows(run, preset, state, loss, ious)]
        saved = {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        _save(saved, checkpoint)
        if shares and epoch + 1 == start:
            _save(saved, shared)
        advance(f"loss {loss:.3f}" + ("" if ious is None else f", mIoU {100 * ious[-1].nanmean():.1f}"))
    write(state["rows"], folder / f"{run.name}.csv")
    return True


def train_epoch(
    run: Run,
    preset: Preset,
    model: Network,
    criterion: SelfRegulationLoss,
    optimizer: torch.optim.Optimizer,
    split: Split,
    epoch: int,
) -> float:
    """One epoch; the mean of its losses."""
    steps = len(split.images) // preset.batch
    total = torch.zeros((), device=split.images.device)
    for step, (images, labels) in enumerate(batches(split, preset, run.seed, epoch)):
        done = (epoch * steps + step) / (preset.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = preset.learning_rate * (1 - done) ** POWER
        with autocast(images.device):
            logits, image_logits, features = model(images)
        loss = criterion(logits, labels, **run.arguments(image_logits, features)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return total.item() / steps


def _rows(run: Run, preset: Preset, state: dict[str, Any], loss: float, ious: Tensor) -> list[dict[str, Any]]:
    thin = [CLASSES.index(name) for name in THIN]
    return [
        {
            "preset": preset.name,
            "objective": run.objective,
            "settings": run.settings,
            "seed": run.seed,
            "epoch": state["epoch"],
            "epochs": preset.epochs,
            "exit": exit,
            "loss": round(loss, 5),
            "miou": round(iou.nanmean().item(), 5),
            "thin_miou": round(iou[thin].nanmean().item(), 5),
            **{name: round(value, 5) for name, value in zip(CLASSES, iou.tolist(), strict=True)},
            "seconds": round(state["seconds"], 1),
            "cpu_seconds": round(state["cpu_seconds"], 1),
        }
        for exit, iou in enumerate(ious)
    ]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """A CSV file of the rows, all at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def _save(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
