"""`selfreg-fast gradcheck`: every loss's gradient against finite differences in float64, on every available backend."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, reference
from ..backends import AVAILABLE, NAMES, backends, device_of
from ..reference import SelfRegulationOutput

STEP = 1e-5  # of the central differences: they err by about 1e-10
TOLERANCE = 1e-7  # against central differences, relative to the gradient's largest element
REFERENCE_TOLERANCE = 1e-11  # against the gradient that autograd finds for the reference

N, C, IGNORE = 3, 3, 255
OUTPUT = (1, 3)  # (H, W); batches of 2
SIZES = [(2, 2), (1, 3), (1, 2)]  # of exits that are resized to it

Options = dict[str, Any]
Call = Callable[..., Any]  # call(name of a public loss, *arguments, **options)
Loss = Callable[[Call, Sequence[Tensor]], Tensor]
HeldLoss = Callable[[Call, Sequence[Tensor], Sequence[Tensor]], Tensor]


class Case(NamedTuple):
    """A loss of `inputs` under some options."""

    name: str
    options: str
    inputs: list[Tensor]
    loss: Loss
    # A loss with detached teachers is not the function whose gradient it returns: moving a teacher moves the loss.
    # That function is `held(call, inputs, teachers)`, which takes the teachers from a second list, held constant.
    held: HeldLoss | None


class Outcome(NamedTuple):
    """Errors of a gradient relative to its largest element, and whether all is well."""

    numeric: float
    reference: float
    passed: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--backends", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)} (default: all available)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="take the differences along one random direction, not for each element: the same losses and options in a "
        "fraction of the time",
    )


def run(args: argparse.Namespace) -> int:
    """Checks and prints a table; 1 if any check fails, 2 if a backend asked for is not available."""
    from rich import box  # here, so that --help works without it
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    state = backends()
    chosen = args.backends or [name for name in NAMES if state[name] == AVAILABLE]
    for name in chosen:
        if state[name] != AVAILABLE:
            print(f"selfreg-fast gradcheck: {name}: {state[name]}", file=sys.stderr)
            return 2
    table = Table(
        title="Gradients in float64",
        caption="The largest error of a gradient, relative to its largest element: against central differences of the "
        f"loss{', along one direction' * args.quick} (at most {TOLERANCE:g}), and against autograd through the "
        f"reference (at most {REFERENCE_TOLERANCE:g}). "
        'Check "held": the differences are of the loss with its detached teachers held constant; otherwise '
        "torch.autograd.gradcheck must pass, too.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for heading in ("loss", "options", "check"):
        table.add_column(heading)
    for name in chosen:
        table.add_column(name if name == "reference" else f"{name}\nnumeric, reference", no_wrap=True)
    checked = list(cases())
    failed = 0
    bar = Console(stderr=True)
    for case in track(checked, "checking", console=bar, transient=True, disable=not bar.is_terminal):
        cells = []
        for name in chosen:
            with _one_thread():
                outcome = check(case, name, args.quick)
            failed += not outcome.passed
            verdict = "[green]PASS[/]" if outcome.passed else "[bold red]FAIL[/]"
            beside = "" if name == "reference" else f" {outcome.reference:.0e}"
            cells.append(f"{verdict} {outcome.numeric:.0e}{beside}")
        table.add_row(case.name, case.options, "numeric" if case.held is None else "held", *cells)
    console.print(table)
    console.print(f"{len(checked)} gradients on {', '.join(chosen)}: {failed or 'none'} failed")
    return int(failed > 0)


def check(case: Case, backend: str, quick: bool = False) -> Outcome:
    """Compares one gradient on one backend, in every element or (quick) along one random direction."""
    device = device_of(backend)
    fixed = [z.to(device) for z in case.inputs]
    learning = [z.clone().requires_grad_() for z in fixed]

    def call(name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(functional, name)(*_to(device, arguments), **_to(device, options), backend=backend)

    def specification(name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(reference, name)(*_to(device, arguments), **_to(device, options))

    def numeric_loss(x: Sequence[Tensor]) -> Tensor:
        return case.loss(call, x) if case.held is None else case.held(call, x, fixed)

    output = case.loss(call, learning)
    cotangent = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=device).view_as(output)
    found = _gradient(output, learning, cotangent)
    specified = case.loss(specification, learning)
    expected = _gradient(specified, learning, cotangent)
    directions = torch.eye(len(found), dtype=found.dtype)
    if quick:
        generator = torch.Generator().manual_seed(0)
        directions = F.normalize(torch.randn(1, len(found), generator=generator, dtype=found.dtype))
    directions = directions.to(device)
    numeric = _central_differences(lambda x: float((numeric_loss(x) * cotangent).sum()), fixed, directions)

    scale = float(expected.abs().max())
    numeric_error = float((directions @ found - numeric).abs().max()) / scale
    reference_error = float((found - expected).abs().max()) / scale
    same_values = all(
        torch.allclose(output, value, rtol=REFERENCE_TOLERANCE, atol=1e-14)
        for value in (specified, numeric_loss(fixed))
    )
    passed = same_values and numeric_error <= TOLERANCE and reference_error <= REFERENCE_TOLERANCE
    if passed and case.held is None:
        # What it looks at beyond the above: that a second backward gives the same, and outputs left unused.
        passed = torch.autograd.gradcheck(
            lambda *x: case.loss(call, x), tuple(learning), eps=STEP, fast_mode=True, raise_exception=False
        )
    return Outcome(numeric_error, reference_error, passed)


def cases() -> Iterator[Case]:
    """Every loss under every option, on tiny inputs."""
    soft_options: list[Options] = [
        {"temperature": tau, "renormalize": renormalize, "detach_teacher": detach}
        for renormalize, tau, detach in itertools.product((False, True), (0.5, 1.0, 2.0, 2.7), (True, False))
    ]
    soft_options.append({"target": "argmax"})
    pixel_weight = torch.tensor([[[0.5, 2.0, 0.0]], [[1.0, 0.0, 1.5]]], dtype=torch.float64)
    class_weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    map_options: list[Options] = [
        {"reduction": "sum"},
        {"reduction": "none"},
        {"pixel_weight": pixel_weight},
        {"pixel_weight": pixel_weight, "reduction": "sum"},
        {"pixel_weight": pixel_weight, "reduction": "none"},
        {"size": OUTPUT, "align_corners": False},
        {"size": OUTPUT, "align_corners": True},
    ]
    label_options: list[Options] = [
        {"class_weight": class_weight},
        {"label_smoothing": 0.1},
        {"class_weight": class_weight, "label_smoothing": 0.1},
        *({"class_weight": class_weight, "label_smoothing": 0.1, **options} for options in map_options),
    ]
    raw: Options = {"temperature": 2.0}

    for options in [*soft_options, *({**raw, **options} for options in map_options)]:
        yield _sr_f(options)
        yield _sr_l(options)
    for options in [{}, {"exit_weights": [0.5, 1.0, 2.0]}, *map_options, *label_options]:
        yield _mea(options)
    mixed = {**raw, "label_smoothing": 0.1, "class_weight": class_weight}
    for options in [*soft_options, *({**raw, **options} for options in [*map_options, *label_options])]:
        yield _objective(options, "total")
    for part in ("mea", "sr_f", "sr_l", "total + parts"):
        yield _objective(mixed, part)
        yield _objective({**mixed, "renormalize": True, "detach_teacher": False}, part)
    for inputs, detach in itertools.product(("features", "image_logits"), (True, False)):
        yield _objective({**mixed, "detach_teacher": detach}, "total", inputs)
    for options in [*soft_options, *({**raw, **options} for options in [*map_options, *label_options])]:
        yield _matrix(options)
    for options in map_options:
        yield _matrix({**mixed, **options, "mask_soft": True})


def _sr_f(options: Options) -> Case:
    def loss(call: Call, x: Sequence[Tensor]) -> Tensor:
        return call("sr_f_loss", x, **options)  # type: ignore[no-any-return]

    def held(call: Call, x: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        return loss(call, [teachers[0], *x[1:]])

    return Case("sr_f_loss", _describe(options), _exits(options), loss, held if _detached(options) else None)


def _sr_l(options: Options) -> Case:
    def loss(call: Call, x: Sequence[Tensor]) -> Tensor:
        return call("sr_l_loss", x, **options)  # type: ignore[no-any-return]

    def held(call: Call, x: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        return loss(call, [*x[:-1], teachers[-1]])

    return Case("sr_l_loss", _describe(options), _exits(options), loss, held if _detached(options) else None)


def _mea(options: Options) -> Case:
    def loss(call: Call, x: Sequence[Tensor]) -> Tensor:
        return call("mea_loss", x, _labels(), **options)  # type: ignore[no-any-return]

    return Case("mea_loss", _describe(options), _exits(options), loss, None)


def _objective(options: Options, part: str, more: str = "") -> Case:
    """self_regulation_loss: one of its outputs, or all; `more` names further inputs, which follow the logits in x."""
    weights = {"mea_weight": 0.7, "sr_f_weight": 1.3, "sr_l_weight": 0.6, "seg_weight": 0.8}
    inputs = _exits(options)
    if more == "features":
        inputs += _exits(options, seed=1)
    elif more == "image_logits":
        inputs += [z.mean((2, 3)) for z in _exits(options, seed=1)]

    def choose(output: SelfRegulationOutput) -> Tensor:
        if part == "total + parts":
            return output.total + 0.3 * output.mea + 0.5 * output.sr_f + 0.8 * output.sr_l
        return getattr(output, part)  # type: ignore[no-any-return]

    def loss(call: Call, x: Sequence[Tensor]) -> Tensor:
        further = {more: x[N:]} if more else {}
        return choose(call("self_regulation_loss", x[:N], _labels(), **weights, **further, **options))

    def held(call: Call, x: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        hard = {k: v for k, v in options.items() if k in _HARD or k in _MAPS}
        soft = {k: v for k, v in options.items() if k in _SOFT or k in _MAPS}
        students = x[N:] if more == "features" else x[:N]
        first = teachers[N] if more == "features" else teachers[0]
        mea = 0.8 * call("mea_loss", x[:N], _labels(), **hard)
        if more == "image_logits":
            presence = reference.presence_vector(_labels(), C).to(x[0].device)
            mea = mea + 0.2 * reference.presence_loss(x[N:], presence)
        sr_f = call("sr_f_loss", [first, *students[1:]], **soft)
        sr_l = call("sr_l_loss", [*x[: N - 1], teachers[N - 1]], **soft)
        return choose(SelfRegulationOutput(0.7 * mea + 1.3 * sr_f + 0.6 * sr_l, mea, sr_f, sr_l))

    name = f"self_regulation_loss: {part}{more and ', ' + more}"
    return Case(name, _describe(options), inputs, loss, held if _detached(options) else None)


def _matrix(options: Options) -> Case:
    """exit_loss_matrix, with labels, every exit a teacher."""

    def loss(call: Call, x: Sequence[Tensor]) -> Tensor:
        return call("exit_loss_matrix", x, _labels(), teachers=list(range(N)), **options)  # type: ignore[no-any-return]

    def held(call: Call, x: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        losses = call("exit_loss_matrix", [*x, *teachers], _labels(), teachers=list(range(N, 2 * N)), **options)[:, :N]
        nobody = torch.cat([torch.zeros(1, N), torch.eye(N)]).bool().to(losses.device)  # teaches itself
        return losses.masked_fill(nobody.view(N + 1, N, *[1] * (losses.dim() - 2)), 0)  # type: ignore[no-any-return]

    return Case("exit_loss_matrix", _describe(options), _exits(options), loss, held if _detached(options) else None)


_SOFT = {"temperature", "renormalize", "target", "detach_teacher"}
_HARD = {"class_weight", "label_smoothing", "exit_weights"}
_MAPS = {"size", "align_corners", "pixel_weight", "reduction"}


def _exits(options: Options, seed: int = 0) -> list[Tensor]:
    """N exits, of different sizes where the options have an output size.

    No two channels are closer than a thousand steps, so that no argmax changes from a step.
    """
    generator = torch.Generator().manual_seed(seed)
    exits = []
    for size in SIZES if "size" in options else [OUTPUT] * N:
        order = torch.rand(2, C, *size, generator=generator).argsort(1)
        noise = torch.rand(2, C, *size, generator=generator, dtype=torch.float64)
        exits.append(1.5 * order + 1.4 * noise - 2)
    return exits


def _labels() -> Tensor:
    return torch.tensor([[[0, 2, 1]], [[IGNORE, 1, 1]]])


def _detached(options: Options) -> bool:
    return bool(options.get("detach_teacher", True))


def _describe(options: Options) -> str:
    """The options in a few words; defaults are not mentioned."""
    words = []
    if "target" in options:
        words.append("argmax")
    elif "temperature" in options:
        words.append(f"{'renormalised' if options.get('renormalize') else 'raw'} tau={options['temperature']:g}")
    if not _detached(options):
        words.append("teacher learns")
    words += [name.replace("_", " ") for name in ("class_weight", "pixel_weight", "exit_weights") if name in options]
    words += [name.replace("_", " ") for name in ("label_smoothing", "mask_soft") if options.get(name)]
    if "size" in options:
        words.append(f"resized{', corners aligned' * options['align_corners']}")
    if "reduction" in options:
        words.append(options["reduction"])
    return ", ".join(words)


def _to(device: str, value: Any) -> Any:
    """Tensors in arguments and options, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(device, item) for key, item in value.items()}
    return type(value)(_to(device, item) for item in value) if isinstance(value, (list, tuple)) else value


@contextmanager
def _one_thread() -> Iterator[None]:
    """On such tiny inputs further threads only spin, which takes minutes where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gradient(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> Tensor:
    """That of (output * cotangent).sum(), for all inputs, end to end; 0 for an input without part in it."""
    gradients = torch.autograd.grad(output, inputs, cotangent, allow_unused=True)
    parts = [torch.zeros_like(z) if g is None else g for z, g in zip(inputs, gradients, strict=True)]
    return torch.cat([g.flatten() for g in parts])


@torch.no_grad()
def _central_differences(
    function: Callable[[Sequence[Tensor]], float], inputs: Sequence[Tensor], directions: Tensor
) -> Tensor:
    """The slopes (K,) of a function along directions (K, n) in the space of all inputs, end to end."""

    def moved(step: Tensor) -> list[Tensor]:
        parts = torch.split(step, [z.numel() for z in inputs])
        return [z + part.view_as(z) for z, part in zip(inputs, parts, strict=True)]

    steps = [STEP * direction for direction in directions]
    slopes = [(function(moved(step)) - function(moved(-step))) / (2 * STEP) for step in steps]
    return torch.tensor(slopes, dtype=inputs[0].dtype, device=inputs[0].device)
