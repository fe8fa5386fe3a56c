"""`selfreg-fast bench`: the fused losses beside PyTorch's ways to compute them, in one run, on a CPU or a GPU."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ..info import cpu_name
from .cases import DTYPES, FUSED, Case, named, suites
from .trial import COLUMNS, Record, describe, measure, say, steps

SETTING = "commit date version torch triton cuda python device threads repeats".split()
NAMES = list(dict.fromkeys(case.name for cases in suites("cpu").values() for case in cases))  # "cuda" has the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "suites",
        nargs="*",
        type=_suite,  # not `choices`, among which argparse looks for the default, too
        metavar="SUITE",
        help=f"{', '.join(suites('cpu'))}: any of them (default: quick)",
    )
    parser.add_argument("--cases", nargs="+", choices=NAMES, metavar="CASE", help="instead: cases of any suite by name")
    parser.add_argument("--list", action="store_true", help="show all suites and their cases, and measure nothing")
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the exits, instead of the cases' own")
    parser.add_argument("--channels-last", action="store_true", help="exits in the channels_last memory format")
    parser.add_argument("--repeats", type=_positive, help="rounds of measurement (default: 7, on a GPU 20)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no more cases after these")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.csv",
        help="also write every figure to this file, as it comes; to a file named after the device if this is a folder",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a trace of each case's fused step there, and measure nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Measures the cases and prints a table for each; 1 if the fused loss fails or is not its peers'."""
    # What needs rich is imported when it runs, so that --help works without.
    from rich.console import Console

    from . import report
    from .profile import profile

    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.list:
        report.list_suites(console, suites(args.device))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("torch sees no CUDA device on this machine", style="red")
        return 2
    work = chosen(args)
    if args.profile:
        for _, case in work:
            profile(case, args.device, args.profile, console)
        return 0
    repeats = args.repeats or (20 if args.device == "cuda" else 7)
    common = setting(args.device, repeats)
    console.print("{device}, {threads} threads, torch {torch}, {repeats} rounds".format(**common))
    console.print(report.EXPLANATION)
    records: list[Record] = []
    path = args.out / f"{slug(common['device'])}.csv" if args.out and args.out.is_dir() else args.out
    with _writer(path) as write:
        for suite, case, measured in results(work, args.device, repeats, args.seconds):
            lines = [{**common, **record, "suite": suite} for record in measured]
            write(lines)
            records += lines
            report.print_case(console, case, measured)
    report.print_summary(console, records)
    report.print_growth(console, records)
    if path:
        console.print(f"wrote {path}", soft_wrap=True)
    where = common["device"] + ("" if args.device == "cuda" else f" ({common['threads']} threads)")
    console.print(report.conclusion(records, where), markup=False, highlight=False)
    return int(any(report.is_failure(record) for record in records if record["peer"] == FUSED))


def chosen(args: argparse.Namespace) -> list[tuple[str, Case]]:
    """(suite, case) for all that is to be measured."""
    if args.cases:
        work = [("cases", named(name, args.device)) for name in dict.fromkeys(args.cases)]
    else:
        there = suites(args.device)
        work = [(name, case) for name in dict.fromkeys(args.suites or ["quick"]) for case in there[name]]
    own: dict[str, Any] = {"dtype": args.dtype} if args.dtype else {}
    if args.channels_last:
        own["layout"] = "channels_last"
    return list(dict.fromkeys((suite, case._replace(**own)) for suite, case in work))


def results(
    work: Sequence[tuple[str, Case]], device: str, repeats: int, seconds: float
) -> Iterator[tuple[str, Case, list[Record]]]:
    """Each case as soon as it is measured; those for which no time is left with a note."""
    end = time.monotonic() + seconds
    for number, (suite, case) in enumerate(work, 1):
        if time.monotonic() > end:
            yield suite, case, without_figures(case, "skipped: no time was left")
            continue
        with progress(f"{number}/{len(work)} {case.name}", steps(case, repeats)) as advance:
            try:
                measured = measure(case, device, repeats, advance)
            except Exception as error:  # of the inputs, say
                measured = without_figures(case, f"failed: {say(error)}")
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield suite, case, measured


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, and what advances it. No thread refreshes it: that would take time from what is measured."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)

        def advance() -> None:
            bar.advance(task)
            bar.refresh()

        yield advance


def without_figures(case: Case, note: str) -> list[Record]:
    """Records that say why nothing was measured."""
    return [{**describe(case, peer), "note": note} for peer in case.peers]


def setting(device: str, repeats: int) -> Record:
    """What all records of a run have in common."""
    return {
        "commit": os.environ.get("SELFREG_FAST_COMMIT") or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }


@contextlib.contextmanager
def _writer(path: Path | None) -> Iterator[Callable[[Sequence[Record]], None]]:
    """Appends records to a new CSV file, at once; to none without `path`."""
    if path is None:
        yield lambda records: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*SETTING, *COLUMNS], lineterminator="\n")
        writer.writeheader()

        def write(records: Sequence[Record]) -> None:
            writer.writerows(records)
            file.flush()

        yield write


def slug(device: str) -> str:
    """A device's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")


def _triton_version() -> str | None:
    if find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _commit() -> str:
    """The commit of the checkout that this package, or else the working directory, is; "" where there is none."""
    for folder in (Path(__file__).parents[3], Path.cwd()):
        if (folder / ".git").exists() and (folder / "selfreg_fast").is_dir():
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
            try:
                return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            except (OSError, subprocess.CalledProcessError):
                return ""
    return ""


def _suite(text: str) -> str:
    if text not in suites("cpu"):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(suites('cpu'))}, got {text}")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {number}")
    return number
