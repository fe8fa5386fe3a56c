"""The paper's two failures in pictures: small parts that are missed, parts of large objects given another class.

The images are those in which the baseline fails most, whatever the whole objective does there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from selfreg_fast.commands.demo import COLOURS

from .training import ALL, BASELINE, CLASSES, THIN, VOID, Data, Preset, Run, predict

LARGE = ("building", "pavement", "tree", "fence", "car")
SEED = 0  # of the runs that are shown
GREY = "#7f8790"  # legible on white and on black
FAINT, HIDDEN = (0.62, 0.62, 0.62), (0.80, 0.80, 0.80)  # void; all but the thin classes where these are the matter


def draw(folder: Path, preset: Preset, data: Data) -> Path | None:
    """Images, labels and predictions, into `folder`: they show the data set, which is not ours to spread.

    Needs the checkpoints of the baseline and of the whole objective; without them nothing is drawn.
    """
    shown = {name: folder / f"{Run(name, SEED).name}.pt" for name in (BASELINE, ALL)}
    if not all(path.exists() for path in shown.values()):
        return None
    predictions = {name: _predictions(path, preset, data) for name, path in shown.items()}
    rows = _worst(predictions[BASELINE], data.val.labels)
    path = folder / "failures.png"
    _draw(path, rows, predictions, data)
    return path


def _predictions(checkpoint: Path, preset: Preset, data: Data) -> Tensor:
    """The classes (B, H, W) that the deepest exit gives to the validation images."""
    device = data.class_weight.device
    model = preset.network(len(CLASSES)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True)["model"])
    model.eval()
    return torch.cat([predict(model, images)[-1] for images in data.val.images.split(preset.batch)])


def _worst(predicted: Tensor, labels: Tensor) -> list[tuple[str, tuple[str, ...], int]]:
    """(failure, the classes to show, image), two images for each failure, from different parts of the film."""
    found: list[tuple[str, tuple[str, ...], int]] = []
    for failure, names, shown in (("small parts missed", THIN, THIN), ("parts of large objects", LARGE, CLASSES)):
        about = torch.isin(labels, torch.tensor([CLASSES.index(n) for n in names], device=labels.device))
        wrong = (about & (predicted != labels)).sum((1, 2))
        for part in torch.arange(len(labels), device=labels.device).chunk(2):
            found.append((failure, shown, int(part[wrong[part].argmax()])))
    return found


def _draw(
    path: Path,
    rows: list[tuple[str, tuple[str, ...], int]],
    predictions: dict[str, Tensor],
    data: Data,
) -> None:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    palette = np.array([*map(to_rgb, COLOURS[: len(CLASSES)])] + [FAINT] * (256 - len(CLASSES)))
    titles = ["image", "label", *predictions]
    height, width = data.val.labels.shape[1:]
    tile = 8.2 / len(titles)
    figure = Figure(figsize=(8.2, len(rows) * tile * height / width + 0.9))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (failure, names, i) in zip(axes, rows, strict=True):
        colours = palette.copy()
        for c, name in enumerate(CLASSES):
            if name not in names:
                colours[c] = HIDDEN
        tiles = [data.val.images[i].permute(1, 2, 0).cpu().numpy()]
        tiles += [colours[maps[i].cpu().numpy()] for maps in (data.val.labels, *predictions.values())]
        for axis, pixels in zip(row, tiles, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(failure, color=GREY, fontsize=9)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, color=GREY, fontsize=9)
    in_order = sorted(CLASSES, key=lambda name: name not in THIN)
    patches = [Patch(facecolor=palette[CLASSES.index(name)], label=name) for name in in_order]
    patches += [Patch(facecolor=palette[VOID], label="void"), Patch(facecolor=HIDDEN, label="not thin")]
    figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False, fontsize=9, labelcolor=GREY)
    figure.savefig(path, dpi=130, transparent=True)
