"""The fused losses beside PyTorch's ways to compute them, on a GPU: `python -m benchmarks.gpu --out FILE`.

`python benchmarks/gpu.py` measures the installed package; with -m it is the checkout's, as after `pip install -e .`.

A figure is the median of rounds in which all methods take turns, by CUDA events. Before each call the GPU is kept busy
for a moment, so that times are those of the GPU and not of the Python that feeds it; inputs rotate, so that none is
still in the L2 cache. Bytes are those that must move: each exit read once, each wanted gradient written once.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfreg_fast import backends, functional, reference

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
Function = Callable[[], object]
Row = dict[str, Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORWARD, BOTH = "forward", "forward+backward"
THIS, GRAPH, TRITON, EAGER, COMPILED, COPY = "cuda", "cuda graph", "triton", "reference", "torch.compile", "copy"
COLUMNS = (
    "commit device torch triton cuda date case shape exits dtype layout method pass ms ms_p20 ms_p80 bytes gb_per_s "
    "percent_of_copy peak_bytes peak_over_gradients x_over_this note"
).split()

IGNORE = 255
COLD_BYTES = 2**28  # several times the L2 cache of any GPU: what the rotating inputs take at least
COPIED_BYTES = 2**30
HEAD_START = 2_000_000  # clock cycles, about 1 ms, for which the GPU waits while Python enqueues


class Case(NamedTuple):
    """What is computed, and on what."""

    name: str
    terms: str  # "sr-f", "sr-l", or "objective" for MEA + SR-F + SR-L
    exits: int
    shape: tuple[int, int, int, int]  # (B, C, H, W) of each exit
    dtype: str = "float32"
    layout: str = "contiguous"
    temperature: float = 1.0

    @property
    def learners(self) -> range:
        """The exits that get a gradient: all but a teacher that learns from nobody."""
        return range(self.terms == "sr-f", self.exits - (self.terms == "sr-l"))

    @property
    def exit_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def bytes_to_move(self, phase: str) -> int:
        return self.exit_bytes * (self.exits + (len(self.learners) if phase == BOTH else 0))


def cases() -> list[Case]:
    """All that is measured, in the order of importance."""
    objective = Case("objective", "objective", 5, (8, 21, 512, 512))
    others = [
        Case("objective-cityscapes", "objective", 2, (4, 19, 1024, 2048)),
        Case("sr-f-features", "sr-f", 4, (2, 256, 128, 128)),
        Case("sr-l-ade", "sr-l", 2, (8, 150, 512, 512)),
        Case("sr-l-ade-small", "sr-l", 2, (8, 150, 128, 128)),
    ]
    layouts = ("contiguous", "channels_last")
    kinds = [(dtype, layout) for layout in layouts for dtype in ("float32", "bfloat16")]
    found = [case._replace(dtype=d, layout=layout) for case in (objective, *others) for d, layout in kinds]
    found += [objective._replace(dtype="float16", layout=layout) for layout in layouts]
    warm = objective._replace(name="objective-tau2", temperature=2.0)
    return found + [warm._replace(dtype=d) for d in DTYPES]


# ---- what is measured ------------------------------------------------------------------------------------------------


def loss_of(case: Case, library: ModuleType, **backend: str) -> Loss:
    """This package's function for the terms, fused or from its reference."""

    def loss(exits: Sequence[Tensor], labels: Tensor) -> Tensor:
        options: dict[str, Any] = {"temperature": case.temperature, **backend}
        if case.terms == "objective":
            return library.self_regulation_loss(exits, labels, ignore_index=IGNORE, **options).total
        return (library.sr_f_loss if case.terms == "sr-f" else library.sr_l_loss)(exits, **options)

    return loss


def losses_of(case: Case) -> dict[str, Loss]:
    """Whom we compare. The reference is the formula in eager PyTorch, with log_softmax."""
    return {
        THIS: loss_of(case, functional, backend="cuda"),
        TRITON: loss_of(case, functional, backend="triton"),
        EAGER: loss_of(case, reference),
    }


def make_inputs(case: Case, device: str) -> tuple[list[list[Tensor]], Tensor]:
    """Sets of exits, as many as it takes to be cold, and labels of which one in twenty is ignored."""
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    made = []
    for _ in range(max(2, math.ceil(COLD_BYTES / (case.exits * case.exit_bytes)))):
        exits = []
        for i in range(case.exits):
            z = torch.randn(case.shape, generator=generator, device=device, dtype=DTYPES[case.dtype]).mul_(3)
            exits.append(z.contiguous(memory_format=layout).requires_grad_(i in case.learners))
        made.append(exits)
    batch, channels, height, width = case.shape
    labels = torch.randint(channels, (batch, height, width), generator=generator, device=device)
    labels[torch.rand(labels.shape, generator=generator, device=device) < 0.05] = IGNORE
    return made, labels


def forward(loss: Loss, exits: Sequence[Tensor], labels: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(exits, labels)


def both(loss: Loss, exits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, ...]:
    value = loss(exits, labels)
    return value.detach(), *torch.autograd.grad(value, [z for z in exits if z.requires_grad])


def on_next(step: Callable[..., object], loss: Loss, inputs: Iterator[list[Tensor]], labels: Tensor) -> Function:
    return lambda: step(loss, next(inputs), labels)


def graph_of(loss: Loss, made: Sequence[list[Tensor]], labels: Tensor) -> Function:
    """Replays of CUDA graphs of a step, one for each set of inputs in turn."""
    graphs = []
    for exits in made:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            both(loss, exits, labels)
        graphs.append(graph)
    turns = itertools.cycle(graphs)
    return lambda: next(turns).replay()


def copying(device: str) -> Function:
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


# ---- how it is measured ----------------------------------------------------------------------------------------------


def sample_ms(functions: dict[tuple[str, str], Function], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of `rounds` calls of each function, which take turns, after a round of warm-up."""
    events: dict[tuple[str, str], list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {k: [] for k in functions}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            for key, function in functions.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(HEAD_START)
                begin.record()
                function()
                end.record()
                if turn:
                    events[key].append((begin, end))
            torch.cuda.synchronize()
    finally:
        gc.enable()
    return {key: [begin.elapsed_time(end) for begin, end in pairs] for key, pairs in events.items()}


def peak_bytes(function: Function) -> int:
    """Device memory that a call takes at most, its results included, above what was taken before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def measure(case: Case, losses: dict[str, Loss], rounds: int, device: str) -> list[Row]:
    """A row for each method and pass. One that fails is a row with a note and no figures."""
    made, labels = make_inputs(case, device)
    inputs = itertools.cycle(made)
    functions: dict[tuple[str, str], Function] = {(COPY, COPY): copying(device)}
    rows: dict[tuple[str, str], Row] = {(COPY, COPY): {}}
    values: dict[str, float] = {}
    for method, loss in losses.items():
        # Compiled once, for training: a second graph without gradients costs more seconds than it is worth.
        for phase in (BOTH,) if method == COMPILED else (FORWARD, BOTH):
            row = rows[method, phase] = {}
            try:
                step = on_next(forward if phase == FORWARD else both, loss, inputs, labels)
                step()  # compiles, too
                row["peak_bytes"] = peak_bytes(step)
                if phase == FORWARD:
                    values[method] = forward(loss, made[0], labels).item()
                functions[method, phase] = step
            except Exception as error:  # out of memory, no compiler, ...: the others go on
                row["note"] = say(error)
        torch.cuda.empty_cache()
    if (THIS, BOTH) in functions and COMPILED not in losses:
        row = rows[GRAPH, BOTH] = {}
        try:
            functions[GRAPH, BOTH] = graph_of(losses[THIS], made, labels)
        except Exception as error:
            row["note"] = say(error)
    samples = sample_ms(functions, rounds)

    copy_rate = 2 * COPIED_BYTES / statistics.median(samples[COPY, COPY])
    for key, times in samples.items():
        method, phase = key
        row, ms = rows[key], statistics.median(times)
        low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
        moved = 2 * COPIED_BYTES if method == COPY else case.bytes_to_move(phase)
        row |= {"ms": round(ms, 4), "ms_p20": round(low, 4), "ms_p80": round(high, 4), "bytes": moved}
        row["gb_per_s"] = round(moved / ms / 1e6, 1)
        row["percent_of_copy"] = round(100 * moved / ms / copy_rate, 1)
        if phase == BOTH and "peak_bytes" in row:
            row["peak_over_gradients"] = round(row["peak_bytes"] / (len(case.learners) * case.exit_bytes), 3)
        if (THIS, phase) in samples:
            row["x_over_this"] = round(ms / statistics.median(samples[THIS, phase]), 3)
    expected = values.get(EAGER)
    for method, value in values.items():
        if expected is not None and not math.isclose(value, expected, rel_tol=1e-2):
            rows[method, FORWARD]["note"] = f"its loss is {value:.5g}, the reference's is {expected:.5g}"
    return [describe(case, *key) | row for key, row in rows.items()]


def measure_compiled(case: Case, rounds: int, device: str) -> list[Row]:
    """The row of torch.compile, which took turns with this package's step."""
    torch._dynamo.reset()
    compiled = torch.compile(loss_of(case, reference), dynamic=False)
    rows = measure(case, {THIS: losses_of(case)[THIS], COMPILED: compiled}, rounds, device)
    return [row for row in rows if row["method"] == COMPILED]


# ---- the report ------------------------------------------------------------------------------------------------------


def describe(case: Case, method: str, phase: str) -> Row:
    """What is known before anything is measured."""
    return {
        "case": case.name,
        "shape": "x".join(map(str, case.shape)),
        "exits": case.exits,
        "dtype": case.dtype,
        "layout": case.layout,
        "method": method,
        "pass": phase,
    }


def say(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]


def setting(device: str) -> Row:
    """What all rows have in common."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "commit": os.environ.get("SELFREG_FAST_COMMIT") or git_commit(),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_commit() -> str:
    """The commit of this checkout, "-dirty" where files differ from it; "" where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


HEADINGS = ("", "pass", "ms", "20-80 %", "GB/s", "% copy", "peak/grads", "x this")


def show(rows: Sequence[Row]) -> None:
    """The rows of one case as a table."""
    title = "{case}: {exits} exits {shape}, {dtype}, {layout}".format(**rows[0])
    lines = []
    for row in rows:
        if "ms" not in row:
            lines.append((row["method"], row["pass"], "-", *[""] * 5))
            continue
        spread = f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}"
        rest = [str(row.get(k, "")) for k in ("gb_per_s", "percent_of_copy", "peak_over_gradients", "x_over_this")]
        lines.append((row["method"], row["pass"], f"{row['ms']:.3f}", spread, *rest))
    notes = [f"  {row['method']} {row['pass']}: {row['note']}" for row in rows if row.get("note")]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(
            title, *("  ".join(f"{x:>16}" for x in line) for line in (HEADINGS, *lines)), *notes, sep="\n", flush=True
        )
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for line in lines:
        table.add_row(*line, style="bold" if line[0] == THIS else "")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    print(*notes, sep="\n", flush=True)


def main(arguments: Sequence[str] | None = None, device: str = "cuda") -> int:
    """Measures, prints and writes row by row; 1 if the fused loss failed anywhere."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every figure to this CSV file, as it comes")
    parser.add_argument("--quick", action="store_true", help="NCHW only, few rounds, no torch.compile")
    parser.add_argument("--seconds", type=float, default=240, help="no more cases after these (default: %(default)s)")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    if backends()["cuda"] != "available":
        print(f"nothing to measure, cuda: {backends()['cuda']}")
        return 1

    chosen = [case for case in cases() if not args.quick or case.layout == "contiguous"]
    rounds = 5 if args.quick else 20
    # The main case with all its peers, then the rest; torch.compile takes long, and comes last as far as time allows.
    main_case = [case for case in chosen if case.name == "objective" and case.dtype != "float16"]
    rest = [case for case in chosen if case not in main_case]
    passes = (False,) if args.quick else (False, True)
    work = [(case, compiled) for part in (main_case, rest) for compiled in passes for case in part]
    common, failed = setting(device), False
    file = None
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        file = args.out.open("w", newline="")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
    for case, compiled in work:
        if time.monotonic() > end:
            methods = [COMPILED] if compiled else [*losses_of(case), GRAPH]
            rows = [describe(case, method, BOTH) | {"note": "skipped: out of time"} for method in methods]
        else:
            try:
                rows = (
                    measure_compiled(case, rounds, device)
                    if compiled
                    else measure(case, losses_of(case), rounds, device)
                )
            except Exception as error:  # of the inputs, say
                rows = [describe(case, COMPILED if compiled else THIS, BOTH) | {"note": say(error)}]
            torch.cuda.empty_cache()
            show(rows)
        failed |= any(row["method"] == THIS and ("ms" not in row or row.get("note")) for row in rows)
        if file:
            writer.writerows(common | row for row in rows)
            file.flush()
    if file:
        file.close()
        print(f"wrote {args.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
