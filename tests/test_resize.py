"""Exits of other sizes than the output's, where the kernels interpolate: what F.interpolate and the loss would give."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    RELATIVE,
    Backend,
    assert_close,
    generator,
    in_double,
    make_exits,
    make_labels,
    make_pixel_weight,
    smallest,
    value_and_gradients,
)

import selfreg_fast as srf
from selfreg_fast import reference

# Exits on which an output's rows and columns lie in every way: enlarged by whole numbers and others, the same in one
# dimension, of one pixel, reduced by a little and by much; outputs of one pixel, one row, one column, of many tiles.
SIZES: dict[str, tuple[list[tuple[int, int]], tuple[int, int]]] = {
    "eight_times": ([(9, 17), (9, 17)], (72, 136)),
    "odd": ([(41, 23), (5, 7)], (83, 140)),
    "one_dimension": ([(40, 9), (3, 150), (40, 150)], (40, 150)),
    "one_pixel": ([(1, 1), (2, 1), (1, 3)], (65, 131)),
    "reduced": ([(50, 301), (21, 260)], (20, 129)),
    "much_reduced": ([(200, 130), (90, 7)], (9, 11)),
    "to_one_pixel": ([(5, 4), (1, 3)], (1, 1)),
    "to_one_row": ([(7, 6), (2, 20)], (1, 270)),
    "to_one_column": ([(7, 6), (200, 1)], (270, 1)),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TARGETS: dict[str, dict[str, Any]] = {
    "raw": {},
    "renormalised": {"renormalize": True, "label_smoothing": 0.1},
    "argmax": {"target": "argmax"},
    "learning": {"detach_teacher": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_every_ratio(
    backend: Backend, name: str, align_corners: bool, dtype: torch.dtype, threads: None, not_all: bool
) -> None:
    """Value and gradients, of layouts, targets and numbers of channels in turn."""
    sizes, size = SIZES[name]
    nth = list(SIZES).index(name)
    if not_all and (align_corners, dtype) != (nth % 2 == 1, DTYPES[nth // 2 % len(DTYPES)]):
        pytest.skip("triton, interpreted: each ratio once")
    if dtype != torch.float64 and not backend.resizes(sizes, size):
        pytest.skip(f"{backend.name}: F.interpolate rounds positions, and of halves the logits")
    number = nth + 4 * align_corners + dtype.itemsize
    channels, layout = (3, 21, 1, 19)[number % 4], ("contiguous", "channels_last", "cropped")[number % 3]
    exits = make_exits(len(sizes), (2, channels, *size), sizes=sizes, dtype=dtype, layout=layout, device=backend.device)
    kwargs: dict[str, Any] = list(TARGETS.values())[number // 2 % 4] | {
        "labels": make_labels((2, *size), channels, ignore_index=-1, device=backend.device),
        "ignore_index": -1,
        "teachers": (-1, 0),
        "temperature": 2.0,
        "size": size,
        "align_corners": align_corners,
    }
    if number % 2:
        kwargs["pixel_weight"] = make_pixel_weight((2, *size), device=backend.device)
    factor = 2 * math.prod(size)
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, **in_double(kwargs)), [z.double() for z in exits], "random", factor
    )
    torch.set_num_threads(2)  # bands are shared out
    actual = value_and_gradients(
        lambda e: srf.exit_loss_matrix(e, backend=backend.name, **kwargs), exits, "random", factor
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(actual[0], exact[0], RELATIVE[wide], smallest(wide), "value")
    for i, (a, e) in enumerate(zip(actual[1:], exact[1:], strict=True)):
        # Rounding where sigma - target cancels, of all the pixels that an element has part in.
        pixels = max(1, math.prod(size) / math.prod(sizes[i]))
        floor = smallest(dtype) + 64 * torch.finfo(wide).eps / channels * pixels
        assert_close(a, e, RELATIVE[dtype], floor, f"gradient of exit {i}")


# Exits none of which is larger than the output, for which there are kernels of their own; more than a block's columns.
SMALLER: dict[str, tuple[list[tuple[int, int]], tuple[int, int]]] = {
    "eighth": ([(4, 17), (4, 17), (4, 17)], (32, 136)),
    "pyramid": ([(20, 36), (10, 18), (5, 9)], (40, 72)),
    "quarter": ([(9, 34), (9, 34)], (36, 136)),
    "odd": ([(6, 20), (7, 9), (1, 20)], (41, 139)),
    "almost": ([(39, 70), (40, 69)], (40, 70)),
    "unet": ([(9, 34), (36, 136), (18, 68)], (36, 136)),
    "full on both sides": ([(36, 139), (6, 20), (36, 139)], (36, 139)),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "labels": {"teachers": ()},
    "tau 2": {"teachers": (0, -1), "temperature": 2.0},
    "tau 1": {"teachers": (-1,), "temperature": 1.0, "mask_soft": True},
    "tau 3": {"teachers": (0,), "temperature": 3.0},
    "tau 0.4": {"teachers": (0,), "temperature": 0.4},
    "tau 0.6, soft alone": {"teachers": (-1, 0), "temperature": 0.6},
    "renormalised, soft alone": {"teachers": (0, 1), "temperature": 2.0, "renormalize": True},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", SMALLER)
def test_smaller_exits(backend: Backend, name: str, objective: str, threads: None, not_all: bool) -> None:
    """What takes no rare option, of all numbers of channels in turn, with a class nowhere and pixels that do not count;
    of the exits, some learn or none does."""
    if not_all and list(SMALLER).index(name) != list(OBJECTIVES).index(objective) % len(SMALLER):
        pytest.skip("triton, interpreted: each objective once")
    if not backend.fused:
        pytest.skip("reference: F.interpolate rounds positions")
    sizes, size = SMALLER[name]
    number = list(SMALLER).index(name) + 2 * list(OBJECTIVES).index(objective)
    channels = (21, 5, 19, 8, 23, 22, 40, 16, 150, 2)[number % 10]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    layout = ("contiguous", "channels_last", "cropped")[number // 2 % 3]
    exits = make_exits(len(sizes), (2, channels, *size), sizes=sizes, dtype=dtype, layout=layout, device=backend.device)
    exits = [z + offset for z, offset in zip(exits, (50, -100, 0), strict=False)]
    kwargs: dict[str, Any] = OBJECTIVES[objective] | {"size": size, "align_corners": number % 4 == 3}
    if "alone" not in objective:
        kwargs["labels"] = make_labels((2, *size), max(1, channels - 1), ignore_index=-1, device=backend.device)
        kwargs["ignore_index"] = -1
    if number % 2:
        kwargs["pixel_weight"] = make_pixel_weight((2, *size), device=backend.device)
    factor = 2 * math.prod(size)
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, **in_double(kwargs)), [z.double() for z in exits], "random", factor
    )
    torch.set_num_threads(2)
    fused = partial(srf.exit_loss_matrix, backend=backend.name, **kwargs)
    actual = value_and_gradients(fused, exits, "random", factor)
    assert_close(actual[0], exact[0], RELATIVE[torch.float32], smallest(torch.float32), "value")
    for i, (a, e) in enumerate(zip(actual[1:], exact[1:], strict=True)):
        # Rounding where sigma - target cancels, of all the pixels that an element has part in.
        pixels = math.prod(size) / math.prod(sizes[i])
        floor = smallest(dtype) + 64 * torch.finfo(torch.float32).eps / channels * pixels
        assert_close(a, e, RELATIVE[dtype], floor, f"gradient of exit {i}")
    assert torch.equal(fused(exits), actual[0])  # none learns
    some = [z.detach().requires_grad_(i == 1) for i, z in enumerate(exits)]
    weights = torch.rand(actual[0].shape, generator=torch.Generator().manual_seed(0)).to(backend.device)
    (gradient,) = torch.autograd.grad((fused(some) * weights).sum(), some[1])
    every = [z.detach().requires_grad_() for z in exits]
    assert torch.equal(gradient, torch.autograd.grad((fused(every) * weights).sum(), every)[1])


def test_ties_of_an_argmax_stay_ties(backend: Backend) -> None:
    """Between whole numbers and weights of eighths nothing rounds: the first of equal channels is the target."""
    teacher = torch.randint(-3, 4, (2, 5, 5, 7), generator=generator(0)).float().to(backend.device)
    student = torch.randn(2, 5, 20, 28, generator=generator(1)).to(backend.device)
    kwargs: dict[str, Any] = {"teachers": (0,), "target": "argmax", "size": (20, 28), "reduction": "none"}
    exact = reference.exit_loss_matrix([teacher.double(), student.double()], **kwargs)
    actual = srf.exit_loss_matrix([teacher, student], backend=backend.name, **kwargs)
    assert_close(actual[1, 1], exact[1, 1], 1e-5)


@pytest.mark.parametrize("height", [20, 100, 240, 10_000])
@pytest.mark.parametrize(
    "options", [{"temperature": t} for t in (2.0, 4.0, 8.0)] + [{"temperature": 0.7, "renormalize": True}], ids=str
)
def test_peaks_of_other_channels(backend: Backend, height: float, options: dict[str, Any]) -> None:
    """Neighbouring positions that are sure, and of different channels: a pixel between them is far below both."""
    if not backend.fused:
        pytest.skip("reference: F.interpolate rounds positions")
    channels, (h, w), size = 4, (3, 5), (24, 40)
    exits = make_exits(3, (1, channels, h, w), device=backend.device)
    number = torch.arange(h)[:, None] + 2 * torch.arange(w)
    for e, z in enumerate(exits):
        z += height * F.one_hot((number + e) % channels, channels).movedim(-1, 0).to(z)
    kwargs: dict[str, Any] = {"teachers": (0, -1), "size": size} | options
    if "renormalize" not in options:
        kwargs["labels"] = make_labels((1, *size), channels, device=backend.device)
    factor = math.prod(size)
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, **kwargs), [z.double() for z in exits], "random", factor
    )
    actual = value_and_gradients(
        lambda e: srf.exit_loss_matrix(e, backend=backend.name, **kwargs), exits, "random", factor
    )
    # Interpolated logits are rounded in their own size.
    rounding = 8 * torch.finfo(torch.float32).eps * height
    assert_close(actual[0], exact[0], RELATIVE[torch.float32] + rounding, smallest(torch.float32), "value")
    for i, (a, e) in enumerate(zip(actual[1:], exact[1:], strict=True)):
        floor = rounding * factor / (h * w) / channels
        assert_close(a, e, RELATIVE[torch.float32] + rounding, floor, f"gradient of exit {i}")


def _enlarged_sum(exits: list[torch.Tensor], **how: Any) -> torch.Tensor:
    return sum(F.interpolate(z, mode="bilinear", **how).sum() for z in exits)


def test_larger_exits_need_no_other_kernels(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger by less and by more than two, both ways or one, beside a smaller one: without F.interpolate, and no tensor
    of the output's size is allocated, but for the few copies that Triton makes of gradients.

    Over borders of tiles, with the same bits each time, and 0 where no pixel of the output has part, but nowhere else.
    """
    if not backend.fused:
        pytest.skip("reference: F.interpolate is what it has")
    # The last ones are larger in one dimension and smaller in the other: the output is larger than each of them.
    large = ((20, 96), [(50, 7), (10, 200)]) if backend.interpreted else ((160, 480), [(400, 7), (20, 1000)])
    cases: list[tuple[tuple[int, int], list[tuple[int, int]], dict[str, Any]]] = [
        ((19, 12), [(30, 40), (25, 5), (9, 3)], {"dtype": torch.float64, "layout": "channels_last"}),
        ((12, 19), [(61, 30), (5, 23), (12, 50)], {"dtype": torch.bfloat16, "layout": "cropped"}),
        ((1, 5), [(3, 9), (4, 2), (1, 5)], {"dtype": torch.float64, "layout": "contiguous"}),
        (*large, {"dtype": torch.float32, "layout": "contiguous"}),
    ]
    for number, (size, sizes, how) in enumerate(cases):
        channels, align_corners = 3, number in (1, 2)
        exits = make_exits(len(sizes), (1, channels, *size), sizes=sizes, device=backend.device, **how)
        labels = make_labels((1, *size), channels, device=backend.device)
        kwargs: dict[str, Any] = {"size": size, "align_corners": align_corners}
        enlarged = partial(_enlarged_sum, **kwargs)
        touched = value_and_gradients(enlarged, [z.double() for z in exits])[1:]
        kwargs |= {"labels": labels, "temperature": 2.0, "detach_teacher": not align_corners}
        factor = math.prod(size)
        expected = partial(reference.self_regulation_loss, **kwargs)
        exact = value_and_gradients(lambda e, f=expected: f(e).total, [z.double() for z in exits], "random", factor)

        fused = partial(srf.self_regulation_loss, backend=backend.name, **kwargs)
        run = partial(value_and_gradients, lambda e, f=fused: f(e).total, exits, "random", factor)
        with monkeypatch.context() as patch:
            patch.setattr("torch.nn.functional.interpolate", None)
            with torch.profiler.profile(profile_memory=True) if sizes == large[1] else nullcontext() as profile:
                actual = run()
            again = actual if backend.interpreted else run()  # an interpreter has no other order
        if sizes == large[1]:
            most = max(max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in profile.events())
            copies = 4 * sum(math.prod(s) for s in sizes) if backend.name == "triton" else 0
            assert 0 < most < 4 * channels * (math.prod(size) + copies)
        wide = torch.float64 if how["dtype"] == torch.float64 else torch.float32
        assert_close(actual[0], exact[0], RELATIVE[wide], smallest(wide), "value")
        for i, (a, e, t) in enumerate(zip(actual[1:], exact[1:], touched, strict=True)):
            floor = smallest(how["dtype"]) + 64 * torch.finfo(wide).eps * max(1, math.prod(size) / math.prod(sizes[i]))
            assert_close(a, e, RELATIVE[how["dtype"]], floor, f"gradient of exit {i}")
            assert not a[t == 0].any() and a[e.abs() > floor].all(), f"gradient of exit {i}: where it is 0"
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("detach_teacher", [True, False])
@pytest.mark.parametrize("channels", [8, 24, 25, 33, 150, 300, 600])
def test_every_number_of_channels(backend: Backend, channels: int, detach_teacher: bool, not_all: bool) -> None:
    """Rows of channels that stay in registers, are spread over warps or read block by block; an exit of full size."""
    if not_all and (channels, detach_teacher) not in ((25, False), (150, True)):
        pytest.skip("triton, interpreted: one number that rows are held of, and one that they are not")
    if not backend.fused:
        pytest.skip("reference: F.interpolate rounds positions")
    size, sizes = (19, 37), [(5, 9), (19, 37), (1, 18)]
    exits = make_exits(3, (2, channels, *size), sizes=sizes, device=backend.device)
    labels = make_labels((2, *size), channels, ignore_index=-1, device=backend.device)
    kwargs: dict[str, Any] = {"teachers": (0, 1), "temperature": 2.0, "ignore_index": -1, "size": size}
    kwargs["detach_teacher"] = detach_teacher
    factor = 2 * math.prod(size)
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, labels, **kwargs), [z.double() for z in exits], "random", factor
    )
    actual = value_and_gradients(
        lambda e: srf.exit_loss_matrix(e, labels, backend=backend.name, **kwargs), exits, "random", factor
    )
    assert_close(actual[0], exact[0], RELATIVE[torch.float32], smallest(torch.float32), "value")
    for i, (a, e) in enumerate(zip(actual[1:], exact[1:], strict=True)):
        floor = 64 * torch.finfo(torch.float32).eps / channels * math.prod(size) / math.prod(sizes[i])
        assert_close(a, e, RELATIVE[torch.float32], floor, f"gradient of exit {i}")


def test_masked_classes_stay_masked(backend: Backend) -> None:
    """-inf in a class, in all or in part of an exit, is -inf at each pixel it has part in; nothing becomes NaN."""
    if not backend.fused:
        pytest.skip("reference: F.interpolate makes NaN of 0 * -inf")
    shape, size = (2, 5, 6, 8), (21, 40)
    exits = make_exits(2, shape, dtype=torch.float64, device=backend.device)
    labels = make_labels((2, *size), 3, device=backend.device)  # none of the masked classes
    masked = [z.clone() for z in exits]
    for z, value in ((masked, -math.inf), (exits, -1e4)):  # exp(-1e4 / 16) = 0, too
        for x in z:
            x[:, 3] = value
            x[:, 4, 2:5, :4] = value
    kwargs: dict[str, Any] = {"teachers": [0, 1], "temperature": 2.0, "size": size}
    exact = value_and_gradients(lambda e: reference.exit_loss_matrix(e, labels, **kwargs), exits)
    actual = value_and_gradients(lambda e: srf.exit_loss_matrix(e, labels, backend=backend.name, **kwargs), masked)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, 1e-12, 1e-15)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_only_uncounted_pixels_see_reaches_nothing(backend: Backend, poison: float) -> None:
    """NaN and inf in elements of an exit that no pixel that counts is interpolated from."""
    clean = make_exits(2, (1, 5, 4, 4), device=backend.device)
    labels = make_labels((1, 16, 16), 5, device=backend.device)
    labels[:, 8:, 8:] = 255
    dirty = [z.clone() for z in clean]
    for z in dirty:
        z[:, :, 3, 3] = poison  # of pixels from 10 on
    expected = value_and_gradients(lambda e: srf.mea_loss(e, labels, backend=backend.name), clean)
    actual = value_and_gradients(lambda e: srf.mea_loss(e, labels, backend=backend.name), dirty)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-6)
    assert all(not g[:, :, 3, 3].any() for g in actual[1:])


def test_the_lowest_number_masks_a_class(backend: Backend) -> None:
    """At some positions of an exit beside others; it is finite, but twice it, or its multiple, is not."""
    if not backend.fused:
        pytest.skip("reference: F.interpolate rounds positions")
    exits = make_exits(2, (1, 3, 2, 3), device=backend.device)
    for z in exits:
        z[0, 2, :, 1] = torch.finfo(torch.float32).min
    labels = make_labels((1, 16, 24), 2, device=backend.device)  # none of the masked class
    kwargs: dict[str, Any] = {"teachers": (), "size": (16, 24)}
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, labels, **kwargs), [z.double() for z in exits], "random", 384
    )
    actual = value_and_gradients(
        lambda e: srf.exit_loss_matrix(e, labels, backend=backend.name, **kwargs), exits, "random", 384
    )
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, RELATIVE[torch.float32], 1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_nan_that_counts_is_not_hidden(backend: Backend, weight: float) -> None:
    """One NaN in a small exit; even at a class of weight 0."""
    exits = make_exits(2, (1, 5, 4, 4), device=backend.device)
    exits[0][0, 2, 3, 3] = math.nan
    labels = torch.zeros(1, 16, 16, dtype=torch.int64, device=backend.device)
    class_weight = torch.ones(5, device=backend.device)
    class_weight[1] = weight
    labels[0, 10:, 10:] = 1  # all that the NaN has part in
    assert srf.mea_loss(exits, labels, class_weight=class_weight, backend=backend.name).isnan()


def test_constant_exits_of_huge_outputs(backend: Backend, threads: None) -> None:
    """More than 2^31 pixels: the loss of a constant is that of one pixel, and so is the sum of its gradient."""
    if backend.name != "cpu":
        pytest.skip(f"{backend.name}: would take minutes, or memory for all the pixels")
    logits = torch.tensor([[0.3, -1.2]], dtype=torch.float32)
    small = [(s * logits).view(1, 2, 1, 1) for s in (1.0, -0.5)]
    large = [z.expand(1, 2, 2, 3).contiguous() for z in small]
    size = (46_342, 46_342)  # 2^31 + 320,000
    torch.set_num_threads(2)
    expected = value_and_gradients(lambda e: reference.sr_l_loss(e, temperature=2.0), [z.double() for z in small])
    actual = value_and_gradients(lambda e: srf.sr_l_loss(e, temperature=2.0, size=size, backend="cpu"), large)
    assert_close(actual[0], expected[0], 1e-6)
    assert_close(actual[1].sum((2, 3)), expected[1].sum((2, 3)), 1e-4)


def test_scratch_memory_decides_nothing(backend: Backend) -> None:
    """The same bits whatever was in the memory that a launch takes for itself."""
    exits = make_exits(3, (1, 5, 16, 16), device=backend.device, sizes=[(8, 8), (40, 4), (45, 33)])
    labels = make_labels((1, 16, 16), 5, device=backend.device)

    def run(before: float) -> list[torch.Tensor]:
        for n in range(6, 20):
            torch.full((2**n,), before)
        return value_and_gradients(lambda e: srf.mea_loss(e, labels, backend=backend.name), exits)

    first = run(0.0)
    for before in (float("nan"), float("inf"), 0.0) * (1 if backend.interpreted else 10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(before), strict=True))


# ------------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [None, (3, 5, 4)])
def test_volumes_of_several_sizes(
    backend: Backend, size: tuple[int, ...] | None, align_corners: bool, dtype: torch.dtype
) -> None:
    """Deep supervision of (B, C, D, H, W): resized trilinearly to the labels' or a given size, as in float64."""
    output = size or (4, 6, 5)
    exits = [
        make_exits(1, (2, 3, *at), dtype=dtype, device=backend.device, seed=i)[0]
        for i, at in enumerate([(4, 6, 5), (2, 3, 3), (1, 6, 2)])
    ]
    labels = make_labels((2, *output), 3, device=backend.device)
    options = {"size": size, "align_corners": align_corners, "temperature": 2.0}
    weight = make_pixel_weight((2, *output), device=backend.device)

    def total(module: Any, e: list[torch.Tensor], w: torch.Tensor, **more: Any) -> torch.Tensor:
        out = module.self_regulation_loss(e, labels, features=e[1:], pixel_weight=w, **options, **more)
        return out.total

    given = value_and_gradients(lambda e: total(srf, e, weight, backend=backend.name), exits)
    exact = value_and_gradients(lambda e: total(reference, e, weight.double()), [z.double() for z in exits])
    assert_close(given[0], exact[0], RELATIVE[torch.float32 if dtype == torch.bfloat16 else dtype])
    for g, e, z in zip(given[1:], exact[1:], exits, strict=True):
        assert g.dtype == z.dtype and g.shape == z.shape
        assert_close(g, e, RELATIVE[dtype])


def test_volumes_without_labels_have_the_largest_size(backend: Backend) -> None:
    """A matrix of maps, at the size of the exit of most voxels."""
    exits = [make_exits(1, (2, 3, *at), device=backend.device)[0] for at in [(2, 3, 3), (4, 5, 6), (9, 2, 2)]]
    given = srf.exit_loss_matrix(exits, teachers=[1], reduction="none", backend=backend.name)
    assert given.shape == (2, 3, 2, 4, 5, 6)
    assert_close(given, reference.exit_loss_matrix([z.double() for z in exits], teachers=[1], reduction="none"), 1e-5)
