"""The tables of README.md and docs/ from benchmarks/results/*.csv: `python benchmarks/readme.py` writes them.

With --check it writes nothing, and fails where a document or a figure is not what the results say.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # imported by a test, too
import training_results
from figures import COMPARED, FIGURES, MAIN, Row, cases, digest, draw, label, read

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = {
    "main": "Time and memory of a training step of the loss",
    "speed": "Time of a training step of the loss",
    "memory": "Peak memory",
    "limit": "Against the device's limits",
    "scaling": "Growth of time and memory",
}
HEADINGS = (
    "case",
    "exits (B·C·h·w) → size",
    "fused",
    "PyTorch, tuned",
    "compiled",
    "as written",
    "memory: fused",
    "memory: least of the others",
    "of its limit",
)
EAGER = ("tuned", "as written", "reference")


def devices(root: Path) -> list[Path]:
    """The results of the losses, a file for each device."""
    results = sorted((root / "benchmarks" / "results").glob("*.csv"))
    return [path for path in results if not training_results.is_one(path)]


def every_device(described: Callable[[Path, str], str]) -> Callable[[Path, Path], str]:
    """A section that has a part for each device; `described` gets its results and how these are linked to."""

    def section(root: Path, folder: Path) -> str:
        parts = [described(path, os.path.relpath(path, folder)) for path in devices(root)]
        return "\n\n".join(parts) if parts else "No results are recorded yet."

    return section


def status(path: Path, link: str) -> str:
    """A sentence: how much faster and smaller than the best that eager PyTorch does."""
    rows = read(path)
    said = []
    for suite, what in (("interpolate", "exits smaller than the output"), ("loss", "exits of the output's size")):
        compared = [c for c in cases(rows, suite) if c["fused"]["dtype"] == "float32"]
        times = [min(c[p]["times_fused"] for p in EAGER if p in c) for c in compared]
        peaks = [
            min(c[p]["peak_bytes"] for p in EAGER if p in c and c[p]["peak_bytes"]) / c["fused"]["peak_bytes"]
            for c in compared
            if c["fused"]["peak_bytes"]
        ]
        if times:
            memory = f", {between(peaks)} times less memory" if peaks else ""
            said.append(f"{what}: {between(times)} times faster{memory}")
    return (
        f"- **{rows[0]['device']}, {rows[0]['threads']:g} threads**: a training step of the loss, against eager "
        f"PyTorch at its best: {'; '.join(said)} ([results]({link}))."
    )


def between(numbers: Iterable[float]) -> str:
    """From the least to the largest, a digit where they are small."""
    low, high = (f"{x:.1f}" if x < 10 else f"{x:.0f}" for x in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def speed(path: Path, link: str) -> str:
    """The main cases, and their figure."""
    rows = read(path)
    return "\n\n".join([about(rows, link), table(rows, MAIN, len(HEADINGS) - 1), *pictures(path, link, ["main"])])


def device(path: Path, link: str) -> str:
    """One results file: where and with what it was measured, the table, the figures."""
    rows = read(path)
    return "\n\n".join([about(rows, link), table(rows), *pictures(path, link, FIGURES[1:])])


def about(rows: list[Row], link: str) -> str:
    """Where, with what, and of which commit."""
    return (
        "**{device}**, {threads:g} threads, torch {torch}, Python {python}, commit {commit}, {repeats:g} rounds: "
        "[all figures]({link}).".format(**rows[0], link=link)
    )


def pictures(path: Path, link: str, names: Iterable[str]) -> list[str]:
    """Those that were drawn."""
    files = {name: f"{path.stem}-{name}.png" for name in names}
    there = {name: file for name, file in files.items() if path.with_name(file).exists()}
    return [f"![{CAPTIONS[name]}]({os.path.dirname(link)}/{file})" for name, file in there.items()]


# What stands between the markers of a document, by the word in these; each is called with root and document's folder.
SECTIONS: dict[str, dict[str, Callable[[Path, Path], str]]] = {
    "README.md": {
        "status": every_device(status),
        "speed": every_device(speed),
        "training": training_results.summary,
    },
    "docs/benchmarks.md": {"benchmarks": every_device(device), "steps": training_results.steps},
    "docs/training.md": {"training": training_results.ablations},
}


def table(rows: list[Row], only: Iterable[str] = (), columns: int = len(HEADINGS)) -> str:
    """The fused loss in ms and MiB, the others as multiples of it; `only` the cases of these labels, if there are."""
    lines = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 1)]
    for peers in cases(rows, *COMPARED):
        if not only or label(peers["fused"]) in only:
            lines.append(table_row(peers))
    return "\n".join("| " + " | ".join(line[:columns]) + " |" for line in lines)


def table_row(peers: dict[str, Row]) -> tuple[str, ...]:
    """A case."""
    fused = peers["fused"]
    others = {name: row for name, row in peers.items() if not name.startswith("fused")}
    size = f" → {fused['size']}" if not str(fused["shape"]).endswith(f"x{fused['size']}") else ""

    def times(*names: str) -> str:
        found = [others[name]["times_fused"] for name in names if name in others]
        return f"{min(found):.1f}×" if found else ""

    peaks = [row["peak_bytes"] for row in others.values() if row["peak_bytes"]]
    memory = f"{fused['peak_bytes'] / 2**20:.1f} MiB" if fused["peak_bytes"] else ""
    return (
        label(fused),
        f"{fused['exits']:g} of {fused['shape']}{size}".replace("x", "·"),
        f"**{fused['both_ms']:.3g} ms**",
        times("tuned"),
        times("tuned, compiled", "reference, compiled"),
        times("as written"),
        memory,
        f"{min(peaks) / fused['peak_bytes']:.1f}×" if peaks and fused["peak_bytes"] else "",
        f"{fused['percent_of_limit']:.0f} % {fused['limit']}",
    )


def replaced(text: str, name: str, new: str) -> str:
    """The document with `new` between the markers of a section. ValueError: there are none."""
    start, stop = f"<!-- {name}: written by `make bench-readme` -->", f"<!-- end of {name} -->"
    before, begin, rest = text.partition(start)
    _, end, after = rest.partition(stop)
    if not begin or not end:
        raise ValueError(f"there is no {start!r} ... {stop!r}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def written(root: Path, document: str) -> str:
    """The document as the results would have it."""
    path = root / document
    text = path.read_text()
    for name, section in SECTIONS[document].items():
        text = replaced(text, name, section(root, path.parent))
    return text


def problems(root: Path) -> list[str]:
    """Where a document or a figure disagrees with the results."""
    found = [
        f"{document} is not what benchmarks/results say"
        for document in SECTIONS
        if (root / document).read_text() != written(root, document)
    ]
    results = root / "benchmarks" / "results"
    files = {path.stem: path for path in results.glob("*.csv")}
    for stem, path in files.items():
        if stem not in training_results.WITHOUT_FIGURE and not list(results.glob(f"{stem}-*.png")):
            found.append(f"{path.name} has no figures")
    for figure in sorted(results.glob("*.png")):
        path = files.get(figure.stem.rpartition("-")[0])
        if path is None or digest(path).encode() not in figure.read_bytes():
            found.append(f"{figure.name} was not drawn from the results that are there")
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if something is out of date")
    if not parser.parse_args(arguments).check:
        for path in sorted((root / "benchmarks" / "results").glob("*.csv")):
            (training_results.draw if training_results.is_one(path) else draw)(path, path.parent)
        for document in SECTIONS:
            text = written(root, document)
            (root / document).write_text(text)
    found = problems(root)
    print(*found or ["documents and figures are what benchmarks/results say"], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
