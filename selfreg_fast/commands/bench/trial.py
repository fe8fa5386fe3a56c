"""One case measured: every peer's time in turns, its peak memory, and what follows from both: the records."""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..measure import (
    KEPT,
    Timing,
    cache_bytes,
    copying,
    device_peak_bytes,
    exponentials,
    in_fresh_process,
    peak_bytes,
    sample_seconds,
)
from . import enqueue
from .cases import DTYPES, FUSED, LIGER, REFERENCE, Case
from .peers import ANOTHER_VALUE, IGNORE, CannotRun, Peer, build

Record = dict[str, Any]  # one line of the CSV file: a peer in a case

MOST_SETS = 64
PHASES = ("prepare", "forward", "backward", "both")  # what is prepared is part of the forward
COLUMNS = (
    "suite case terms exits shape size dtype layout autocast temperature axis at peer".split()
    + [f"{phase}_ms{suffix}" for phase in PHASES for suffix in ("", "_p20", "_p80")]
    + "kept_ms times_fused bytes_to_move gb_per_s copy_gb_per_s percent_of_copy".split()
    + "exponentials gexp_per_s exp_gexp_per_s percent_of_exp limit percent_of_limit".split()
    + "gradient_bytes peak_bytes peak_over_gradients launches host_us replay_ms loss note".split()
)


class Trial:
    """A training step's part of one peer, on inputs that rotate so that none is still in the caches."""

    def __init__(self, peer: Peer, case: Case, inputs: Iterator[list[Tensor]], labels: Tensor) -> None:
        self.peer, self.inputs, self.labels = peer, inputs, labels
        self.exits: list[Tensor] = next(inputs)
        self.cast = contextlib.nullcontext
        if case.half:
            self.cast = lambda: torch.autocast(labels.device.type, DTYPES[case.dtype])  # type: ignore[assignment]

    def prepare(self) -> None:
        self.prepared = self.peer.prepare(self.exits)

    def forward(self) -> None:
        with self.cast():
            self.value = self.peer.loss(self.prepared, self.labels)

    def backward(self) -> None:
        torch.autograd.backward(self.value)
        self.value = self.value.detach()  # no graph outlives its step, or it could not be captured by another

    def finish(self) -> None:
        """Frees the gradients, so that the next ones are allocated afresh; takes the next inputs."""
        del self.prepared
        for z in self.exits:
            z.grad = None
        self.exits = next(self.inputs)

    def run(self) -> None:
        self.prepare()
        self.forward()
        self.backward()
        self.finish()


def sets_of_inputs(case: Case, device: str) -> int:
    """As many as fill the caches; of tiny ones not as many, for their time is not memory's."""
    return min(max(2, math.ceil(cache_bytes(device) / (case.exits * case.exit_bytes))), MOST_SETS)


def make_inputs(case: Case, device: str, sets: int) -> tuple[list[list[Tensor]], Tensor]:
    """Exits, and as many copies as it takes to make `sets`, and labels of which one in twenty is ignored."""
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    first = [
        torch.randn(case.shape, generator=generator, device=device)
        .mul_(3)
        .to(DTYPES[case.dtype])
        .contiguous(memory_format=layout)
        for _ in range(case.exits)
    ]
    made = [first, *([z.clone() for z in first] for _ in range(sets - 1))]
    for exits in made:
        for i in case.learners:
            exits[i].requires_grad_()
    labels = torch.randint(case.shape[1], (case.shape[0], *case.output), generator=generator, device=device)
    labels[torch.rand(labels.shape, generator=generator, device=device) < 0.05] = IGNORE
    return made, labels


def measure(case: Case, device: str, repeats: int, advance: Callable[[], object] = lambda: None) -> list[Record]:
    """Times and peaks of every peer of one case. A peer that fails is a record with a note and no figures.

    Args:
        case: what.
        device: "cpu" or "cuda".
        repeats: rounds in which all peers take turns.
        advance: called now and then, `steps(case, repeats)` times if no peer fails.
    """
    sets = sets_of_inputs(case, device)
    made, labels = make_inputs(case, device, sets)
    records = {name: describe(case, name) for name in case.peers}
    with torch.no_grad():
        expected = build(REFERENCE, case, device).loss(made[0], labels).item()
    trials = {}
    for name, record in records.items():
        try:
            peer = build(name, case, device)
            trial = Trial(peer, case, itertools.repeat(made[0]), labels)
            trial.run()  # compiles, too
        except CannotRun as why:
            record["note"] = f"does not run: {why}"
        except Exception as error:  # out of memory, no compiler, ...: the others go on
            record["note"] = f"failed: {say(error)}"
        else:
            record["loss"] = trial.value.item()
            del trial
            trials[name] = Trial(peer, case, itertools.cycle(made), labels)
        advance()
    if device == "cuda":
        peaks: dict[str, int | None] = {name: device_peak_bytes(trial.run) for name, trial in trials.items()}
    else:
        # A fresh process has a heap without free lists.
        peaks = in_fresh_process(measure_peaks, case, list(trials))
    advance()

    kept: dict[str, float] = {}
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        # Those that compile would have to once more.
        names = [name for name in trials if "compiled" not in name]
        kept = in_fresh_process(measure_kept, case, names, repeats, torch.get_num_threads(), malloc=KEPT)
    advance()

    limits = {"copy": copying(device), "exp": exponentials(device)}
    steps = {name: [t.prepare, t.forward, t.backward, t.finish] for name, t in trials.items()}
    samples = sample_seconds({**{n: [x.function] for n, x in limits.items()}, **steps}, repeats, device, advance)
    # By the fastest round: what the machine can do, whatever else it did in the others.
    rates = {name: limit.amount / min(samples.pop(name)[0]) for name, limit in limits.items()}
    step_seconds = {name: [sum(step) for step in zip(*sample[:3], strict=True)] for name, sample in samples.items()}
    for name, (prepare, forward, backward, _) in samples.items():
        record, both = records[name], step_seconds[name]
        forward = [p + f for p, f in zip(prepare, forward, strict=True)]
        for phase, seconds in zip(PHASES, (prepare, forward, backward, both), strict=True):
            record |= milliseconds(phase, seconds)
        if name in kept:
            record["kept_ms"] = round(1e3 * kept[name], 4)
        if FUSED in step_seconds:
            ratios = [theirs / fused for theirs, fused in zip(both, step_seconds[FUSED], strict=True)]
            record["times_fused"] = round(statistics.median(ratios), 3)
        record |= speeds(case, statistics.median(both), rates["copy"], rates["exp"])
        if (peak := peaks[name]) is not None:
            record |= {"peak_bytes": peak, "peak_over_gradients": round(peak / case.gradient_bytes, 3)}
        record["note"] = remark(record, expected)
        if device == "cuda" and "compiled" not in name:  # a compiled one may have graphs of its own
            try:  # what fails here leaves the times
                record["launches"] = enqueue.launches(trials[name])
                record["host_us"] = round(1e6 * enqueue.host_seconds(trials[name]), 1)
                record["replay_ms"] = round(1e3 * enqueue.replay_seconds(trials[name], sets), 4)
            except Exception as error:
                record["note"] = f"failed beside its times: {say(error)}"
    return list(records.values())


def steps(case: Case, repeats: int) -> int:
    """How often :func:`measure` calls `advance`."""
    return len(case.peers) + 2 + (len(case.peers) + 2) * (repeats + 1)


def measure_peaks(case: Sequence[Any], names: Sequence[str]) -> dict[str, int | None]:
    """On the CPU, peak memory of one step of each named peer above the inputs; meant for a fresh process."""
    case = Case(*case)
    made, labels = make_inputs(case, "cpu", 1)
    peaks = {}
    for name in names:
        trial = Trial(build(name, case, "cpu"), case, itertools.cycle(made), labels)
        trial.run()
        peaks[name] = peak_bytes(trial.run)
    return peaks


def measure_kept(case: Sequence[Any], names: Sequence[str], repeats: int, threads: int) -> dict[str, float]:
    """On the CPU, seconds of a step of each named peer; meant for a fresh process whose malloc keeps what is freed."""
    case = Case(*case)
    torch.set_num_threads(threads)
    made, labels = make_inputs(case, "cpu", sets_of_inputs(case, "cpu"))
    trials = {name: Trial(build(name, case, "cpu"), case, itertools.cycle(made), labels) for name in names}
    steps = {name: [t.prepare, t.forward, t.backward, t.finish] for name, t in trials.items()}
    samples = sample_seconds(steps, repeats, "cpu")
    return {name: statistics.median(map(sum, zip(*sample[:3], strict=True))) for name, sample in samples.items()}


def describe(case: Case, peer: str) -> Record:
    """What is known before anything is measured, with None for the rest."""
    return {
        **dict.fromkeys(COLUMNS),
        "case": case.name,
        "terms": case.terms,
        "exits": case.exits,
        "shape": "x".join(map(str, case.shape)),
        "size": "x".join(map(str, case.output)),
        "dtype": case.dtype,
        "layout": case.layout,
        "autocast": case.half,
        "temperature": case.temperature,
        "axis": case.axis,
        "at": case.position[case.axis] if case.axis else None,
        "peer": peer,
        "bytes_to_move": case.bytes_to_move,
        "exponentials": case.exponentials,
        "gradient_bytes": case.gradient_bytes,
        "note": "",
    }


def milliseconds(phase: str, seconds: Sequence[float]) -> Record:
    timing = Timing.of(seconds)
    return {
        f"{phase}_ms": round(1e3 * timing.median, 4),
        f"{phase}_ms_p20": round(1e3 * timing.low, 4),
        f"{phase}_ms_p80": round(1e3 * timing.high, 4),
    }


def speeds(case: Case, seconds: float, copied: float, exponentiated: float) -> Record:
    """A step against the two limits, given per second: the bytes that are copied, the exponentials computed.

    The limit of a case is the one that alone would take longer.
    """
    by_copy, by_exp = case.bytes_to_move / copied, case.exponentials / exponentiated
    return {
        "gb_per_s": round(case.bytes_to_move / seconds / 1e9, 3),
        "copy_gb_per_s": round(copied / 1e9, 3),
        "percent_of_copy": round(100 * by_copy / seconds, 1),
        "gexp_per_s": round(case.exponentials / seconds / 1e9, 3),
        "exp_gexp_per_s": round(exponentiated / 1e9, 3),
        "percent_of_exp": round(100 * by_exp / seconds, 1),
        "limit": "copy" if by_copy > by_exp else "exp",
        "percent_of_limit": round(100 * max(by_copy, by_exp) / seconds, 1),
    }


def remark(record: Record, expected: float) -> str:
    """What a reader must know of a peer that has run: above all, that its loss is another."""
    if record["peer"] == LIGER and record["layout"] == "contiguous":
        return f"{record['prepare_ms']:.2f} ms of its forward are permuted copies"
    if record["peer"] in ANOTHER_VALUE or math.isclose(record["loss"], expected, rel_tol=1e-2):
        return ""
    return f"another loss: {record['loss']:.5g}, the reference's is {expected:.5g}"


def say(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]
