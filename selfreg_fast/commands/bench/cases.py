"""What is measured: shapes from the field by name, and the suites made of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

FUSED, TRITON, FUSED_SR_L = "fused", "fused, Triton", "fused SR-L"
WRITTEN, REFERENCE, TUNED = "as written", "reference", "tuned"
REFERENCE_COMPILED, TUNED_COMPILED = "reference, compiled", "tuned, compiled"
LIGER = "Liger KL"

PAIR = (FUSED, TUNED)
EAGER = (FUSED, TRITON, WRITTEN, TUNED)
# In the main cases only: the reference is the slowest of all, and compiling takes half a minute.
ALL = (*EAGER, REFERENCE, REFERENCE_COMPILED, TUNED_COMPILED, LIGER)

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (B, C, H, W) in training as it is published: Pascal VOC at two crop sizes, Cityscapes at half and full size, ADE20K,
# Pascal Context, and a backbone's features at stride 4 of a 321 crop.
SHAPES = {
    "voc-321": (8, 21, 321, 321),
    "voc-512": (8, 21, 512, 512),
    "cityscapes": (4, 19, 512, 1024),
    "cityscapes-full": (2, 19, 1024, 2048),
    "ade-512": (8, 150, 512, 512),
    "context": (8, 59, 480, 480),
    "features": (8, 256, 81, 81),
}
# On a CPU the slow peers would take minutes a step: 1 image, or as many as given here.
CPU_BATCH = {"voc-321": 2}


class Case(NamedTuple):
    """What is computed, on what, and by whom. A list from JSON makes the same case."""

    name: str
    terms: str  # "mea", "sr-f", "sr-l", or "objective" for MEA + SR-F + SR-L
    exits: int
    shape: tuple[int, int, int, int]  # (B, C, h, w) of each exit
    size: tuple[int, int] | None = None  # (H, W) to which they are resized
    peers: tuple[str, ...] = EAGER
    dtype: str = "float32"
    layout: str = "contiguous"
    temperature: float = 2.0
    axis: str = ""  # what a case of the suite `scaling` varies: a key of `position`

    @property
    def learners(self) -> range:
        """The exits that get a gradient: all but a teacher that learns from nobody."""
        return range(self.terms == "sr-f", self.exits - (self.terms == "sr-l"))

    @property
    def output(self) -> tuple[int, int]:
        """(H, W) of the losses."""
        return self.size or self.shape[2:]

    @property
    def labelled(self) -> bool:
        return self.terms in ("mea", "objective")

    @property
    def half(self) -> bool:
        """Halves are what a network yields under autocast, and there the loss is computed too."""
        return self.dtype in ("bfloat16", "float16")

    @property
    def output_elements(self) -> int:
        """Of an exit at output size."""
        return math.prod(self.shape[:2]) * math.prod(self.output)

    @property
    def exit_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def gradient_bytes(self) -> int:
        return len(self.learners) * self.exit_bytes

    @property
    def label_bytes(self) -> int:
        return 8 * self.shape[0] * math.prod(self.output) * self.labelled

    @property
    def bytes_to_move(self) -> int:
        """Each exit read once, each wanted gradient written once, the labels read once."""
        return self.exits * self.exit_bytes + self.gradient_bytes + self.label_bytes

    @property
    def exponentials(self) -> int:
        """At least one for each exit, channel and output pixel."""
        return self.exits * self.output_elements

    @property
    def position(self) -> dict[str, int]:
        """Where the case lies on each axis of the suite `scaling`."""
        batch, channels, height, width = self.shape
        return {
            "pixels": height * width,
            "channels": channels,
            "exits": self.exits,
            "batch": batch,
            "output": math.prod(self.output),
        }


def suites(device: str) -> dict[str, list[Case]]:
    """The suites for a "cpu" or for "cuda"; what matters less, or takes long for what it tells, comes last in each."""
    found = {
        "loss": _loss(device),
        "interpolate": _interpolate(device),
        "scaling": _scaling(device),
        "quick": _quick(),
        "acceptance": _acceptance(),
    }
    return {
        name: [case._replace(peers=tuple(peer for peer in case.peers if fits(peer, case, device))) for case in cases]
        for name, cases in found.items()
    }


def fits(peer: str, case: Case, device: str) -> bool:
    """Whether it is a peer of the case at all."""
    if peer == TRITON:
        return device == "cuda"
    if peer == LIGER:
        return case.terms == "sr-l" and case.size is None
    return not (peer in (TUNED, TUNED_COMPILED) and case.terms == "mea")  # PyTorch has that loss


def named(name: str, device: str) -> Case:
    """The case of that name, of float32 and contiguous: there is one for each name."""
    kind = (name, "float32", "contiguous")
    return next(c for cases in suites(device).values() for c in cases if (c.name, c.dtype, c.layout) == kind)


def _shape(name: str, device: str) -> tuple[int, int, int, int]:
    batch, channels, height, width = SHAPES[name]
    return (CPU_BATCH.get(name, 1) if device == "cpu" else batch), channels, height, width


def _loss(device: str) -> list[Case]:
    """Exits of the output's size: memory is the limit."""

    def case(terms: str, exits: int, shape: str, peers: tuple[str, ...] = EAGER) -> Case:
        return Case(f"{terms}-{shape}", terms, exits, _shape(shape, device), peers=peers)

    def in_kinds(base: Case, kinds: list[tuple[str, str]]) -> list[Case]:
        return [base._replace(dtype=dtype, layout=layout, peers=EAGER) for dtype, layout in kinds]

    nchw, nhwc = "contiguous", "channels_last"
    main = case("objective", 5, "voc-321", ALL)
    cityscapes, features = case("objective", 3, "cityscapes"), case("sr-f", 4, "features")
    found = [main, cityscapes, features, case("objective", 4, "context")]
    found += [case("objective", 2, "voc-512"), case("objective", 2, "cityscapes-full")]
    found += in_kinds(main, [("bfloat16", nchw), ("float16", nchw), ("float32", nhwc), ("bfloat16", nhwc)])
    found += in_kinds(main._replace(name="objective-voc-321-tau1", temperature=1.0), [("float32", nchw)])
    if device == "cuda":
        found += in_kinds(main, [("float16", nhwc)])
        for base in (cityscapes, features, case("sr-l", 2, "ade-512")):
            found += in_kinds(base, [("bfloat16", nchw), ("float32", nhwc), ("bfloat16", nhwc)])
    # These compile for long: last, so that where time is limited they are what is left out.
    return [*found, case("sr-l", 5, "voc-321", ALL), case("sr-l", 2, "ade-512", ALL), case("mea", 5, "voc-321", ALL)]


def _interpolate(device: str) -> list[Case]:
    """Exits of an eighth, or a quarter, of the output's height and width: exponentials are the limit."""

    def case(terms: str, exits: int, shape: str, own: tuple[int, int], peers: tuple[str, ...] = EAGER) -> Case:
        batch, channels, height, width = _shape(shape, device)
        return Case(f"{terms}-{shape}-resized", terms, exits, (batch, channels, *own), (height, width), peers)

    main = case("objective", 5, "voc-321", (41, 41), ALL)
    found = [main, case("mea", 3, "cityscapes", (64, 128), ALL), case("sr-l", 2, "ade-512", (128, 128))]
    found += [case("objective", 3, "cityscapes", (64, 128)), case("sr-l", 4, "context", (60, 60))]
    return [*found, main._replace(dtype="bfloat16", peers=EAGER)]


def _scaling(device: str) -> list[Case]:
    """One thing grows at a time, between sizes where a launch's fixed cost no longer shows."""
    b = 1 if device == "cpu" else 8

    def case(axis: str, exits: int, shape: tuple[int, int, int, int], size: tuple[int, int] | None = None) -> Case:
        found = Case(axis, "objective", exits, shape, size, PAIR, axis=axis)
        return found._replace(name=f"{axis}-{found.position[axis]}")

    found = [case("pixels", 3, (b, 21, n, n)) for n in (192, 272, 384, 544, 768)]
    found += [case("channels", 3, (b, c, 192, 192)) for c in (16, 32, 64, 128, 256)]
    found += [case("exits", n, (b, 21, 321, 321)) for n in (2, 3, 4, 5, 6)]
    found += [case("output", 3, (b, 21, 41, 41), (n, n)) for n in (121, 161, 241, 321, 481)]
    batches = [case("batch", 3, (n * b, 21, 192, 192))._replace(name=f"batch-times-{n}") for n in (1, 2, 4, 8)]
    return found + batches


def _quick() -> list[Case]:
    return [
        Case("quick-objective", "objective", 5, (1, 21, 321, 321), peers=(*EAGER, TUNED_COMPILED)),
        Case("quick-sr-l", "sr-l", 2, (1, 150, 128, 128), peers=(*EAGER, LIGER)),
        Case("quick-resized", "objective", 3, (1, 21, 41, 41), (321, 321)),
    ]


def _acceptance() -> list[Case]:
    """What the kernels for the CPU were first asked to be good at; of the same shapes on every device."""
    peers = (FUSED, WRITTEN, REFERENCE, TUNED, TUNED_COMPILED)
    return [
        Case("sr-l-voc", "sr-l", 5, (2, 21, 321, 321), peers=peers),
        Case("sr-l-ade", "sr-l", 2, (8, 150, 128, 128), peers=peers),
        Case("objective-voc", "objective", 5, (2, 21, 321, 321), peers=(*peers, FUSED_SR_L)),
        Case("sr-l-cityscapes", "sr-l", 3, (2, 19, 512, 1024), peers=peers),
        Case("resized-voc", "objective", 5, (8, 21, 41, 41), (321, 321), peers),
        Case("resized-cityscapes", "objective", 3, (1, 19, 64, 128), (512, 1024), peers),
    ]
