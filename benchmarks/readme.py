"""The README's benchmarks from benchmarks/results/*.csv: `python benchmarks/readme.py` writes them.

With --check it writes nothing, and fails where the README or a figure is not what the results say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # imported by a test, too
from figures import COMPARED, FIGURES, Row, cases, digest, draw, label, read

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: written by `make bench-readme` -->", "<!-- end of benchmarks -->"
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


def section(root: Path) -> str:
    """What stands between the README's markers."""
    parts = [device(path, root) for path in sorted((root / "benchmarks" / "results").glob("*.csv"))]
    return "\n\n".join(parts) if parts else "No results are recorded yet."


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


def replaced(text: str, new: str) -> str:
    """The README with `new` between its markers. ValueError: there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN!r} ... {END!r}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def problems(root: Path) -> list[str]:
    """Where the README or a figure disagrees with the results."""
    text = (root / "README.md").read_text()
    found = [] if replaced(text, section(root)) == text else ["README.md is not what benchmarks/results say"]
    results = root / "benchmarks" / "results"
    files = {path.stem: digest(path).encode() for path in results.glob("*.csv")}
    for stem in files:
        if not list(results.glob(f"{stem}-*.png")):
            found.append(f"{stem}.csv has no figures")
    for figure in sorted(results.glob("*.png")):
        if files.get(figure.stem.rpartition("-")[0], b"no such file") not in figure.read_bytes():
            found.append(f"{figure.name} was not drawn from the results that are there")
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README or figures are out of date")
    if not parser.parse_args(arguments).check:
        for path in sorted((root / "benchmarks" / "results").glob("*.csv")):
            draw(path, path.parent)
        readme = root / "README.md"
        readme.write_text(replaced(readme.read_text(), section(root)))
    found = problems(root)
    print(*found or ["README and figures are what benchmarks/results say"], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
