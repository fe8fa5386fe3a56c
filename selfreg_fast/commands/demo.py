"""`selfreg-fast demo`: a small multi-exit segmentation network, trained with the fused loss in about two minutes.

The network's exits stay at their own resolution; the loss resizes them to the labels. As is advised,
it trains on MEA alone for a quarter of the steps and then adds SR-F and SR-L, at a tenth of its weight.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..backends import backends, choose
from ..exits import ExitHead
from ..modules import SelfRegulationLoss
from .measure import Timing, in_fresh_process, median_seconds, peak_bytes
from .words import compared

# Only the demo needs what is in its extra: it is imported when the demo runs, so that --help works without.
if TYPE_CHECKING:
    from rich.console import Console

    from .data import Pixels, Sample, Source

WARMUP = 1 / 4  # of the steps, on MEA alone
SR_WEIGHT = 0.1  # of SR-F and SR-L
LEARNING_RATE = 3e-3
WATCHED = 8  # validation images on which the losses are compared before and after
ROWS = 4  # samples in the picture
LEGEND_COLUMNS = 10
VOID = (0.62, 0.62, 0.62)
COLOURS = (
    "#8ecdf2 #8c6d4f #7b2d9b #2ca02c #ffd400 #ff7f0e #e3000f #1f3fd0 #f032e6 #aaffc3 #800000 "
    "#00a0a0 #bcf60c #fabebe #000075 #808000 #e6beff #ffd8b1 #000000 #fffac8"
).split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train/images, train/labels, val/images and val/labels: an image and its label, an 8-bit PNG "
        "of class indices, have the same name up to the suffix (default: generated scenes)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), metavar="FILE", help="the picture (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=_integer(1),
        default=400,
        metavar="N",
        help="training steps, the first quarter of them on MEA alone (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=_integer(2), default=8, metavar="N", help="images a step, 2 or more (default: %(default)s)"
    )
    parser.add_argument(
        "--ignore-index",
        type=_integer(0, 255),
        default=255,
        metavar="LABEL",
        help="the label of void, pixels that do not count, 0 to 255 (default: %(default)s); CamVid's, say, is 11",
    )
    parser.add_argument(
        "--temperature",
        type=_positive_number,
        default=1.0,
        metavar="TAU",
        help="softmax temperature of SR-F and SR-L (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "cpu", "reference"),
        default="auto",
        help="what computes the loss; auto takes the CPU kernels if they are there (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_integer(0, 2**32 - 1), default=0, metavar="N", help="of all that is random (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, measures, prints the tables and writes the picture."""
    for name in ("matplotlib", "numpy", "PIL", "rich", "tqdm"):  # what is missing is to fail now, not after training
        import_module(name)
    from rich.console import Console

    from .data import DataError, Folder, Scenes

    console = Console(highlight=False)
    try:
        _check_output(args.output)
        backend = _backend(args.backend)
        source: Source = Folder(args.data, args.ignore_index) if args.data else Scenes(args.seed, args.ignore_index)
        _demonstrate(args, source, backend, console)
    except (DataError, _ArgumentError) as error:
        print(f"selfreg-fast demo: {error}", file=sys.stderr)
        return 2
    return 0


class MultiExitNet(nn.Module):
    """A small ResNet of four stages with an exit on each.

    Args:
        num_classes: C.

    Returns:
        Of `forward`, for images (B, 3, H, W): four logits (B, C, H/s, W/s), s in `strides`, shallow to deep, and four
        image-level predictions (B, C), the published code's: a linear layer on the logits' global average.
    """

    widths = (24, 48, 96, 96)
    strides = (2, 4, 8, 8)  # of the last stage, dilation widens the view in place of a stride
    hidden = (24, 32, 48, 48)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, self.widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(self.widths[0]),
            nn.ReLU(inplace=True),
        )
        w = self.widths
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_Block(w[0], w[0]), _Block(w[0], w[0])),
                nn.Sequential(_Block(w[0], w[1], stride=2), _Block(w[1], w[1])),
                nn.Sequential(_Block(w[1], w[2], stride=2), _Block(w[2], w[2], dilation=2)),
                nn.Sequential(_Block(w[2], w[3], dilation=2), _Block(w[3], w[3], dilation=4)),
            ]
        )
        self.exits = nn.ModuleList(
            [ExitHead(width, num_classes, hidden) for width, hidden in zip(w, self.hidden, strict=True)]
        )
        self.image_heads = nn.ModuleList([nn.Linear(num_classes, num_classes) for _ in w])

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        features, logits, image_logits = self.stem(images), [], []
        for stage, head, image_head in zip(self.stages, self.exits, self.image_heads, strict=True):
            features = stage(features)
            logits.append(head(features))
            image_logits.append(image_head(logits[-1].mean((2, 3))))
        return logits, image_logits


class _Block(nn.Module):
    """The basic residual block: two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, dilation, dilation, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, dilation, dilation, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


class _Losses(NamedTuple):
    """The parts of the objective."""

    mea: float
    sr_f: float
    sr_l: float


class _Trained(NamedTuple):
    steps: int
    seconds: float
    losses: dict[str, _Losses]  # moment -> the losses then
    labels: Tensor  # of the last batch, with its exits
    logits: list[Tensor]
    image_logits: list[Tensor]


class Cost(NamedTuple):
    """Of a loss, forward and backward."""

    timing: Timing
    peak_bytes: int | None  # beside the exits; None where the system does not tell


def _demonstrate(args: argparse.Namespace, source: Source, backend: str, console: Console) -> None:
    torch.manual_seed(args.seed)
    # On the CPU, convolutions are faster with the channels last; the fused loss reads such exits as they are.
    model = MultiExitNet(len(source.names)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    class_weight = enet_class_weight(source.shares)
    criterion = SelfRegulationLoss(
        sr_f_weight=SR_WEIGHT,
        sr_l_weight=SR_WEIGHT,
        temperature=args.temperature,
        ignore_index=args.ignore_index,
        class_weight=class_weight,
        backend=backend,
    )
    console.print(f"data: {source.description}", soft_wrap=True)
    if source.note:
        console.print(f"note: {source.note}", soft_wrap=True)
    status = "" if backend == args.backend or backend == "cpu" else f", without CPU kernels: {backends()['cpu']}"
    console.print(f"loss: backend {backend}{status}", soft_wrap=True)

    trained = _train(model, criterion, source, args)
    if trained is None:
        console.print("interrupted before the first step: nothing to show")
        return
    if trained.steps < args.steps:
        console.print(f"interrupted: going on with what {trained.steps} of {args.steps} steps have learnt")
    console.print(f"{trained.steps} steps in {trained.seconds:.0f} s")

    samples, predictions = _predict(model, source)
    ious = [
        _class_ious(samples, [predicted[i] for predicted in predictions], source) for i in range(len(model.strides))
    ]
    _print_losses(console, trained)
    _print_ious(console, source.names, ious)
    _draw(args.output, source, samples, predictions, ious)
    costs = _costs(trained, criterion, class_weight.tolist(), backend)
    _print_costs(console, costs)
    console.print(f"picture: {args.output}", soft_wrap=True)
    means = [100 * iou.nanmean().item() for iou in ious]
    console.print(conclusion(trained.steps, args.batch_size, len(source.names), means, costs), markup=False)


def enet_class_weight(shares: Sequence[float]) -> Tensor:
    """Weights (C,) of mean 1, large for classes of a small share in the pixels, as in ENet (Paszke et al., 2016)."""
    weight = 1 / torch.log(1.02 + torch.tensor(shares))
    return weight / weight.mean()


def _train(
    model: MultiExitNet, criterion: SelfRegulationLoss, source: Source, args: argparse.Namespace
) -> _Trained | None:
    """Trains until the steps are done or Ctrl-C is pressed; None if not one was."""
    import numpy as np
    from tqdm import tqdm

    rng = np.random.default_rng(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    warmup = int(args.steps * WARMUP)
    losses, last, done = {}, None, 0
    begin = time.perf_counter()
    try:
        losses["before"] = _watched_losses(model, criterion, source)
        with tqdm(total=args.steps, desc="MEA", unit="step") as bar:
            for step in range(args.steps):
                if step == warmup:
                    losses["after the warm-up"] = _watched_losses(model, criterion, source)
                    bar.set_description("MEA + SR-F + SR-L")
                model.train()
                criterion.enable_sr(step >= warmup)
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * (1 - step / args.steps) ** 0.9
                images, labels = _as_batch([source.training(rng) for _ in range(args.batch_size)])
                logits, image_logits = model(images)
                output = criterion(logits, labels, image_logits=image_logits)
                optimizer.zero_grad()
                output.total.backward()
                optimizer.step()
                last, done = (labels, logits, image_logits), step + 1
                bar.set_postfix_str(f"loss {output.total.item():.3f}", refresh=False)
                bar.update()
        losses["after"] = _watched_losses(model, criterion, source)
    except KeyboardInterrupt:
        if last is not None:
            losses["after"] = _watched_losses(model, criterion, source)
    return None if last is None else _Trained(done, time.perf_counter() - begin, losses, *last)


@torch.no_grad()
def _watched_losses(model: MultiExitNet, criterion: SelfRegulationLoss, source: Source) -> _Losses:
    """Means over the first validation images, with all terms, in evaluation mode."""
    model.eval()
    criterion.enable_sr()
    sums, count = [0.0, 0.0, 0.0], 0
    for sample in islice(source.validation(), WATCHED):
        images, labels = _as_batch([sample])
        logits, image_logits = model(images)
        output = criterion(logits, labels, image_logits=image_logits)
        sums = [s + part.item() for s, part in zip(sums, output[1:], strict=True)]
        count += 1
    return _Losses(*(s / count for s in sums))


@torch.no_grad()
def _predict(model: MultiExitNet, source: Source) -> tuple[list[Sample], list[Pixels]]:
    """The validation samples, and for each the classes (N, H, W) that the N exits predict."""
    model.eval()
    samples, predictions = [], []
    for sample in source.validation():
        images, labels = _as_batch([sample])
        logits, _ = model(images)
        full = [F.interpolate(z, size=labels.shape[1:], mode="bilinear", align_corners=False) for z in logits]
        samples.append(sample)
        predictions.append(torch.stack([z.argmax(1)[0] for z in full]).to(torch.uint8).numpy())
    return samples, predictions


def _as_batch(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) around 0, and labels (B, H, W) as they are, uint8."""
    import numpy as np

    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)  # channels last
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))
    return (images.float() - 127.5) / 64, labels


def _class_ious(samples: Sequence[Sample], predictions: Sequence[Pixels], source: Source) -> Tensor:
    """Intersection over union of each class over all samples, (C,); NaN for a class that is nowhere to be seen."""
    classes = len(source.names)
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    for sample, predicted in zip(samples, predictions, strict=True):
        counted = sample.labels != source.ignore_index
        pairs = sample.labels[counted].astype("int64") * classes + predicted[counted]
        confusion += torch.bincount(torch.from_numpy(pairs), minlength=classes * classes)
    confusion = confusion.view(classes, classes).double()
    both = confusion.diagonal()
    return both / (confusion.sum(0) + confusion.sum(1) - both)


def _print_losses(console: Console, trained: _Trained) -> None:
    from rich.table import Table

    table = Table("loss", title="losses on a few validation images", title_justify="left")
    for moment in trained.losses:
        table.add_column(moment, justify="right")
    for i, name in enumerate(("MEA", "SR-F", "SR-L")):
        table.add_row(name, *(f"{losses[i]:.3f}" for losses in trained.losses.values()))
    console.print(table)


def _print_ious(console: Console, names: Sequence[str], ious: Sequence[Tensor]) -> None:
    from rich.table import Table

    exits = [f"exit {i} (1/{stride})" for i, stride in enumerate(MultiExitNet.strides)]
    table = Table("IoU, %", title="validation, shallow to deep exits", title_justify="left")
    for name in exits:
        table.add_column(name, justify="right")
    for c, name in enumerate(names):
        table.add_row(name, *("-" if iou[c].isnan() else f"{100 * iou[c]:.1f}" for iou in ious))
    table.add_section()
    table.add_row("mean", *(f"{100 * iou.nanmean():.1f}" for iou in ious), style="bold")
    console.print(table)


def _costs(trained: _Trained, criterion: SelfRegulationLoss, weight: list[float], backend: str) -> dict[str, Cost]:
    """Time and memory of the loss on the network's last exits, by the backend and by the reference."""
    options = {name: value for name, value in criterion.options.items() if name not in ("backend", "validate")}
    logits = [z.detach().requires_grad_() for z in trained.logits]
    image_logits = [z.detach().requires_grad_() for z in trained.image_logits]
    shapes = [list(z.shape) for z in (*logits, *image_logits, trained.labels)]
    names = list(dict.fromkeys((backend, "reference")))
    steps = {name: _loss_step(name, options, weight, logits, image_logits, trained.labels) for name in names}
    timings = median_seconds(steps, repeats=15)
    return {n: Cost(timings[n], in_fresh_process(_peak_of_loss, n, options, weight, shapes)) for n in names}


def _print_costs(console: Console, costs: Mapping[str, Cost]) -> None:
    from rich.table import Table

    table = Table("backend", title="the whole loss on this network's exits, forward + backward", title_justify="left")
    for heading in ("median ms", "20 to 80 %", "peak memory", "speed"):
        table.add_column(heading, justify="right")
    for name, (timing, peak) in costs.items():
        table.add_row(
            name,
            f"{1e3 * timing.median:.1f}",
            f"{1e3 * timing.low:.1f} to {1e3 * timing.high:.1f}",
            "not measured" if peak is None else _mib(peak),
            f"{costs['reference'].timing.median / timing.median:.1f}x",
        )
    console.print(table)


def conclusion(steps: int, batch_size: int, classes: int, ious: Sequence[float], costs: Mapping[str, Cost]) -> str:
    """What the run has shown, in words for whoever does not read the tables.

    Args:
        steps: how many were done.
        batch_size: images a step.
        classes: how many the network tells apart.
        ious: the exits' mean IoU on the validation images, in percent, shallow to deep.
        costs: of the loss on the last batch, by the backend and by the reference.
    """
    *others, deepest = (f"{iou:.1f}" for iou in ious)
    trained = (
        f"In {steps} step{'s' * (steps > 1)} of {batch_size} images, a small network that predicts at {len(ious)} "
        f"depths, its exits, was trained to tell {classes} classes apart, pixel by pixel. On validation images they "
        "ended, from the shallowest to the deepest, at a mean IoU (the overlap of what is predicted and what is there) "
        f"of {', '.join(others)} and {deepest} %. "
    )
    plain, (backend, fused) = costs["reference"], next(iter(costs.items()))
    if backend == "reference":
        return trained + (
            f"Its loss was that in plain PyTorch (selfreg_fast.reference), which took {_told(plain)} for the last "
            "batch: no fused one ran with which it could be compared."
        )
    speed = compared([plain.timing.median / fused.timing.median], "faster", "slower")
    memory = ""
    if fused.peak_bytes and plain.peak_bytes:
        memory = f" and took {compared([plain.peak_bytes / fused.peak_bytes], 'less memory', 'more memory')}"
    return trained + (
        f"Its fused loss, forward and backward, took {_told(fused)} for the last batch, where the same loss in plain "
        f"PyTorch (selfreg_fast.reference) took {_told(plain)}: it was {speed}{memory} than plain PyTorch."
    )


def _told(cost: Cost) -> str:
    memory = "" if cost.peak_bytes is None else f" and {_mib(cost.peak_bytes)}"
    return f"{1e3 * cost.timing.median:.1f} ms{memory}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _loss_step(
    backend: str,
    options: dict[str, Any],
    class_weight: list[float],
    logits: list[Tensor],
    image_logits: list[Tensor],
    labels: Tensor,
) -> Callable[[], object]:
    """The loss and its gradients with respect to all exits, by the fused loss or by the reference."""
    options = {**options, "class_weight": torch.tensor(class_weight)}
    if backend == "reference":
        objective: Callable[..., Any] = reference.self_regulation_loss
    else:
        objective, options = SelfRegulationLoss(**options, backend=backend), {}

    def step() -> None:
        total = objective(logits, labels, image_logits=image_logits, **options).total
        torch.autograd.grad(total, [*logits, *image_logits])

    return step


def _peak_of_loss(
    backend: str, options: dict[str, Any], class_weight: list[float], shapes: list[list[int]]
) -> int | None:
    """Peak memory above the exits, for exits (N), image-level predictions (N) and labels of these shapes."""
    exits = [torch.randn(shape) for shape in shapes[:-1]]
    exits = [z.contiguous(memory_format=torch.channels_last) if z.dim() == 4 else z for z in exits]  # as the network's
    exits = [z.requires_grad_() for z in exits]
    half = len(exits) // 2
    labels = torch.zeros(shapes[-1], dtype=torch.uint8)
    step = _loss_step(backend, options, class_weight, exits[:half], exits[half:], labels)
    step()
    return peak_bytes(step)


def _draw(
    path: Path, source: Source, samples: Sequence[Sample], predictions: Sequence[Pixels], ious: Sequence[Tensor]
) -> None:
    """A few validation samples, a row each: image, label, and what each exit predicts."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # From each of a few stretches of the validation data, as neighbours may be frames of one film, the richest sample.
    stretches = np.array_split(np.arange(len(samples)), min(ROWS, len(samples)))
    shown = [max(stretch, key=lambda i: len(np.unique(samples[i].labels))) for stretch in stretches]

    palette = np.array([*map(to_rgb, _colours(len(source.names)))] + [VOID] * (256 - len(source.names)))
    palette[source.ignore_index] = VOID
    titles = ["image", "label"]
    for i, (stride, iou) in enumerate(zip(MultiExitNet.strides, ious, strict=True)):
        titles.append(f"exit {i} (1/{stride}): mIoU {100 * iou.nanmean():.1f} %")
    seen = {int(c) for i in shown for c in np.unique([*predictions[i], samples[i].labels])}
    patches = [
        Patch(facecolor=palette[c], edgecolor="black", label=name) for c, name in enumerate(source.names) if c in seen
    ]
    patches.append(Patch(facecolor=VOID, edgecolor="black", label="void"))
    columns = min(len(patches), LEGEND_COLUMNS)
    height, width = np.mean([samples[i].labels.shape for i in shown], axis=0)
    below = 0.5 + 0.26 * math.ceil(len(patches) / columns)
    tile = 2.6
    figure = Figure(figsize=(tile * len(titles), tile * height / width * len(shown) + below))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.04, wspace=0, hspace=0)
    axes = figure.subplots(len(shown), len(titles), squeeze=False)
    for row, i in zip(axes, shown, strict=True):
        tiles = [samples[i].image, palette[samples[i].labels], *palette[predictions[i]]]
        for axis, pixels in zip(row, tiles, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)

    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)


def _colours(count: int) -> list[str]:
    """As many colours; hand-picked as long as there are, then hues a golden section apart."""
    from colorsys import hsv_to_rgb

    from matplotlib.colors import to_hex

    more = range(len(COLOURS), count)
    return COLOURS[:count] + [to_hex(hsv_to_rgb(i * 0.618 % 1, 0.45 + i % 3 * 0.25, 0.9 - i % 2 * 0.3)) for i in more]


class _ArgumentError(Exception):
    """An option cannot be honoured; the message says which, and why."""


def _check_output(path: Path) -> None:
    """Raises before the training what would otherwise fail after it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise _ArgumentError(f"--output {path}: expected a file name that ends in one of .{', .'.join(known)}")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise _ArgumentError(f"--output {path}: cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()


def _backend(name: str) -> str:
    """The backend that serves the loss."""
    try:
        with warnings.catch_warnings():  # that there are no kernels is told beside the other facts
            warnings.simplefilter("ignore")
            return choose(name, "cpu")
    except RuntimeError as error:
        raise _ArgumentError(f"--backend {name}: {error}") from error


def _integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The parser of an option that is an integer from `least` to `most`."""

    def parse(text: str) -> int:
        limits = f"from {least} to {most}" if most < math.inf else f">= {least}"
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {text}")
        return int(text)

    return parse


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text}")
    return number
