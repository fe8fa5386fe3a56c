"""The far ends of what may be given: logits, temperatures, numbers of classes and of images, places in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import (
    Backend,
    in_layout,
    magnitudes,
    make_exits,
    make_labels,
    pairwise,
    share_of_bound,
    upstream,
    value_and_gradients,
)
from torch import Tensor

import selfreg_fast as srf
from selfreg_fast import reference

AXES: dict[str, list[Any]] = {
    "logits": ["normal", "equal", "huge", "far"],
    "channels": [1, 2, 19, 4096],
    "temperature": [0.05, 0.5, 1, 4, 100],
    "target": ["raw", "renormalized", "argmax"],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": [(1, 1, 1), (2, 3, 5), (3,)],
    "layout": ["contiguous", "channels_last"],
    "detach_teacher": [True, False],
}
HUGE = {torch.float16: 6e4, torch.bfloat16: 1e30, torch.float32: 1e30, torch.float64: 1e290}


def _exits(case: dict[str, Any], device: str) -> list[Tensor]:
    """Of a normal distribution; all 0; of plus or minus the largest; or close to each other far from 0."""
    shape, dtype = (case["shape"][0], case["channels"], *case["shape"][1:]), case["dtype"]
    exits = make_exits(3, shape, dtype=torch.float64)
    if case["logits"] == "equal":
        exits = [torch.zeros_like(z) for z in exits]
    elif case["logits"] == "huge":
        exits = [z.sign() * HUGE[dtype] for z in exits]
    elif case["logits"] == "far":
        exits = [z + 300 for z in exits]
    return [in_layout(z.to(device=device, dtype=dtype), case["layout"]) for z in exits]


def _assert_as_exact_as_promised(
    backend: Backend, given: list[Tensor], exits: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """The matrix of the exits as given, and its gradients, against those of the same exits in float64."""
    exact = value_and_gradients(lambda e: reference.exit_loss_matrix(e, **kwargs), [z.double() for z in exits])
    actual = value_and_gradients(lambda e: srf.exit_loss_matrix(e, backend=backend.name, **kwargs), given)
    added = magnitudes(exits, upstream("one", exact[0]), **kwargs)
    assert share_of_bound(actual, exact, added, exits[0].dtype) <= 1


def _name(case: dict[str, Any]) -> str:
    return "-".join(str(v).replace("torch.", "").replace(" ", "") for v in case.values())


@pytest.mark.parametrize("case", pairwise(AXES, lambda case: True), ids=_name)
def test_extremes_are_as_exact_as_promised(backend: Backend, case: dict[str, Any]) -> None:
    """Any two extremes together: value and gradients, of labels and teachers, finite and right."""
    exits = _exits(case, backend.device)
    kwargs: dict[str, Any] = {
        "labels": make_labels(case["shape"], case["channels"], ignore_index=-1, device=backend.device),
        "ignore_index": -1,
        "teachers": (0, 2),
        "temperature": case["temperature"],
        "renormalize": case["target"] == "renormalized",
        "target": "argmax" if case["target"] == "argmax" else "soft",
        "detach_teacher": case["detach_teacher"],
    }
    _assert_as_exact_as_promised(backend, exits, exits, kwargs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(), (1, 1), (2, 1)], ids=str)
def test_more_images_than_a_grid_has_rows(backend: Backend, size: tuple[int, ...], layout: str) -> None:
    """66,000 of them, of one pixel, or of one that becomes two."""
    resized = size == (2, 1)
    if backend.interpreted or (
        resized and backend.name == "cuda" and backend.device == "cpu" and layout != "contiguous"
    ):
        pytest.skip("a GPU's stand-in would take long")
    batch = 66_000
    exits = make_exits(1 if resized else 2, (batch, 2, *([1, 1] if resized else size)), device=backend.device)
    exits = [in_layout(z, layout) for z in exits]
    kwargs: dict[str, Any] = {"labels": make_labels((batch, *size), 2, device=backend.device), "teachers": (-1,)}
    if resized:
        kwargs["size"] = size
    _assert_as_exact_as_promised(backend, exits, exits, kwargs)


@pytest.mark.parametrize("dimension", ["image", "channel", "row", "column"])
def test_strides_beyond_32_bits(backend: Backend, dimension: str) -> None:
    """Elements more than 2^31 apart, in memory of which only the pages that hold them exist."""
    if backend.device != "cpu":
        pytest.skip("memory of a GPU exists: test_on_gpu.py fills as much")
    shape, far = (2, 3, 2, 2), 2**31 + 24
    strides = [12, 4, 2, 1]
    strides[["image", "channel", "row", "column"].index(dimension)] = far
    exits = make_exits(2, shape, dtype=torch.bfloat16)
    memory = torch.empty(2 * far + 64, dtype=torch.bfloat16)
    distant = [memory.as_strided(shape, strides, offset).copy_(z) for offset, z in zip((0, 24), exits, strict=True)]
    kwargs: dict[str, Any] = {"labels": make_labels((2, 2, 2), 3), "teachers": (0,), "temperature": 2.0}
    _assert_as_exact_as_promised(backend, distant, exits, kwargs)
