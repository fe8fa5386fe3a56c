"""What README.md and docs/ say of training, and their figure, from benchmarks/results/ablation-*.csv alone."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from figures import GREY, Row, read, save, set_style

OBJECTIVES = ("deepest exit only", "MEA", "MEA + SR-F", "MEA + SR-L", "MEA + SR-F + SR-L")
COLOURS = dict(zip(OBJECTIVES, (GREY, "#3b8eda", "#2fa05a", "#d08a1d", "#e5534b"), strict=True))
CLASSES = "sky building road pavement tree fence car pole sign pedestrian cyclist".split()  # the thin ones last
THIN = CLASSES[-4:]
BASELINE = OBJECTIVES[0]  # its other exits are not trained
BEFORE_SR = "MEA"  # what the SR terms are added to
EXITS = range(4)
WITHOUT_FIGURE = ("ablation-parity", "ablation-step", "ablation-memory")
MEMORIES = (8, 16, 24, 40, 80, 141)  # GiB of GPUs, for which the largest batch is computed


def is_one(path: Path) -> bool:
    """Whether it is results of training, not of the losses."""
    return path.stem.startswith("ablation-")


def ablations(root: Path, folder: Path) -> str:
    """What SR-F and SR-L did in training."""
    return _described(root, folder, {"full": ablation, "quick": ablation})


def steps(root: Path, folder: Path) -> str:
    """What a whole training step takes, and that its losses are the reference's."""
    return _described(root, folder, {"step": step, "memory": memory, "parity": parity})


def _described(root: Path, folder: Path, tables: dict[str, Callable[[Path, str], str]]) -> str:
    """Those of which there are results; each gets them, and how they are linked to."""
    files = {name: root / "benchmarks" / "results" / f"ablation-{name}.csv" for name in tables}
    parts = [tables[name](path, os.path.relpath(path, folder)) for name, path in files.items() if path.exists()]
    return "\n\n".join(parts) if parts else "No results are recorded yet."


def summary(root: Path, folder: Path) -> str:
    """The README's: the deepest exit under four objectives."""
    path = root / "benchmarks" / "results" / "ablation-quick.csv"
    if not path.exists():
        return "No results are recorded yet."
    rows = [row for row in final(read(path)) if row["exit"] == EXITS[-1]]
    shown = [(name, None) for name in (BASELINE, BEFORE_SR, OBJECTIVES[-1])]
    shown.insert(2, (OBJECTIVES[-1], "SR-F × 0.1, SR-L × 0.1"))
    before = [row for row in rows if row["objective"] == BEFORE_SR and row["settings"] is None]
    lines = []
    for objective, settings in shown:
        own = [row for row in rows if (row["objective"], row["settings"]) == (objective, settings)]
        own = [row for row in own if row["epochs"] == before[0]["epochs"]] if before else own
        less = "" if objective == BEFORE_SR else _spread(_paired(own, before, "miou", EXITS[-1]), sign="+")
        name = f"{objective}, SR weights 0.1" if settings else objective
        lines.append([name, _spread(row["miou"] for row in own), less])
    headings = ["CamVid at 90 x 120, a small network from scratch", "mIoU of the deepest exit", "difference to MEA"]
    return table(headings, lines)


def draw(path: Path, folder: Path) -> list[Path]:
    """Writes FOLDER/STEM-iou.png, if the file has runs of all objectives; returns which."""
    if path.stem in WITHOUT_FIGURE:
        return []
    set_style()
    drawn = folder / f"{path.stem}-iou.png"
    save(_iou(final(read(path))), drawn, path)
    return [drawn]


# ---------------------------------------------------------------------------------------------------------- ablation


def final(rows: Iterable[Row]) -> list[Row]:
    """The rows of each run's end, but those of exits that were not trained."""
    ended = [row for row in rows if row["epoch"] == row["epochs"]]
    return [row for row in ended if row["objective"] != BASELINE or row["exit"] == EXITS[-1]]


def ablation(path: Path, link: str) -> str:
    """The five objectives, at every exit and class by class; then other settings of the SR terms."""
    rows = final(read(path))
    main = [row for row in rows if row["settings"] is None]
    seeds = sorted({row["seed"] for row in main})
    parts = [
        f"{_about(rows, link)} CamVid, {_size(rows[0])}: {len(seeds)} seeds each, "
        f"{rows[0]['epochs']:g} epochs, in all {_minutes(main)} of {_unit(rows[0])}. IoU in percent on the "
        "validation images: mean ± standard deviation over the seeds.",
        _by_exit(main),
        "The deepest exit, class by class; thin classes last:",
        _by_class(main),
    ]
    parts += _pictures(path, link)
    if len(rows) > len(main):
        parts += [
            "What was tried so that the SR terms help; without a name it is the whole objective, without epochs "
            f"{main[0]['epochs']:g}. Δ: less {BEFORE_SR} alone of the same seed and epochs, mean ± standard deviation.",
            _search(rows),
        ]
    return "\n\n".join(parts)


def _by_exit(rows: Sequence[Row]) -> str:
    headings = ["objective", *(f"exit {i}" for i in EXITS), "thin classes, exit 3", f"exit 3, less {BEFORE_SR}"]
    lines = []
    for objective in OBJECTIVES:
        own = [row for row in rows if row["objective"] == objective]
        cells = [_spread(row["miou"] for row in own if row["exit"] == i) for i in EXITS]
        cells.append(_spread(row["thin_miou"] for row in own if row["exit"] == EXITS[-1]))
        before = [row for row in rows if row["objective"] == BEFORE_SR]
        cells.append("" if objective == BEFORE_SR else _spread(_paired(own, before, "miou", EXITS[-1]), sign="+"))
        lines.append([objective, *cells])
    return table(headings, lines)


def _by_class(rows: Sequence[Row]) -> str:
    deepest = [row for row in rows if row["exit"] == EXITS[-1]]
    lines = []
    for objective in OBJECTIVES:
        own = [row for row in deepest if row["objective"] == objective]
        lines.append([objective, *(_spread((row[name] for row in own), digits=0) for name in CLASSES)])
    return table(["objective", *CLASSES], lines)


def _search(rows: Sequence[Row]) -> str:
    """Each setting less MEA alone of the same seeds and epochs, the best first."""
    runs: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        whole, settings = row["objective"] == OBJECTIVES[-1], row["settings"]
        if whole or settings is not None:
            name = (settings or "weights 1, τ = 1") if whole else f"{row['objective']}: {settings}"
            runs.setdefault((row["epochs"], name), []).append(row)
    lines = []
    for (epochs, name), own in runs.items():
        before = [row for row in rows if row["objective"] == BEFORE_SR and row["epochs"] == epochs]
        less = [_paired(own, before, "miou", i) for i in EXITS] + [_paired(own, before, "thin_miou", EXITS[-1])]
        own_miou = [row["miou"] for row in own if row["exit"] == EXITS[-1]]
        cells = ["" if own[0]["objective"] == BEFORE_SR else _spread(values, sign="+") for values in less]
        lines.append((epochs, -statistics.mean(less[-2]), [name, f"{len(own_miou)}", _spread(own_miou), *cells]))
    headings = ["setting", "seeds", "exit 3", *(f"Δ exit {i}" for i in EXITS), "Δ thin classes, exit 3"]
    return table(headings, (cells for *_, cells in sorted(lines)))


def _paired(own: Sequence[Row], before: Sequence[Row], key: str, exit: int) -> list[float]:
    """Differences, seed by seed."""
    theirs = {row["seed"]: row[key] for row in before if row["exit"] == exit}
    return [row[key] - theirs[row["seed"]] for row in own if row["exit"] == exit and row["seed"] in theirs]


def _spread(values: Iterable[float], digits: int = 1, sign: str = "") -> str:
    percent = [100 * value for value in values]
    if not percent:
        return ""
    text = f"{statistics.mean(percent):{sign}.{digits}f}"
    return text if len(percent) < 2 else f"{text} ± {statistics.stdev(percent):.{digits}f}"


def _size(row: Row) -> str:
    return {
        "quick": "**reduced to a quarter of its resolution (90 x 120), with a small network: `--quick`**",
        "full": "360 x 480",
    }[row["preset"]]


def _minutes(rows: Sequence[Row]) -> str:
    key = "cpu_seconds" if rows[0]["preset"] == "quick" else "seconds"
    return f"{sum(row[key] for row in rows if row['exit'] == EXITS[-1]) / 60:.0f} minutes"


def _unit(row: Row) -> str:
    return "one core's time" if row["preset"] == "quick" else "training"


def _iou(rows: Sequence[Row]) -> Any:
    """mIoU at each exit, and the thin classes at the deepest: a dot for each seed, a line for their mean."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["settings"] is None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2))
    deepest = [row for row in rows if row["exit"] == EXITS[-1]]
    names = [f"exit {i}" for i in EXITS]
    _grouped(left, names, lambda o, n: [r["miou"] for r in rows if r["objective"] == o and r["exit"] == names.index(n)])
    _grouped(right, THIN, lambda o, n: [r[n] for r in deepest if r["objective"] == o])
    left.set(ylabel="mIoU, %")
    right.set(ylabel="IoU of thin classes at exit 3, %")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, borderaxespad=0)
    figure.tight_layout()
    return figure


def _grouped(axes: Any, names: Sequence[str], values: Callable[[str, str], list[float]]) -> None:
    for k, (objective, colour) in enumerate(COLOURS.items()):
        for x, name in enumerate(names):
            at, own = x + 0.15 * (k - 2), [100 * value for value in values(objective, name)]
            if own:
                axes.scatter([at] * len(own), own, 14, colour, alpha=0.7, linewidths=0)
                mean = statistics.mean(own)
                axes.plot([at - 0.06, at + 0.06], [mean, mean], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.scatter([], [], 24, colour, label=objective, linewidths=0)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.grid(axis="y")


# ----------------------------------------------------------------------------------------------------- parity, a step


def parity(path: Path, link: str) -> str:
    """Each precision's spreads, the largest also as a share of the loss."""
    rows = read(path)
    lines = [
        [
            row["precision"],
            f"{row['first_total']:.1f} → {row['last_total']:.1f}",
            f"{row['fused_to_references']:.1e}",
            f"{row['between_references']:.1e}",
            f"{row['most_between_references']:.1e}",
            f"{row['most_between_references'] / row['last_total']:.1e}",
        ]
        for row in rows
    ]
    return "\n\n".join(
        [
            f"{_about(rows, link)} Curves of the losses over {rows[0]['steps']:g} steps of the small network "
            "from one seed, all terms on, at a low learning rate and with SiLU for ReLU, so that no rounding grows "
            f"(MEA falls from {rows[0]['first_mea']:.1f} to {rows[0]['last_mea']:.1f}): largest difference in any "
            "step, of the total, MEA, SR-F or SR-L. The reference's own runs differ in the order of the images within "
            "their batches only.",
            table(
                [
                    "precision",
                    "loss",
                    "fused to reference",
                    "reference to reference",
                    "at most",
                    "at most, of the loss",
                ],
                lines,
            ),
        ]
    )


def step(path: Path, link: str) -> str:
    rows = read(path)
    lines, limits = [], {}
    for fused, plain in zip(rows[::2], rows[1::2], strict=True):  # in turns
        case = [f"{fused['network']}, SR-F on {fused['sr_f_on']}", _batch(fused)]
        if fused["memory_gib"] is not None:
            key = fused["network"], fused["sr_f_on"], fused["memory_gib"]
            limits[key] = [case[0], f"{fused['memory_gib']:g} GiB", f"{plain['batch']:g}", f"{fused['batch']:g}"]
            continue
        lines.append(
            [
                *case,
                f"{plain['step_ms']:.0f} ms",
                f"**{fused['step_ms']:.0f} ms**",
                f"{plain['step_ms'] / fused['step_ms']:.2f}×",
                f"{plain['loss_ms']:.1f} → {fused['loss_ms']:.1f} ms",
                _mib(plain),
                f"**{_mib(fused)}**",
            ]
        )
    headings = ["network", "batch", "step: reference", "fused", "faster", "loss, forward", "peak: reference", "fused"]
    parts = [
        f"{_about(rows, link)} {rows[0]['precision']}: the whole step (forward, loss, backward, update), medians "
        "in turns; peak memory above what is there between steps.",
        table(headings, lines),
    ]
    if limits:
        parts += [
            "The largest batch at 512 x 512:",
            table(["network", "memory", "reference", "fused"], limits.values()),
        ]
    return "\n\n".join(parts)


def memory(path: Path, link: str) -> str:
    """What would fit, by straight lines through the measured peaks; no step's where a GPU's own are recorded."""
    rows, measured = read(path), path.with_name("ablation-step.csv")
    if measured.exists() and any(row["memory_gib"] for row in read(measured)):
        rows = [row for row in rows if not row["held_bytes"]]
    runs: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault((row["what"], row["image"]), {}).setdefault(row["peer"], []).append(row)
    lines, off = [], {"at most": 0.0, "fused": 0.0}
    for (what, image), peers in runs.items():
        fits = {peer: _line(own) for peer, own in peers.items()}
        for peer, (_, _, residual) in fits.items():
            key = "fused" if peer == "fused" and "loss" in what else "at most"
            off[key] = max(off[key], residual)
        plain = "reference" if "reference" in fits else "as written"
        each = {peer: slope * _pixels(image) for peer, (slope, _, _) in fits.items()}
        cells = [f"{each[peer] / 2**20:,.0f} MiB" if peer in each else "" for peer in (plain, "tuned", "fused")]
        for gib in MEMORIES:
            most = {peer: int((gib * 2**30 - fits[peer][1]) / each[peer]) for peer in (plain, "fused")}
            cells.append(f"{most[plain]:,} → **{most['fused']:,}**")
        lines.append([f"{what}, {image.replace('x', '·')}", *cells])
    headings = ["images of a size", "each: reference", "tuned", "fused", *(f"{gib} GiB" for gib in MEMORIES)]
    return "\n\n".join(
        [
            f"{_about(rows, link)} **The largest batch, reference → fused, computed from memory measured on a "
            f"CPU**: a straight line through the peaks of {rows[0]['precision']} at several batches and sizes (off by "
            f"at most {100 * off['at most']:.1f} %, the fused loss alone by {100 * off['fused']:.0f} %), divided into "
            "the memory. A GPU also holds CUDA itself, cuDNN's workspaces and gaps, and bf16 autocast, not measured "
            "here, differs. As memory follows the pixels, n images take what one of √n times the side does. The "
            "loss alone: MEA + SR-F + SR-L of five exits of an eighth, on top of these, the reference being the "
            "formulas as written. Beyond one GPU, torch.distributed is the next step: [several GPUs](distributed.md).",
            table(headings, lines),
        ]
    )


def _line(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Bytes by output pixels: slope, intercept, and the largest part of a measurement by which it is off."""
    pixels = [row["batch"] * _pixels(row["size"]) for row in rows]
    taken = [row["held_bytes"] + row["peak_bytes"] for row in rows]
    slope, intercept = statistics.linear_regression(pixels, taken)
    off = max(abs(slope * x + intercept - y) / y for x, y in zip(pixels, taken, strict=True))
    return slope, intercept, off


def _pixels(size: str) -> int:
    return math.prod(map(int, size.split("x")))


def _batch(row: Row) -> str:
    return f"{row['batch']:g} of {row['size'].replace('x', '·')}"


def _mib(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f} MiB" if row["peak_bytes"] else ""


# -------------------------------------------------------------------------------------------------------------- both


def _about(rows: Sequence[Row], link: str) -> str:
    """Where and with what."""
    values = {
        key: ", ".join(dict.fromkeys(f"{row[key]:g}" if isinstance(row[key], float) else row[key] for row in rows))
        for key in ("device", "threads", "torch", "commit")
    }
    plural = "" if values["threads"] == "1" else "s"
    return "**{device}**, {threads} thread{s}, torch {torch}, commit {commit}: [all figures]({link}).".format(
        s=plural, link=link, **values
    )


def _pictures(path: Path, link: str) -> list[str]:
    captions = {"iou": "IoU at every exit, and of thin classes"}
    files = {name: f"{path.stem}-{name}.png" for name in captions}
    there = {name: file for name, file in files.items() if path.with_name(file).exists()}
    return [f"![{captions[name]}]({os.path.dirname(link)}/{file})" for name, file in there.items()]


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [headings, ["---"] + ["---:"] * (len(headings) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
