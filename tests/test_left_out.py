"""What does not count is left out, not multiplied by 0, which of an infinite number or NaN is NaN.

Class weights are often computed: 1 / frequency is inf for a class that no label has, 0 / 0 is NaN. With any such weight
results have the bits that they have with a harmless one, as long as no label that counts is of the class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import (
    Backend,
    assert_close,
    in_layout,
    leaves,
    make_exits,
    make_pixel_weight,
    pairwise,
    value_and_gradients,
)
from torch import Tensor

import selfreg_fast as srf
from selfreg_fast import reference

SIZE = (6, 11)
SIZES = {"same": [SIZE] * 2, "small": [(3, 5), (2, 6)], "mixed": [(4, 7), SIZE]}
SOFT: dict[str, dict[str, Any]] = {
    "labels": {},
    "teacher": {"teachers": (-1,), "temperature": 2.0},
    "masked": {"teachers": (0,), "mask_soft": True},
    "learns": {"teachers": (0, 1), "temperature": 2.0, "renormalize": True, "detach_teacher": False},
}
AXES: dict[str, list[Any]] = {
    "sizes": list(SIZES),
    "weight": [math.inf, math.nan],
    "situation": ["no label", "ignored", "pixels of weight 0"],
    "soft": list(SOFT),
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "channels": [3, 21, 150],
    "layout": ["contiguous", "channels_last"],
    "reduction": ["mean", "sum", "none"],
}
CASES = pairwise(AXES, lambda case: True)


def _name(case: dict[str, Any]) -> str:
    return "-".join(str(v).replace("torch.", "").replace(" ", "_") for v in case.values())


def _arguments(
    situation: str, channels: int, device: str, size: tuple[int, int] = SIZE
) -> tuple[dict[str, Any], Tensor, int]:
    """Labels and what belongs to them; which pixels count for the labels; a class that none of these has."""
    labels = torch.randint(0, channels - 1, (2, *size), generator=torch.Generator().manual_seed(1))
    ignored = {"labels": labels, "ignore_index": 0 if situation == "ignored" else 255}
    if situation == "ignored":  # and it reads as a class
        counts, without = labels != 0, 0
    elif situation == "no label":
        labels[:, 1:3] = 255
        counts, without = labels != 255, channels - 1
    else:
        ignored["pixel_weight"] = make_pixel_weight((2, *size), device=device)
        counts, without = (ignored["pixel_weight"] != 0).cpu(), 0
        labels[counts & (labels == 0)] = 1
    ignored["labels"] = labels.to(device)
    return ignored, counts.to(device), without


def _class_weight(channels: int, without: int, weight: float, device: str) -> Tensor:
    weights = torch.linspace(0.5, 1.5, channels)
    weights[without] = weight
    return weights.to(device)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_a_weight_of_a_class_that_does_not_count(backend: Backend, case: dict[str, Any]) -> None:
    """The matrix and its gradients, in every kind of kernel."""
    channels, device = case["channels"], backend.device
    kwargs, _, without = _arguments(case["situation"], channels, device)
    kwargs |= SOFT[case["soft"]] | {"reduction": case["reduction"], "size": SIZE, "backend": backend.name}
    exits = make_exits(2, (2, channels, *SIZE), sizes=SIZES[case["sizes"]], dtype=case["dtype"], device=device)
    exits = [in_layout(z, case["layout"]) for z in exits]

    def run(weight: float) -> list[Tensor]:
        class_weight = _class_weight(channels, without, weight, device)
        return value_and_gradients(
            lambda e: srf.exit_loss_matrix(e, class_weight=class_weight, **kwargs), exits, "random"
        )

    for actual, expected in zip(run(case["weight"]), run(0.7), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_cross_entropy_has_it(backend: Backend, reduction: str) -> None:
    """Both weights at once, of classes without labels; as torch.nn.functional says in float64."""
    (z,), labels = make_exits(1, (2, 5, *SIZE), device=backend.device), torch.zeros(2, *SIZE, dtype=torch.int64)
    labels[:, 2:], labels[1, 1] = 3, 255
    labels = labels.to(backend.device)
    weight = torch.tensor([1.5, math.inf, math.nan, 0.5, 1.0], device=backend.device)
    kwargs: dict[str, Any] = {"reduction": reduction}
    exact = value_and_gradients(
        lambda e: F.cross_entropy(e[0], labels, weight.double(), ignore_index=255, **kwargs), [z.double()]
    )
    actual = value_and_gradients(
        lambda e: srf.mea_loss(e, labels, class_weight=weight, backend=backend.name, **kwargs), [z]
    )
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, 1e-5, 1e-9)


@pytest.mark.parametrize("situation", ["no label", "counted"])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_weight_that_counts_shows(backend: Backend, sizes: str, situation: str) -> None:
    """With label smoothing, every class's; without, those of labels. At pixels that do not count, exactly 0 remains."""
    kwargs, counts, without = _arguments("no label", 5, backend.device)
    kwargs |= {"label_smoothing": 0.1 if situation == "no label" else 0.0, "size": SIZE}
    weight = _class_weight(5, without if situation == "no label" else 1, math.inf, backend.device)
    exits = make_exits(2, (2, 5, *SIZE), sizes=SIZES[sizes], device=backend.device)
    kwargs |= {"class_weight": weight, "backend": backend.name}
    shows = counts if situation == "no label" else kwargs["labels"] == 1
    maps = value_and_gradients(lambda e: srf.mea_loss(e, reduction="none", **kwargs), exits)
    assert torch.equal(maps[0].isfinite(), ~shows)
    assert not maps[0][~counts].any()
    mean = value_and_gradients(lambda e: srf.mea_loss(e, **kwargs), exits)
    assert not mean[0].isfinite()
    for z, of_maps, of_mean in zip(exits, maps[1:], mean[1:], strict=True):
        for gradient in (of_maps, of_mean):
            if z.shape[2:] == SIZE:
                assert not gradient.movedim(1, -1)[~counts].any()
                gradient = gradient.movedim(1, -1)[shows]
            assert not gradient.isfinite().all(-1).any() if z.shape[2:] == SIZE else not gradient.isfinite().all()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_part_of_weight_0(backend: Backend, sizes: str, reduction: str) -> None:
    """Label losses that are computed, be they infinite, but have no part in the total: none in gradients, either."""
    kwargs, _, _ = _arguments("no label", 5, backend.device)
    exits = make_exits(2, (2, 5, *SIZE), sizes=SIZES[sizes], device=backend.device)
    kwargs |= {"mea_weight": 0.0, "sr_f_weight": None, "temperature": 2.0, "reduction": reduction, "size": SIZE}

    # (A call of srf with backend="reference" has its matrix, whose unused entries autograd multiplies by 0.)
    module = srf if backend.fused else reference

    def run(weight: float) -> list[Tensor]:
        kwargs["class_weight"] = _class_weight(5, 1, weight, backend.device)
        return value_and_gradients(
            lambda e: module.self_regulation_loss(e, backend=backend.name, **kwargs).total, exits
        )

    for actual, expected in zip(run(math.inf), run(0.7), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_an_infinite_gradient(backend: Backend, sizes: str) -> None:
    """It reaches no pixel that does not count."""
    kwargs, counts, _ = _arguments("no label", 5, backend.device)
    kwargs |= {"teachers": (0,), "mask_soft": True, "size": SIZE, "backend": backend.name}
    kwargs["pixel_weight"] = torch.ones((2, *SIZE), device=backend.device)
    kwargs["pixel_weight"][0] = 0  # a whole image, which is what a pixel of a smaller exit is to tell
    exits = make_exits(2, (2, 5, *SIZE), sizes=SIZES[sizes], device=backend.device)
    inputs = leaves(exits)
    given = torch.full((2, 2), math.inf, device=backend.device)
    gradients = torch.autograd.grad(srf.exit_loss_matrix(inputs, **kwargs), inputs, given)
    for gradient in gradients:
        assert not gradient[0].any()
        if gradient.shape[2:] == SIZE:
            assert not gradient.movedim(1, -1)[~counts].any()
        assert not gradient[1].isfinite().all()


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize("situation", AXES["situation"])
def test_over_processes(backend: Backend, situation: str, group: None) -> None:
    """Their divisor is counted elsewhere."""
    kwargs, _, without = _arguments(situation, 5, backend.device)
    kwargs |= {"process_group": "world", "backend": backend.name}
    exits = make_exits(2, (2, 5, *SIZE), device=backend.device)

    def run(weight: float) -> list[Tensor]:
        class_weight = _class_weight(5, without, weight, backend.device)
        return value_and_gradients(lambda e: srf.mea_loss(e, class_weight=class_weight, **kwargs), exits)

    for inf, nan, expected in zip(run(math.inf), run(math.nan), run(0.7), strict=True):
        assert expected.isfinite().all() and torch.equal(inf, expected) and torch.equal(nan, expected)


def test_what_counts_is_as_the_reference_has_it(backend: Backend) -> None:
    """Of an infinite weight that a label has: the mean divides by infinity, and says so wherever something counts."""
    kwargs, counts, _ = _arguments("pixels of weight 0", 5, backend.device)
    kwargs["class_weight"] = _class_weight(5, 1, math.inf, backend.device)
    exits = make_exits(2, (2, 5, *SIZE), device=backend.device)
    exact = value_and_gradients(lambda e: reference.mea_loss(e, **kwargs), exits)
    actual = value_and_gradients(lambda e: srf.mea_loss(e, backend=backend.name, **kwargs), exits)
    assert actual[0].isnan()
    for a, e in zip(actual[1:], exact[1:], strict=True):
        assert_close(a, e, 1e-5)
        assert torch.equal(a.isnan().any(1), counts) and not a.movedim(1, -1)[~counts].any()
