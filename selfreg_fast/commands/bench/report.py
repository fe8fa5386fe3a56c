"""What is printed: the suites, a table for each case, all cases in one, how time and memory grow, and all in words."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ..words import compared
from .cases import (
    DTYPES,
    FUSED,
    REFERENCE,
    REFERENCE_COMPILED,
    TRITON,
    TUNED,
    TUNED_COMPILED,
    WRITTEN,
    Case,
)
from .trial import Record

EXPLANATION = (
    "Times: median of a training step's parts, inputs cold, gradients allocated afresh; peers take turns, each "
    "beginning with a step that is not counted. Kept: both, where glibc's malloc keeps what is freed "
    "(MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776). GB/s: bytes that must move, by both passes. Percent: "
    "of a copy's bytes per second, and of the exponentials per second that this machine reached in the best of the "
    "rounds (one is needed for each exit, channel and output pixel, at least). Peak: memory above the inputs. A half "
    "is computed under autocast. On a GPU also: launches of a step, Python's time to enqueue it, its time as a CUDA "
    "graph replays it."
)
FEW = 0.1  # by which growth may differ from linear
PLAIN = {  # the peers that are PyTorch and nothing else, and what they are
    WRITTEN: "the formulas as one types them in",
    TUNED: "hand-tuned eager PyTorch",
    TUNED_COMPILED: "hand-tuned PyTorch under torch.compile",
    REFERENCE: "this package's functions in plain PyTorch",
    REFERENCE_COMPILED: "this package's functions in plain PyTorch under torch.compile",
}


def is_failure(record: Record) -> bool:
    """Whether something that should have run did not, or computed something else."""
    return str(record["note"]).startswith(("failed", "another loss"))


def list_suites(console: Console, suites: Mapping[str, Sequence[Case]]) -> None:
    """All suites and their cases."""
    table = _table("suite", "case", "exits", "of", "resized to", "dtype", "layout", "peers")
    for name, cases in suites.items():
        for case in cases:
            size = "x".join(map(str, case.size)) if case.size else ""
            shape = "x".join(map(str, case.shape))
            peers = str(len(case.peers))
            table.add_row(name, case.name, str(case.exits), shape, size, case.dtype, case.layout, peers)
        table.add_section()
    console.print(table)


def print_case(console: Console, case: Case, records: Sequence[Record]) -> None:
    """A table with a row for each peer; below it what must move, and the notes."""
    table = _table(
        "", "fwd\nms", "bwd\nms", "both\nms", "20-80 %\nms", "kept\nms", "x\nfused", "\nGB/s", "of a\ncopy", "of\nexp"
    )
    on_gpu = any(record["launches"] for record in records)
    for heading in ("peak\nMiB", "x\ngrads", *(("launch-\nes", "Python\nus", "replay\nms") if on_gpu else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.title = title(case)
    table.caption = budget(case, records)
    for record in records:
        if record["both_ms"] is None:
            table.add_row(record["peer"], *"---")
            continue
        table.add_row(
            record["peer"],
            *(_short(record[f"{phase}_ms"]) for phase in ("forward", "backward", "both")),
            f"{_short(record['both_ms_p20'])}-{_short(record['both_ms_p80'])}",
            _short(record["kept_ms"]),
            _short(record["times_fused"], 2),
            _short(record["gb_per_s"], 2),
            f"{record['percent_of_copy']:.0f} %",
            f"{record['percent_of_exp']:.0f} %",
            "-" if record["peak_bytes"] is None else _short(record["peak_bytes"] / 2**20),
            _short(record["peak_over_gradients"], 2),
            *(
                (_short(record["launches"], 0), *(_short(record[k]) for k in ("host_us", "replay_ms")))
                if on_gpu
                else ()
            ),
            style="bold" if record["peer"] == FUSED else "",
        )
    console.print(table)
    for record in records:
        if record["note"]:
            console.print(f"  {record['peer']}: {record['note']}", style="yellow", markup=False)
    console.print()


def title(case: Case) -> str:
    """What is computed, and on what."""
    size = f", resized to {case.size}" if case.size else ""
    return (
        f"{case.name}: {case.terms}, {case.exits} exits {case.shape}{size}, {len(case.learners)} of them with a "
        f"gradient; {case.dtype}{', autocast' if case.half else ''}, {case.layout}, tau {case.temperature:g}"
    )


def budget(case: Case, records: Sequence[Record]) -> str:
    """The formula of the bytes and of the exponentials, with this case's numbers."""
    shape, size = "x".join(map(str, case.shape)), DTYPES[case.dtype].itemsize
    labels = f" + {case.label_bytes / 1e6:.1f} MB of labels" if case.labelled else ""
    text = (
        f"must move: ({case.exits} exits read + {len(case.learners)} gradients written) x {shape} x {size} bytes"
        f"{labels} = {case.bytes_to_move / 1e6:.1f} MB. Exponentials: {case.output_elements / 1e6:.1f} M "
        f"x {case.exits} exits = {case.exponentials / 1e6:.1f} M. Gradients: {case.gradient_bytes / 2**20:.1f} MiB."
    )
    if case.size:
        text += f" One exit of output size: {case.output_elements * size / 2**20:.1f} MiB."
    measured = next((r for r in records if r["copy_gb_per_s"]), None)
    if measured:
        text += f" The machine: {measured['copy_gb_per_s']:.1f} GB/s, {measured['exp_gexp_per_s']:.2f} Gexp/s."
    return text


def print_summary(console: Console, records: Sequence[Record]) -> None:
    """One line a case: the fused loss, and the fastest and the most frugal of PyTorch's ways."""
    table = _table(
        "case", "dtype", "fused\nms", "fastest peer", "x\nfused", "peak\nMiB", "most frugal peer", "x\nfused"
    )
    table.add_column("of its\nlimit", justify="right")
    for lines in by_case(records):
        fused, peers = contest(lines, FUSED)
        if fused is None or not peers:
            continue
        fast, frugal = best(fused, peers, "both_ms"), best(fused, peers, "peak_bytes")
        table.add_row(
            fused["case"] + (", channels_last" if fused["layout"] == "channels_last" else ""),
            fused["dtype"],
            _short(fused["both_ms"]),
            *((fast[0], _short(fast[1], 2)) if fast else "--"),
            *((_short(fused["peak_bytes"] / 2**20), frugal[0], _short(frugal[1])) if frugal else "---"),
            f"{fused['percent_of_limit']:.0f} % {fused['limit']}",
        )
    if table.row_count > 1:
        console.print(table)


def contest(lines: Iterable[Record], *fused: str) -> tuple[Record | None, list[Record]]:
    """Of one case's records with figures for the right loss: the first of those named `fused`, and all its peers."""
    right = [r for r in lines if r["both_ms"] and not r["note"].startswith("another loss")]
    return next((r for r in right if r["peer"] in fused), None), [r for r in right if not r["peer"].startswith(FUSED)]


def best(fused: Record, peers: Iterable[Record], key: str) -> tuple[str, float] | None:
    """The peer with the least of a figure, "both_ms" or "peak_bytes", and how many times the fused loss's that is."""
    there = [r for r in peers if r[key]]
    if not there or not fused[key]:
        return None
    least = min(there, key=lambda r: float(r[key]))
    paired = least["times_fused"] if key == "both_ms" and fused["peer"] == FUSED else None
    return least["peer"], paired or least[key] / fused[key]


def conclusion(records: Iterable[Record], where: str) -> str:
    """What the cases have shown, in words for whoever does not read the tables.

    On a GPU without this package's CUDA kernels, Triton's are the fused loss.

    Args:
        records: of all peers of all cases.
        where: the device's name.
    """
    cases = [contest(lines, FUSED, TRITON) for lines in by_case(records)]
    ran = [(fused, [r for r in peers if r["peer"] in PLAIN]) for fused, peers in cases if fused]
    pairs = [(fused, plain) for fused, plain in ran if plain]
    if not ran:
        return f"On {where}, the fused loss was measured in no case: the notes above say why."
    if not pairs:
        return f"On {where}, no plain PyTorch was measured beside the fused loss: there is nothing to compare it with."
    times = [best(fused, plain, "both_ms") for fused, plain in pairs]
    peaks = [best(fused, plain, "peak_bytes") for fused, plain in pairs]
    (faster, fastest), (leaner, leanest) = _against(times, "time"), _against(peaks, "memory")
    by = " by Triton" if any(fused["peer"] == TRITON for fused, _ in pairs) else ""
    over = f"each of {len(pairs)} cases" if len(pairs) > 1 else f"the case {pairs[0][0]['case']}"
    known = f" in the {sum(map(bool, peaks))} where it was measured" if None in peaks else ""
    memory = f", and {leaner} than the most frugal{known} ({leanest})" if leanest else "; memory was not measured"
    meanings = ", ".join(f'"{n}" is {PLAIN[n]}' for n in PLAIN if f'"{n}"' in fastest + leanest)
    missing = f" {len(cases) - len(pairs)} more of the cases had nothing to compare." if len(cases) > len(pairs) else ""
    return (
        f"On {where}, the fused loss{by}, forward and backward, took {faster} than the fastest plain PyTorch in {over} "
        f"({fastest}){memory}. Here {meanings}.{missing}"
    )


def _against(found: Iterable[tuple[str, float] | None], what: str) -> tuple[str, str]:
    """How much less of something the fused loss took than these peers, and who they are; "" twice for none."""
    there = [peer for peer in found if peer]
    names = Counter(name for name, _ in there)
    who = ", ".join(f'"{name}"' + f" in {n}" * (len(names) > 1) for name, n in names.most_common())
    return compared([multiple for _, multiple in there], f"less {what}", f"more {what}") if there else "", who


def print_growth(console: Console, records: Sequence[Record]) -> None:
    """For each axis of the suite `scaling` the exponents with which time and memory grow."""
    table = _table("grows", "from", "to", "peer", "time\n~ x^", "peak\n~ x^", "time")
    for (axis, peer), growth in growths(records).items():
        first, last, time, memory = growth
        verdict = "linear" if abs(time - 1) <= FEW else "less than linear" if time < 1 else "more than linear"
        table.add_row(
            axis, str(first), str(last), peer, f"{time:.2f}", "-" if memory is None else f"{memory:.2f}", verdict
        )
    if table.row_count:
        table.title = "Growth: exponents fitted to all points; 1 is linear, 0 independent"
        console.print(table)


def growths(records: Iterable[Record]) -> dict[tuple[str, str], tuple[int, int, float, float | None]]:
    """(axis, peer) -> smallest and largest position, exponents of time and of peak memory."""
    points: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["axis"] and record["both_ms"]:
            points.setdefault((record["axis"], record["peer"]), []).append(record)
    found = {}
    for key, lines in points.items():
        at = [record["at"] for record in lines]
        if len(set(at)) > 1:
            peaks = [record["peak_bytes"] for record in lines]
            memory = exponent(at, peaks) if all(peaks) else None
            found[key] = min(at), max(at), exponent(at, [record["both_ms"] for record in lines]), memory
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The e of the y = c x^e that fits best."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def by_case(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each case of each suite together."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[k] for k in ("suite", "case", "dtype", "layout")), []).append(record)
    return list(found.values())


def _table(*headings: str) -> Table:
    """One that fits into 80 columns where its content does."""
    table = Table(
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    for heading in headings:
        table.add_column(heading, justify="right" if "\n" in heading else "left", no_wrap=True)
    return table


def _short(number: float | None, decimals: int = 1) -> str:
    """Enough digits to compare, and no more."""
    if number is None:
        return "-"
    return f"{number:.{decimals if number < 100 else 0}f}" if number >= 1 else f"{number:.3g}"
