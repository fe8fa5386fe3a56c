"""Random small cases on every backend against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    Backend,
    assert_close,
    in_double,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    value_and_gradients,
)

import selfreg_fast as srf
from selfreg_fast import reference


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Any options of the matrix, on exits of any rank, size, layout and scale of logits."""
    n = draw(st.integers(1, 5))
    labelled = draw(st.booleans())
    return {
        "n": n,
        "channels": draw(st.integers(1, 40)),
        "shape": (
            draw(st.integers(0, 3)),
            *draw(st.lists(st.integers(1, 12), max_size=3)),
        ),
        "sizes": draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=n, max_size=n)),
        "resize": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "scale": draw(st.sampled_from([0.3, 3.0, 30.0])),
        "seed": draw(st.integers(0, 10**6)),
        "kind": draw(st.sampled_from(["one", "random", "expanded"])),
        "labels": draw(st.sampled_from([torch.uint8, torch.int32, torch.int64])) if labelled else None,
        "pixel_weight": draw(st.booleans()),
        "class_weight": draw(st.booleans()),
        "options": {
            "teachers": draw(st.permutations(range(n)))[: draw(st.integers(0, n))],
            "temperature": draw(st.one_of(st.sampled_from([1, 2, 3, 4]), st.floats(0.3, 10))),
            "renormalize": draw(st.booleans()),
            "target": draw(st.sampled_from(["soft", "soft", "argmax"])),
            "ignore_index": draw(st.sampled_from([255, 0, -1, -100])),
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "mask_soft": draw(st.booleans()) and labelled,
            "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
            "detach_teacher": draw(st.booleans()),
            "align_corners": draw(st.booleans()),
        },
    }


@given(case=cases())
def test_the_matrix_equals_the_reference(backend: Backend, case: dict[str, Any]) -> None:
    """Value and every gradient, to the rounding of the exits' dtype."""
    if backend.interpreted and case["seed"] % 8:
        return  # an eighth of the cases
    (batch, *spatial), channels, seed, options = case["shape"], case["channels"], case["seed"], case["options"]
    resized = case["resize"] and len(spatial) == 2 and case["layout"] != "expanded"
    exits = make_exits(
        case["n"],
        (batch, channels, *spatial),
        dtype=case["dtype"],
        device=backend.device,
        layout=case["layout"],
        sizes=case["sizes"] if resized else None,
        scale=case["scale"],
        seed=seed,
    )
    kwargs: dict[str, Any] = dict(options)
    if resized:
        kwargs["size"] = spatial
    if case["labels"] is not None:
        kwargs["labels"] = make_labels(
            case["shape"],
            channels,
            dtype=case["labels"],
            ignore_index=options["ignore_index"],
            device=backend.device,
            layout=case["layout"],
            seed=seed,
        )
    if case["pixel_weight"]:
        kwargs["pixel_weight"] = make_pixel_weight(case["shape"], device=backend.device, layout=case["layout"])
    if case["class_weight"]:
        kwargs["class_weight"] = make_class_weight(channels, device=backend.device)

    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, **in_double(kwargs)), [z.double() for z in exits], case["kind"]
    )
    actual = value_and_gradients(lambda e: srf.exit_loss_matrix(e, backend=backend.name, **kwargs), exits, case["kind"])
    # Rounding of a pixel whose gradients cancel, in units of what they consist of: weights of up to 2 (of the pixel and
    # of the class) times a logarithm, divided by the sum of the weights (of which a single small one may count).
    unit = torch.finfo(case["dtype"]).eps
    bound = 64 * unit * max(1, 1 / options["temperature"])
    terms = (1 + len(options["teachers"])) * max(1, options["temperature"] ** 2) * (1 + case["scale"])
    count = kwargs["pixel_weight"].sum().item() if case["pixel_weight"] and options["reduction"] == "mean" else 1
    size = 1 if options["reduction"] != "mean" else math.prod(case["shape"])
    floor = 16 * unit * terms / max(min(count, size), 1)
    assert_close(actual[0], exact[0], bound, torch.finfo(case["dtype"]).smallest_normal, "value")
    for i, (a, e) in enumerate(zip(actual[1:], exact[1:], strict=True)):
        assert_close(a, e, bound, floor, f"gradient of exit {i}")
