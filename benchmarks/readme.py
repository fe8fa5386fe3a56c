"""The README's benchmarks from benchmarks/results/*.csv: `python benchmarks/readme.py` writes them.

With --check it writes nothing, and fails where the README or a figure is not what the results say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # imported by a test, too
import training_results
from figures import COMPARED, FIGURES, Row, cases, digest, draw, label, read

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = {
    "speed": "Time of a training step of the loss",
    "memory": "Peak memory",
    "limit": "Against the device's limits",
    "scaling": "Growth of time and memory",
}
HEADINGS = (
    "case",
    "exits",
    "fused",
    "PyTorch, tuned",
    "compiled",
    "as written",
    "memory: fused",
    "best of the others",
    "of its limit",
)


def losses(root: Path) -> str:
    """The benchmarks of the losses, a device after the other."""
    results = sorted((root / "benchmarks" / "results").glob("*.csv"))
    parts = [device(path, root) for path in results if not training_results.is_one(path)]
    return "\n\n".join(parts) if parts else "No results are recorded yet."


# What stands between the README's markers, by the word in these.
SECTIONS = {"benchmarks": losses, "training": training_results.section}


def device(path: Path, root: Path) -> str:
    """One results file: where and with what it was measured, the table, the figures."""
    rows = read(path)
    about = (
        "**{device}**, {threads:g} threads, torch {torch}, Python {python}, commit {commit}, {repeats:g} rounds: "
        "[all figures]".format(**rows[0])
    )
    pictures = []
    for name in FIGURES:
        figure = path.with_name(f"{path.stem}-{name}.png").relative_to(root).as_posix()
        if (root / figure).exists():
            pictures.append(f"![{CAPTIONS[name]}]({figure})")
    return "\n\n".join([f"{about}({path.relative_to(root).as_posix()}).", table(rows), *pictures])


def table(rows: list[Row]) -> str:
    """The fused loss in ms and MiB, the others as multiples of it."""
    lines = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 1)]
    for peers in cases(rows, *COMPARED):
        lines.append(table_row(peers))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    """The README with `new` between the markers of a section. ValueError: there are none."""
    start, stop = f"<!-- {name}: written by `make bench-readme` -->", f"<!-- end of {name} -->"
    before, begin, rest = text.partition(start)
    _, end, after = rest.partition(stop)
    if not begin or not end:
        raise ValueError(f"the README has no {start!r} ... {stop!r}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def written(root: Path) -> str:
    """The README as the results would have it."""
    text = (root / "README.md").read_text()
    for name, section in SECTIONS.items():
        text = replaced(text, name, section(root))
    return text


def problems(root: Path) -> list[str]:
    """Where the README or a figure disagrees with the results."""
    found = []
    if (root / "README.md").read_text() != written(root):
        found.append("README.md is not what benchmarks/results say")
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
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README or figures are out of date")
    if not parser.parse_args(arguments).check:
        for path in sorted((root / "benchmarks" / "results").glob("*.csv")):
            (training_results.draw if training_results.is_one(path) else draw)(path, path.parent)
        text = written(root)
        (root / "README.md").write_text(text)
    found = problems(root)
    print(*found or ["README and figures are what benchmarks/results say"], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
