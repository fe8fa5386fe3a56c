"""The figures of a results file, from the file alone: `python benchmarks/figures.py FILE.csv [FOLDER]`.

Text and lines are mid-grey on a transparent ground: legible on white and on black. Each figure holds the digest of the
file it was drawn from, by which :mod:`readme` knows whether it is still that file's.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FIGURES = ("main", "speed", "memory", "limit", "scaling")
# The cases of the README, by their labels.
MAIN = (
    "objective-voc-321-resized",
    "objective-cityscapes-resized",
    "sr-l-ade-512-resized",
    "objective-voc-321",
    "mea-voc-321",
)
COMPARED = ("loss", "interpolate")  # the suites whose cases are compared; `scaling` has curves
GREY = "#7f8790"
# peer -> colour, marker: one colour a formula, diamonds where it is compiled
STYLES = {
    "fused": ("#e5534b", "o"),
    "fused, Triton": ("#e5534b", "s"),
    "tuned, compiled": ("#3b8eda", "D"),
    "tuned": ("#3b8eda", "o"),
    "reference, compiled": ("#2fa05a", "D"),
    "reference": ("#2fa05a", "o"),
    "Liger KL": ("#a06fd6", "^"),
    "as written": ("#d08a1d", "o"),
}
AXES = {
    "pixels": "pixels of an exit",
    "channels": "channels",
    "exits": "exits",
    "batch": "images",
    "output": "output pixels,\nexits of 41 x 41",
}


def read(path: Path) -> list[Row]:
    """The lines of a results file; numbers as floats, None where there is nothing."""
    with path.open(newline="") as file:
        return [{key: _parse(text) for key, text in line.items()} for line in csv.DictReader(file)]


def digest(path: Path) -> str:
    """What tells this file from any other."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cases(rows: Iterable[Row], *suites: str) -> list[dict[str, Row]]:
    """The cases of the suites in which the fused loss ran: peer -> row, for those peers that ran."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["suite"] in suites and row["both_ms"] is not None:
            key = tuple(row[k] for k in ("suite", "case", "dtype", "layout"))
            found.setdefault(key, {})[row["peer"]] = row
    return [peers for peers in found.values() if "fused" in peers]


def label(row: Row) -> str:
    """A case's name, with its dtype and layout where they are not float32 and contiguous."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "channels_last": "NHWC"}
    return " ".join([str(row["case"]), *(short[row[k]] for k in ("dtype", "layout") if row[k] in short)])


def draw(path: Path, folder: Path) -> list[Path]:
    """Writes FOLDER/STEM-FIGURE.png for each figure for which the file has lines; returns which."""
    set_style()
    rows, drawn = read(path), []
    figures = (_main(rows), _speed(rows), _memory(rows), _limit(rows), _scaling(rows))
    for name, figure in zip(FIGURES, figures, strict=True):
        if figure is not None:
            drawn.append(folder / f"{path.stem}-{name}.png")
            save(figure, drawn[-1], path)
    return drawn


def set_style() -> None:
    """Of all figures made after this."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
        | {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
        | {"grid.color": GREY, "grid.alpha": 0.25, "savefig.transparent": True, "savefig.dpi": 130}
    )


def save(figure: Any, path: Path, results: Path) -> None:
    """Writes the figure, with the digest of the results that it shows."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Description": digest(results), "Software": None})
    plt.close(figure)


def _main(rows: list[Row]) -> Any:
    """The README's cases: time and memory of the others, times the fused loss's."""
    import matplotlib.pyplot as plt

    compared = [c for c in cases(rows, *COMPARED) if label(c["fused"]) in MAIN]
    if not compared:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(8.2, 0.7 + 0.34 * len(compared)), sharey=True)
    titles = {"both_ms": "time, × the fused loss's", "peak_bytes": "peak memory, × the fused loss's"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for y, peers in enumerate(compared):
            unit = peers["fused"][key]
            values = {p: peers[p][key] / unit for p in STYLES if unit and p in peers and peers[p][key]}
            axes.plot([1, max(values.values(), default=1)], [y, y], color=GREY, alpha=0.35, linewidth=5, zorder=1)
            for peer, x in reversed(values.items()):
                axes.scatter(x, y, 40, STYLES[peer][0], marker=STYLES[peer][1], label=peer, linewidths=0, zorder=2)
        axes.set(xscale="log", xlabel=title, ylim=(len(compared) - 0.5, -0.5))
        axes.set(yticks=range(len(compared)), yticklabels=[label(c["fused"]) for c in compared])
        _multiples(axes)
        axes.grid(axis="x")
        axes.tick_params(length=0)
    _legend(figure, panels[0])
    return figure


def _speed(rows: list[Row]) -> Any:
    """Times the fused loss's time."""
    return _dots(rows, "both_ms", "forward and backward, times the fused loss's time", by="fused")


def _memory(rows: list[Row]) -> Any:
    """Peak memory, in gradients."""
    return _dots(rows, "peak_bytes", "peak memory above the inputs, times the bytes of the gradients", by="gradients")


def _limit(rows: list[Row]) -> Any:
    """How near each comes to the device's limit for the case: its copy bandwidth, or its exponentials."""
    return _dots(
        rows,
        "percent_of_limit",
        "percent of the device's limit in the case: its copy bandwidth, or its rate of exponentials",
        by="limit",
    )


def _dots(rows: list[Row], key: str, title: str, by: str) -> Any:
    """A line for each case, and on it a dot for each peer."""
    import matplotlib.pyplot as plt

    compared = [c for c in cases(rows, *COMPARED) if c["fused"][key]]
    if not compared:
        return None
    figure, axes = plt.subplots(figsize=(8.2, 1.1 + 0.22 * len(compared)))
    for y, peers in enumerate(compared):
        unit = {"fused": peers["fused"][key], "gradients": peers["fused"]["gradient_bytes"], "limit": 1}[by]
        dots = [(peer, peers[peer][key] / unit) for peer in STYLES if peer in peers and peers[peer][key]]
        axes.plot([x for _, x in dots], [y] * len(dots), color=GREY, alpha=0.5, linewidth=0.8, zorder=1)
        for peer, x in reversed(dots):  # the fused loss on top
            colour, marker = STYLES[peer]
            axes.scatter(x, y, 34, colour, marker=marker, label=peer, linewidths=0, zorder=2, alpha=0.9)
    names = [label(c["fused"]) for c in compared]
    if by == "limit":
        names = [f"{name}  ({c['fused']['limit']})" for name, c in zip(names, compared, strict=True)]
        rates = compared[0]["fused"]
        title += (
            f"\n(copy: {rates['copy_gb_per_s']:.1f} GB/s, exp: {rates['exp_gexp_per_s']:.1f} G/s in the first case)"
        )
    else:
        axes.set_xscale("log")
        _multiples(axes)
    axes.axvline({"limit": 100}.get(by, 1), color=GREY, linewidth=1.2)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel=title, ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x")
    axes.tick_params(length=0)
    _legend(figure, axes)
    return figure


def _multiples(axes: Any) -> None:
    """A logarithmic axis of 1, 2, 5, 10, ..."""
    from matplotlib import ticker

    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _legend(figure: Any, axes: Any) -> None:
    """Above the figure, each peer once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [peer for peer in STYLES if peer in handles]
    figure.legend(
        [handles[p] for p in order], order, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, borderaxespad=0
    )
    figure.tight_layout()


def _scaling(rows: list[Row]) -> Any:
    """Time above, memory below, against all that grows."""
    import matplotlib.pyplot as plt

    lines = [r for r in rows if r["suite"] == "scaling" and r["both_ms"] is not None]
    if not lines:
        return None
    figure, grid = plt.subplots(2, len(AXES), figsize=(10, 4.6), sharex="col", sharey="row")
    for column, (axis, name) in enumerate(AXES.items()):
        for peer, (colour, marker) in STYLES.items():
            points = sorted((r for r in lines if r["axis"] == axis and r["peer"] == peer), key=lambda r: float(r["at"]))
            at = [r["at"] for r in points]
            for axes, key, unit in ((grid[0, column], "both_ms", 1), (grid[1, column], "peak_bytes", 2**20)):
                values = [r[key] / unit if r[key] else None for r in points]
                axes.plot(at, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=peer)
        for axes in grid[:, column]:
            axes.set(xscale="log", yscale="log")
            axes.grid(which="major")
            axes.tick_params(which="both", length=0)
            axes.minorticks_off()
        at = sorted({r["at"] for r in lines if r["axis"] == axis})
        grid[1, column].set_xlabel(name)
        ticks = at if len(at) < 4 else [at[0], at[len(at) // 2], at[-1]]
        grid[1, column].set_xticks(ticks, [_count(x) for x in ticks])
    for axes, name in zip(grid[:, 0], ("ms, both passes", "peak MiB"), strict=True):
        axes.set_ylabel(name)
        axes.yaxis.set_major_formatter("{x:g}")
    handles = {name: h for h, name in zip(*grid[0, 0].get_legend_handles_labels(), strict=True)}
    used = {r["peer"] for r in lines}
    order = [peer for peer in STYLES if peer in used]
    figure.legend([handles[p] for p in order], order, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(order))
    figure.tight_layout()
    return figure


def _count(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _parse(text: str) -> float | str | None:
    try:
        return float(text)
    except ValueError:
        return text or None


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(*draw(source, Path(sys.argv[2]) if len(sys.argv) > 2 else source.parent), sep="\n")
