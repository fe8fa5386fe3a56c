"""Every loss on every backend equals the reference in float64, in value and gradient, whatever the options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    LAYOUTS,
    RELATIVE,
    Backend,
    assert_close,
    eighth,
    in_double,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    pairwise,
    pyramid,
    relative_error,
    smallest,
    upstream,
    value_and_gradients,
)
from torch import Tensor

import selfreg_fast as srf
from selfreg_fast import reference

Case = dict[str, Any]
HALVES = (torch.float16, torch.bfloat16)
TARGETS = {
    "raw": {},
    "renormalised": {"renormalize": True},
    "argmax": {"target": "argmax"},
}

AXES: dict[str, list[Any]] = {
    "function": ["exit_loss_matrix", "sr_f_loss", "sr_l_loss", "mea_loss", "self_regulation_loss", "with_features"],
    "target": list(TARGETS),
    "temperature": [0.05, 0.5, 1, 2, 3, 4, 2.7, 100],
    "channels": [1, 2, 3, 19, 21, 150, 1000],
    # (B, ...): of every rank, odd, empty, one pixel, and across the borders of tiles of 32, 128, 512 or 1024 pixels
    "shape": [
        (5,),
        (2, 37),
        (2, 7, 9),
        (1, 1, 1),
        (0, 4, 5),
        (1, 33, 65),
        (1, 1, 1025),
        (1, 130, 130),
        (3, 16, 32),
        (2, 3, 5, 7),
    ],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "layout": list(LAYOUTS),
    "exits": [1, 2, 3, 5, 8],
    "teachers": [0, 1, 2, "all"],
    "sizes": ["same", "pyramid", "pyramid_corners", "eighth"],
    "label_dtype": [torch.uint8, torch.int32, torch.int64, None],
    "ignore_index": [255, -100, 11],
    "class_weight": [False, True],
    "label_smoothing": [0.0, 0.1],
    "pixel_weight": [False, True],
    "mask_soft": [False, True],
    "reduction": ["mean", "sum", "none"],
    "upstream": ["one", "random", "expanded"],
    "detach_teacher": [True, False],
}


def _valid(case: Case) -> bool:
    function = case["function"]
    teachers = case["exits"] if case["teachers"] == "all" else max(case["teachers"], 1)
    work = (1 + teachers) * case["exits"] * case["channels"] * math.prod(case["shape"])
    return (
        work <= 1_500_000
        and (case["exits"] >= 2 or function in ("exit_loss_matrix", "mea_loss"))
        and (case["teachers"] == "all" or case["teachers"] <= case["exits"])
        # what a function does not take stays at its first value, so that every case is another one
        and (function == "exit_loss_matrix" or (case["teachers"] == 0 and not case["mask_soft"]))
        and (not case["mask_soft"] or case["label_dtype"] is not None)
        and (function in ("exit_loss_matrix", "sr_f_loss", "sr_l_loss") or case["label_dtype"] is not None)
        and (case["sizes"] == "same" or (len(case["shape"]) == 3 and case["layout"] != "expanded"))
    )


def _name(case: Case) -> str:
    return "-".join(
        str(v).replace("torch.", "") if not isinstance(v, bool) else f"{'' if v else 'no_'}{k}" for k, v in case.items()
    ).replace(" ", "")


def _arguments(case: Case, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """The exits (the features at their end) and the keyword arguments of a case."""
    function, shape, channels, n = case["function"], case["shape"], case["channels"], case["exits"]
    sizes = None if case["sizes"] == "same" else (eighth if case["sizes"] == "eighth" else pyramid)(n, shape[1:])
    common = {"dtype": case["dtype"], "device": device, "layout": case["layout"]}
    exits = make_exits(n, (shape[0], channels, *shape[1:]), sizes=sizes, **common)
    kwargs: dict[str, Any] = {"reduction": case["reduction"]}
    if sizes is not None:
        kwargs.update(size=shape[1:], align_corners=case["sizes"] == "pyramid_corners")
    if case["pixel_weight"]:
        kwargs["pixel_weight"] = make_pixel_weight(shape, device=device, layout=case["layout"])
    if function != "mea_loss":
        kwargs.update(TARGETS[case["target"]], temperature=case["temperature"], detach_teacher=case["detach_teacher"])
    if function not in ("sr_f_loss", "sr_l_loss"):
        if case["label_dtype"] is not None:
            kwargs["labels"] = make_labels(
                shape,
                channels,
                dtype=case["label_dtype"],
                ignore_index=case["ignore_index"],
                device=device,
                layout=case["layout"],
            )
        kwargs.update(ignore_index=case["ignore_index"], label_smoothing=case["label_smoothing"])
        if case["class_weight"]:
            kwargs["class_weight"] = make_class_weight(channels, device=device)
    if function == "exit_loss_matrix":
        t = n if case["teachers"] == "all" else case["teachers"]
        kwargs["teachers"] = [-1, 0, *range(1, n - 1)][: min(t, n)] if n > 1 else [0][:t]
        kwargs["mask_soft"] = case["mask_soft"]
    if function == "mea_loss":
        kwargs["exit_weights"] = [0.5 + i for i in range(n)]
    if function in ("self_regulation_loss", "with_features"):
        kwargs.update(mea_weight=0.7, sr_f_weight=1.3, sr_l_weight=0.4, exit_weights=[1.5] + [1.0] * (n - 1))
    if function == "with_features":  # features of another width, as many as there are exits
        exits += make_exits(n, (shape[0], channels + 2, *shape[1:]), sizes=sizes, seed=9, **common)
    return exits, kwargs


def _call(module: Any, function: str, kwargs: dict[str, Any]) -> Callable[[list[Tensor]], Tensor]:
    if function == "with_features":
        return lambda e: module.self_regulation_loss(e[: len(e) // 2], features=e[len(e) // 2 :], **kwargs).total
    if function == "self_regulation_loss":
        return lambda e: module.self_regulation_loss(e, **kwargs).total
    return lambda e: getattr(module, function)(e, **kwargs)


def _assert_equals_reference(case: Case, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    exits, kwargs = _arguments(case, backend.device)
    in_half = (
        case["dtype"] in HALVES
        and case["sizes"] != "same"
        and not backend.resizes([z.shape[2:] for z in exits], case["shape"][1:])
    )
    if in_half and case["target"] == "argmax":
        pytest.skip(f"{backend.name}: resizes in half precision, which changes the most likely class")
    dtype, function, kind = case["dtype"], case["function"], case["upstream"]
    # A mean gradient in half precision is multiplied by a loss scaler, here by the number of pixels.
    factor = max(1, math.prod(case["shape"])) if dtype in HALVES and case["reduction"] == "mean" else 1

    exact = value_and_gradients(
        _call(reference, function, in_double(kwargs)), [z.double() for z in exits], kind, factor
    )
    torch.set_num_threads(3 if backend.name == "cpu" else 1)  # tiles are shared out
    actual = value_and_gradients(_call(srf, function, {**kwargs, "backend": backend.name}), exits, kind, factor)
    torch.set_num_threads(1)
    bounds = [_relative(case, torch.float64 if dtype == torch.float64 else torch.float32)]
    bounds += [_relative(case, dtype)] * len(exits)
    if in_half:
        # Resized in half precision: no worse than twice PyTorch's own computation, the same formulas without promotion.
        monkeypatch.setattr(reference, "loss_dtype", lambda d: d)
        own = value_and_gradients(_call(reference, function, kwargs), exits, kind, factor)
        bounds = [
            b + 2 * (error if math.isfinite(error := relative_error(o, e)) else 0)
            for b, o, e in zip(bounds, own, exact, strict=True)
        ]

    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(actual[0], exact[0], bounds[0], smallest(actual[0].dtype), "value")
    rounding = factor * _rounding(case, kwargs, actual[0])
    for i, (a, e, bound) in enumerate(zip(actual[1:], exact[1:], bounds[1:], strict=True)):
        assert a.dtype == dtype
        assert_close(a, e, bound, smallest(dtype) + rounding, f"gradient of exit {i}")


def _relative(case: Case, dtype: torch.dtype) -> float:
    """The relative error allowed; where exits are resized, a position of x pixels is rounded to x units."""
    bound = RELATIVE[dtype]
    if case["sizes"] != "same":
        unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
        bound += unit * max(case["shape"][1:]) * max(1, 1 / case["temperature"])
    return bound


def _rounding(case: Case, kwargs: dict[str, Any], out: Tensor) -> float:
    """What rounding leaves of an element where sigma(s) - p, each about 1/C, cancels: for one class, everywhere.

    A teacher that learns has them times a log-probability, about log C. An element of a small exit sums the 15 pixels,
    or at an eighth of the size the 256, that are interpolated from it.
    """
    unit = torch.finfo(out.dtype).eps
    weight = kwargs.get("pixel_weight", torch.ones(case["shape"]))
    pixels = max(weight.sum().item(), 1) if case["reduction"] == "mean" else 1
    largest = upstream(case["upstream"], out).abs().max().item() if out.numel() else 0
    said = 1 if case["detach_teacher"] else 1 + math.log(case["channels"])
    gathered = {"same": 1, "eighth": 256}.get(case["sizes"], 15)
    return 4 * unit * said * gathered * largest * max(case["temperature"], 1) / case["channels"] / pixels


@pytest.mark.parametrize("case", pairwise(AXES, _valid), ids=_name)
def test_value_and_gradient_equal_the_reference(
    backend: Backend, case: Case, threads: None, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Any two options together."""
    many = case["exits"] >= 5 and math.prod(case["shape"]) > 1000 and not pytestconfig.getoption("--all-interpreted")
    if backend.interpreted and case["sizes"].startswith("pyramid") and many:
        pytest.skip("triton, interpreted: so many sizes of so many pixels take up to half a minute")
    _assert_equals_reference(case, backend, monkeypatch)
