"""`selfreg-fast bench`: the fused losses beside PyTorch's ways to compute them, in one run on this machine's CPU."""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from .. import __version__, functional, reference
from ..backends import CPU_KERNELS, backends
from .info import cpu_name
from .measure import Timing, copying, in_fresh_process, peak_bytes, sample_seconds

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
Record = dict[str, Any]  # one line of the CSV file

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
TAU = 2.0
IGNORE = 255
SEG_WEIGHT = 0.8  # of the label losses in the objective, the default of self_regulation_loss


class Case(NamedTuple):
    """What is computed, and on what."""

    terms: str  # "sr-f", "sr-l", or "objective" for MEA + SR-F + SR-L
    exits: int
    shape: tuple[int, int, int, int]  # (B, C, H, W) of each exit
    size: tuple[int, int] | None = None  # (H, W) to which they are resized

    @property
    def learners(self) -> range:
        """The exits that get a gradient: all but a teacher that learns from nobody."""
        return range(self.terms == "sr-f", self.exits - (self.terms == "sr-l"))


CASES = {
    "sr-l-voc": Case("sr-l", 5, (2, 21, 321, 321)),
    "sr-l-ade": Case("sr-l", 2, (8, 150, 128, 128)),
    "objective-voc": Case("objective", 5, (2, 21, 321, 321)),
    "sr-l-cityscapes": Case("sr-l", 3, (2, 19, 512, 1024)),
    "sr-f-features": Case("sr-f", 5, (1, 256, 81, 81)),
    "resized-voc": Case("objective", 5, (8, 21, 41, 41), (321, 321)),
    "resized-cityscapes": Case("objective", 3, (1, 19, 64, 128), (512, 1024)),
}
DEFAULT_CASES = list(CASES)[:3]

FUSED = "fused"
COMPILED = "torch.compile"
FUSED_SR_L = "fused SR-L"  # beside the objective: how much the other terms add


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=[*CASES, "all"],
        default=DEFAULT_CASES,
        metavar="CASE",
        help=f"any of {', '.join(CASES)}, all (default: {' '.join(DEFAULT_CASES)})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the exits (default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="exits in the channels_last memory format")
    parser.add_argument("--repeats", type=_positive, default=7, help="rounds of measurement (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="also write every figure to this file")


def run(args: argparse.Namespace) -> int:
    """Measures the cases and prints a table for each; 1 if the fused loss fails or is not the reference's."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after minutes
    setting: Record = {
        "commit": _commit(),
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "layout": "channels_last" if args.channels_last else "contiguous",
        "temperature": TAU,
        "repeats": args.repeats,
    }
    console.print("{device}, {threads} threads, torch {torch}, {dtype}, {layout}, {repeats} rounds".format(**setting))
    if not CPU_KERNELS:
        console.print(f"No fused kernels to measure. cpu: {backends()['cpu']}", style="yellow")
    records: list[Record] = []
    for name in list(CASES) if "all" in args.cases else dict.fromkeys(args.cases):
        measured = measure(name, args.dtype, args.channels_last, args.repeats)
        records += [{**setting, **record} for record in measured]
        console.print(_table(name, measured))
        for record in measured:
            if record["note"]:
                console.print(f"  {record['peer']}: {record['note']}", style="yellow")
            if record["peer"] == FUSED_SR_L and record["times_fused"]:
                console.print(f"  MEA + SR-F + SR-L costs {1 / record['times_fused']:.2f} x SR-L alone, both fused")
        console.print()
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        console.print(f"wrote {args.out}", soft_wrap=True)
    return int(any(record["note"] for record in records if record["peer"] == FUSED))


def as_written(terms: str) -> Loss:
    """The formulas as one types them in: softmax, power, logarithm, product, for each pair of exits."""

    def soft(teacher: Tensor, student: Tensor) -> Tensor:
        p = F.softmax(teacher.detach(), 1) ** (1 / TAU)
        q = F.softmax(student, 1) ** (1 / TAU)
        return -(TAU**2) * (p * q.log()).sum(1).mean()

    def sr_f(exits: Sequence[Tensor], labels: Tensor) -> Tensor:
        return torch.stack([soft(exits[0], z) for z in exits[1:]]).sum()

    def sr_l(exits: Sequence[Tensor], labels: Tensor) -> Tensor:
        return torch.stack([soft(exits[-1], z) for z in exits[:-1]]).sum()

    def objective(exits: Sequence[Tensor], labels: Tensor) -> Tensor:
        mea = torch.stack([F.cross_entropy(z, labels, ignore_index=IGNORE) for z in exits]).sum()
        return SEG_WEIGHT * mea + sr_f(exits, labels) + sr_l(exits, labels)

    return {"sr-f": sr_f, "sr-l": sr_l, "objective": objective}[terms]


def tuned(terms: str) -> Loss:
    """Eager PyTorch as a careful user writes it: one log_softmax an exit, one exp a teacher, no power, no logarithm."""

    def soft(p: Tensor, log_q: Tensor) -> Tensor:
        # A sum returned in float16 overflows. One in float32 costs a copy, which the other dtypes need not pay.
        total = (p * log_q).sum(dtype=torch.float32 if p.dtype == torch.float16 else None)
        return (-TAU * log_q.shape[1] / log_q.numel()) * total.to(reference.loss_dtype(p.dtype))

    def loss(exits: Sequence[Tensor], labels: Tensor) -> Tensor:
        log_q = [F.log_softmax(z, 1) for z in exits]
        parts = []
        if terms != "sr-l":
            p = (log_q[0].detach() / TAU).exp()
            parts += [soft(p, log) for log in log_q[1:]]
        if terms != "sr-f":
            p = (log_q[-1].detach() / TAU).exp()
            parts += [soft(p, log) for log in log_q[:-1]]
        if terms == "objective":
            hard = torch.stack([F.nll_loss(log, labels, ignore_index=IGNORE) for log in log_q]).sum()
            parts.append(SEG_WEIGHT * hard.to(parts[0].dtype))
        return torch.stack(parts).sum()

    return loss


def resized(loss: Loss, size: tuple[int, int] | None) -> Loss:
    """A loss of exits that are first resized to `size`."""
    if size is None:
        return loss
    return lambda exits, labels: loss([F.interpolate(z, size=size, mode="bilinear") for z in exits], labels)


def ours(library: ModuleType, case: Case, **backend: str) -> Loss:
    """This package's function for the terms, fused or from its reference."""
    common: dict[str, Any] = {"temperature": TAU, "size": case.size, **backend}

    def loss(exits: Sequence[Tensor], labels: Tensor) -> Tensor:
        if case.terms == "objective":
            total = library.self_regulation_loss(exits, labels, ignore_index=IGNORE, **common).total
            return total  # type: ignore[no-any-return]
        function = library.sr_f_loss if case.terms == "sr-f" else library.sr_l_loss
        return function(exits, **common)  # type: ignore[no-any-return]

    return loss


def peers(case: Case) -> dict[str, Loss]:
    """Whom we compare; the fused ones only where there are kernels."""
    found = {
        "as written": resized(as_written(case.terms), case.size),
        "reference": ours(reference, case),
        "tuned eager": resized(tuned(case.terms), case.size),
        COMPILED: torch.compile(resized(tuned(case.terms), case.size), fullgraph=True, dynamic=False),
    }
    if CPU_KERNELS:
        found[FUSED] = ours(functional, case, backend="cpu")
        if case.terms == "objective":
            found[FUSED_SR_L] = ours(functional, case._replace(terms="sr-l"), backend="cpu")
    return found


class Trial:
    """A training step's part of one peer, on inputs that rotate so that none is still in the caches."""

    def __init__(self, loss: Loss, inputs: Iterator[list[Tensor]], labels: Tensor) -> None:
        self.loss, self.inputs, self.labels = loss, inputs, labels
        self.exits = next(inputs)

    def forward(self) -> None:
        self.value = self.loss(self.exits, self.labels)

    def backward(self) -> None:
        torch.autograd.backward(self.value)

    def finish(self) -> None:
        """Frees the gradients, so that the next ones are allocated afresh; takes the next inputs."""
        for z in self.exits:
            z.grad = None
        self.exits = next(self.inputs)

    def run(self) -> None:
        self.forward()
        self.backward()
        self.finish()


def make_inputs(case: Case, dtype: str, channels_last: bool, sets: int) -> tuple[list[list[Tensor]], Tensor]:
    """Exits, `sets` times, and labels of which one in twenty is ignored."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = []
    for _ in range(sets):
        exits = [3 * torch.randn(case.shape, generator=generator) for _ in range(case.exits)]
        exits = [z.to(DTYPES[dtype], memory_format=layout) for z in exits]
        for i in case.learners:
            exits[i].requires_grad_()
        made.append(exits)
    batch, channels, *own = case.shape
    labels = torch.randint(channels, (batch, *(case.size or own)), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = IGNORE
    return made, labels


def measure(name: str, dtype: str, channels_last: bool, repeats: int) -> list[Record]:
    """Times and peaks of every peer of one case. A peer that fails is a record with a note and no figures."""
    case = CASES[name]
    exits, labels = make_inputs(case, dtype, channels_last, sets=2)
    inputs = itertools.cycle(exits)
    failures: dict[str, str] = {}
    losses: dict[str, float] = {}
    trials: dict[str, Trial] = {}
    console = Console(stderr=True)
    # No automatic refresh: its thread would take time from what is measured.
    with Progress(console=console, auto_refresh=False, transient=True, disable=not console.is_terminal) as progress:
        found = peers(case)
        task = progress.add_task(name, total=2 * len(found) + (len(found) + 1) * (repeats + 1))

        def advance(steps: int = 1) -> None:
            progress.advance(task, steps)
            progress.refresh()

        for peer, loss in found.items():
            try:
                trial = Trial(loss, itertools.repeat(exits[0]), labels)
                trial.run()  # compiles, too
            except Exception as error:  # out of memory, no compiler, ...: the others go on
                message = str(error).strip() or "no message"
                failures[peer] = f"failed: {type(error).__name__}: {message.splitlines()[0]}"
            else:
                losses[peer] = trial.value.item()
                trials[peer] = Trial(loss, inputs, labels)
            advance()
        steps = {peer: [trial.forward, trial.backward, trial.finish] for peer, trial in trials.items()}
        copy, copied = copying()
        samples = sample_seconds({"copy": [copy], **steps}, repeats, advance)
        bandwidth = copied / Timing.of(samples.pop("copy")[0]).median
        # A fresh process has a heap without free lists, and this one's inputs are not in its way.
        del exits, inputs, trials, trial, steps, copy
        peaks: dict[str, int | None] = dict.fromkeys(samples)
        try:
            peaks = in_fresh_process(measure_peaks, name, dtype, channels_last, list(samples))
        except RuntimeError as error:
            console.print(f"no peaks: {error}", style="yellow")
        advance(len(found))

    both = {peer: [f + b for f, b in zip(*sample[:2], strict=True)] for peer, sample in samples.items()}
    records = []
    for peer in found:
        alone = peer == FUSED_SR_L
        record = _record(name, case._replace(terms="sr-l") if alone else case, peer, dtype)
        record["copy_gb_per_s"] = round(bandwidth / 1e9, 2)
        records.append(record)
        if peer in failures:
            record["note"] = failures[peer]
            continue
        forward, backward, _ = samples[peer]
        for phase, seconds in {"forward": forward, "backward": backward, "both": both[peer]}.items():
            timing = Timing.of(seconds)
            record[f"{phase}_ms"] = round(1e3 * timing.median, 3)
            record[f"{phase}_ms_p20"] = round(1e3 * timing.low, 3)
            record[f"{phase}_ms_p80"] = round(1e3 * timing.high, 3)
        if FUSED in both:
            ratios = [theirs / fused for theirs, fused in zip(both[peer], both[FUSED], strict=True)]
            record["times_fused"] = round(statistics.median(ratios), 3)
        record["peak_bytes"] = peaks[peer]
        record["loss"] = losses[peer]
        expected = losses.get("reference", math.nan)
        if not alone and not math.isclose(losses[peer], expected, rel_tol=1e-2):
            record["note"] = f"its loss is {losses[peer]:.5g}, the reference's is {expected:.5g}"
    return records


def measure_peaks(name: str, dtype: str, channels_last: bool, names: Sequence[str]) -> dict[str, int | None]:
    """Peak memory of one step of each named peer above the inputs; meant for a fresh process."""
    case = CASES[name]
    exits, labels = make_inputs(case, dtype, channels_last, sets=1)
    found = peers(case)
    peaks = {}
    for peer in names:
        trial = Trial(found[peer], itertools.cycle(exits), labels)
        trial.run()
        peaks[peer] = peak_bytes(trial.run)
    return peaks


def _record(name: str, case: Case, peer: str, dtype: str) -> Record:
    """What is known before anything is measured, with None for the rest."""
    size = math.prod(case.shape) * DTYPES[dtype].itemsize
    phases = [f"{phase}_ms{suffix}" for phase in ("forward", "backward", "both") for suffix in ("", "_p20", "_p80")]
    return {
        "case": name,
        "terms": case.terms,
        "exits": case.exits,
        "shape": "x".join(map(str, case.shape)),
        "size": "x".join(map(str, case.size or case.shape[2:])),
        "peer": peer,
        **dict.fromkeys(phases),
        "times_fused": None,
        "bytes_to_move": size * (case.exits + len(case.learners)),
        "gradient_bytes": size * len(case.learners),
        "copy_gb_per_s": None,
        "peak_bytes": None,
        "loss": None,
        "note": "",
    }


def _table(name: str, records: Sequence[Record]) -> Table:
    first = records[0]
    case, moved, gradients = CASES[name], first["bytes_to_move"], first["gradient_bytes"]
    resized_to = ""
    if case.size is not None:
        number = gradients // len(case.learners) // math.prod(case.shape)
        one = math.prod((*case.shape[:2], *case.size)) * number / 2**20
        resized_to = f" One exit resized to {case.size} would be {one:.1f} MiB."
    table = Table(
        title=f"{name}: {case.exits} exits {case.shape}, {len(case.learners)} of them with a gradient"
        + (f", resized to {case.size}" if case.size else ""),
        caption=f"must move: ({case.exits} exits read + {len(case.learners)} gradients written) x {first['shape']} x "
        f"{gradients // len(case.learners) // math.prod(case.shape)} bytes = {moved / 1e6:.1f} MB; "
        f"gradients {gradients / 2**20:.1f} MiB. GB/s: that by both. In the same rounds, a copy reads plus writes "
        f"{first['copy_gb_per_s']:.1f} GB/s. Peak: above the inputs.{resized_to}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,  # the table fits into 80 columns
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    times = ("fwd\nms", "bwd\nms", "both\nms", "20-80 %\nms", "x\nfused")
    for heading in (*times, "\nGB/s", "of a\ncopy", "peak\nMiB", "x\ngrads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        if record["both_ms"] is None:
            table.add_row(record["peer"], "-", "-", "-")
            continue
        speed = record["bytes_to_move"] / record["both_ms"] / 1e6
        peak = record["peak_bytes"]
        table.add_row(
            record["peer"],
            _short(record["forward_ms"]),
            _short(record["backward_ms"]),
            _short(record["both_ms"]),
            f"{_short(record['both_ms_p20'])}-{_short(record['both_ms_p80'])}",
            "-" if record["times_fused"] is None else f"{record['times_fused']:.2f}",
            f"{speed:.2f}",
            f"{speed / record['copy_gb_per_s']:.0%}",
            "-" if peak is None else _short(peak / 2**20),
            "-" if peak is None else f"{peak / record['gradient_bytes']:.2f}",
            style="bold" if record["peer"] == FUSED else "",
        )
    return table


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _commit() -> str:
    """The commit of the checkout that this package, or else the working directory, is; "" where there is none."""
    for folder in (Path(__file__).parents[2], Path.cwd()):
        if (folder / ".git").exists() and (folder / "selfreg_fast").is_dir():
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
            try:
                return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            except (OSError, subprocess.CalledProcessError):
                return ""
    return ""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {number}")
    return number
