"""What happens on bad, odd and extreme input, and what every call promises: the rows of the behaviour contract."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    RELATIVE,
    Backend,
    assert_close,
    gradients,
    in_layout,
    leaves,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    pyramid,
    value_and_gradients,
)
from torch import Tensor

import selfreg_fast as srf
from selfreg_fast import reference
from selfreg_fast.backends import device_of

SHAPE = (2, 5, 4, 6)
EXITS = make_exits(3, SHAPE)
LABELS = make_labels((2, 4, 6), 5)
IMAGE_LOGITS = make_exits(3, (2, 5), seed=5)

TARGETS: list[dict[str, Any]] = [{}, {"renormalize": True}, {"target": "argmax"}]


def _exits(device: str, **kwargs: Any) -> list[Tensor]:
    return make_exits(3, SHAPE, device=device, **kwargs)


def _labels(device: str, **kwargs: Any) -> Tensor:
    return make_labels((2, 4, 6), 5, device=device, **kwargs)


# Every public loss of exits, with as many of its options in use as it has: (exits, labels, backend) -> Tensor.
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "sr_f": lambda e, y, **k: srf.sr_f_loss(e, **k),
    "sr_l": lambda e, y, **k: srf.sr_l_loss(e, **k),
    "mea": lambda e, y, **k: srf.mea_loss(e, y, **k),
    "total": lambda e, y, **k: srf.self_regulation_loss(e, y, **k).total,
    "matrix": lambda e, y, **k: srf.exit_loss_matrix(e, y, teachers=[0, -1], **k).sum((0, 1)),
    "matrix_masked": lambda e, y, **k: srf.exit_loss_matrix(e, y, teachers=[0], mask_soft=True, **k).sum((0, 1)),
    "learning_teachers": lambda e, y, **k: srf.self_regulation_loss(e, y, detach_teacher=False, **k).total,
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
LABEL_LOSSES = {name: loss for name, loss in LOSSES.items() if not name.startswith("sr_")}
label_losses = pytest.mark.parametrize("loss", LABEL_LOSSES.values(), ids=LABEL_LOSSES)


# ----------------------------------------------------------------------------------------- wrong arguments


def _matrix(exits: Any = EXITS, labels: Any = LABELS, **kwargs: Any) -> Tensor:
    return srf.exit_loss_matrix(exits, labels, **kwargs)


def _total(logits: Any = EXITS, labels: Any = LABELS, **kwargs: Any) -> Tensor:
    return srf.self_regulation_loss(logits, labels, **kwargs).total


# (call, its arguments, the exception, what its text says: the argument, what was expected, what came)
WRONG: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    # the sequence of exits
    (_matrix, {"exits": EXITS[0]}, TypeError, "exits: expected a list or tuple of tensors, got Tensor"),
    (_matrix, {"exits": None}, TypeError, "exits: .*got NoneType"),
    (_matrix, {"exits": []}, ValueError, "exits: expected at least 1 exit, got 0"),
    (_matrix, {"exits": [EXITS[0], 1.0]}, TypeError, r"exits\[1\]: expected a tensor, got float"),
    (srf.sr_f_loss, {"features": EXITS[:1]}, ValueError, "features: expected at least 2 exits, got 1"),
    (srf.sr_l_loss, {"logits": EXITS[:1]}, ValueError, "logits: expected at least 2 exits, got 1"),
    (srf.sr_l_loss, {"logits": []}, ValueError, "logits: expected at least 2 exits, got 0"),
    (_total, {"logits": EXITS[:1]}, ValueError, "logits: expected at least 2 exits, got 1"),
    (_total, {"features": EXITS[:1]}, ValueError, "features: expected at least 2 exits, got 1"),
    (srf.mea_loss, {"logits": [], "labels": LABELS}, ValueError, "logits: expected at least 1 exit, got 0"),
    # dtypes
    (_matrix, {"exits": [z.int() for z in EXITS]}, TypeError, r"exits\[0\]: expected float32.*got torch.int32"),
    (_matrix, {"exits": [EXITS[0], EXITS[1].half()]}, TypeError, r"exits\[1\]: .*torch.float32.*got torch.float16"),
    (_matrix, {"labels": LABELS.float()}, TypeError, "labels: expected dtype uint8, int32 or int64, got torch.float32"),
    (_matrix, {"labels": LABELS.short()}, TypeError, "labels: .*got torch.int16"),
    (_matrix, {"labels": LABELS.tolist()}, TypeError, "labels: expected a tensor, got list"),
    (srf.mea_loss, {"logits": EXITS, "labels": None}, TypeError, "labels: expected a tensor, got NoneType"),
    (_total, {"labels": None}, TypeError, "labels: expected a tensor, got NoneType"),
    (_matrix, {"pixel_weight": LABELS}, TypeError, "pixel_weight: expected a floating dtype, got torch.int64"),
    (_matrix, {"pixel_weight": 0.5}, TypeError, "pixel_weight: expected a tensor, got float"),
    (_matrix, {"class_weight": torch.ones(5).int()}, TypeError, "class_weight: .*got torch.int32"),
    (_matrix, {"class_weight": [1.0] * 5}, TypeError, "class_weight: expected a tensor, got list"),
    # shapes
    (_matrix, {"exits": [torch.zeros(3)]}, ValueError, r"exits\[0\]: expected 2 to 5 dimensions.*got shape \(3,\)"),
    (_matrix, {"exits": [torch.zeros(1, 1, 1, 1, 1, 1)]}, ValueError, r"exits\[0\]: .*2 to 5"),
    (_matrix, {"exits": [torch.zeros(2, 0, 4, 6)]}, ValueError, r"exits\[0\]: .*channel.*\(2, 0, 4, 6\)"),
    (_matrix, {"exits": [EXITS[0], EXITS[1][:, :4]]}, ValueError, r"exits\[1\]: .*\(2, 5, \*, \*\).*got \(2, 4,"),
    (_matrix, {"exits": [EXITS[0], EXITS[1][:1]]}, ValueError, r"exits\[1\]: .*\(2, 5, \*, \*\).*got \(1, 5, 4, 6\)"),
    (_matrix, {"exits": [EXITS[0], EXITS[1].flatten(2)]}, ValueError, r"exits\[1\]: .*got \(2, 5, 24\)"),
    (
        srf.sr_l_loss,
        {"logits": [torch.zeros(2, 5, 7), torch.zeros(2, 5, 8)]},
        ValueError,
        r"logits\[1\]: expected shape \(2, 5, 7\).*got \(2, 5, 8\)",
    ),
    (_matrix, {"labels": LABELS[:1]}, ValueError, r"labels: expected shape \(2, 4, 6\), got \(1, 4, 6\)"),
    (_matrix, {"labels": LABELS[:, None]}, ValueError, r"labels: expected shape .*got \(2, 1, 4, 6\)"),
    (_matrix, {"labels": LABELS, "size": (4, 5)}, ValueError, r"labels: expected shape \(2, 4, 5\), got \(2, 4, 6\)"),
    (
        _matrix,
        {"exits": [z.flatten(2) for z in EXITS], "labels": LABELS},
        ValueError,
        r"labels: expected shape \(2, 24\), got \(2, 4, 6\)",
    ),
    (_matrix, {"pixel_weight": torch.ones(4, 6)}, ValueError, r"pixel_weight: .*\(2, 4, 6\), got \(4, 6\)"),
    (_matrix, {"class_weight": torch.ones(4)}, ValueError, r"class_weight: expected shape \(5,\), got \(4,\)"),
    (_matrix, {"size": (4,)}, ValueError, r"size: .*\(4,\)"),
    (_matrix, {"size": (4, 0)}, ValueError, r"size: expected .*positive.*\(4, 0\)"),
    (_matrix, {"size": 4}, ValueError, "size: expected .*got 4"),
    (_matrix, {"exits": [torch.zeros(2, 5, 7)], "labels": None, "size": (8,)}, ValueError, r"size: .*\(8,\)"),
    # a device without data stands in for another one
    (_matrix, {"exits": [EXITS[0], EXITS[1].to("meta")]}, ValueError, r"exits\[1\]: expected device cpu.*got meta"),
    (_matrix, {"labels": LABELS.to("meta")}, ValueError, "labels: expected device cpu.*got meta"),
    (_matrix, {"pixel_weight": torch.ones(2, 4, 6, device="meta")}, ValueError, "pixel_weight: .*cpu.*got meta"),
    (_matrix, {"class_weight": torch.ones(5, device="meta")}, ValueError, "class_weight: .*cpu.*got meta"),
    # tensors of another kind
    (_matrix, {"exits": [z.to_sparse() for z in EXITS]}, TypeError, r"exits\[0\]: expected a dense tensor.*sparse_coo"),
    (_matrix, {"exits": [EXITS[0], EXITS[1].to_mkldnn()]}, TypeError, r"exits\[1\]: expected a dense tensor.*mkldnn"),
    (_matrix, {"labels": LABELS.to_sparse()}, TypeError, "labels: expected a dense tensor, got torch.sparse_coo"),
    (
        _matrix,
        {"exits": [torch.nested.nested_tensor(list(z), layout=torch.jagged) for z in EXITS]},
        TypeError,
        r"exits\[0\]: expected a dense tensor, got a nested one",
    ),
    # numbers and choices
    *[
        (_matrix, {option: value}, TypeError, f"{option}: expected True or False, got {value!r}")
        for option in ("renormalize", "align_corners", "mask_soft", "detach_teacher", "validate")
        for value in ("no", None)
    ],
    (_matrix, {"temperature": 10**400}, ValueError, "temperature: expected a number that float64 has"),
    *[
        (
            f,
            {"temperature": tau},
            ValueError,
            rf"temperature: expected a number > 0, in \[.*\], got {re.escape(str(tau))}",
        )
        for f in (_matrix, _total)
        for tau in (0, -1.0, math.inf, math.nan, 1e-39, 1e200)  # the last ones are 0 or infinite in float32
    ],
    (_matrix, {"temperature": "2"}, TypeError, "temperature: expected a number, got str"),
    (_matrix, {"temperature": True}, TypeError, "temperature: expected a number, got bool"),
    (_matrix, {"temperature": torch.ones(2)}, TypeError, "temperature: expected a number, got Tensor"),
    (_matrix, {"label_smoothing": 1.5}, ValueError, r"label_smoothing: .*\[0, 1\], got 1.5"),
    (_matrix, {"label_smoothing": -0.1}, ValueError, r"label_smoothing: .*got -0.1"),
    (_matrix, {"label_smoothing": math.nan}, ValueError, "label_smoothing: .*got nan"),
    (_matrix, {"label_smoothing": None}, TypeError, "label_smoothing: expected a number, got NoneType"),
    (_matrix, {"ignore_index": 1.0}, TypeError, "ignore_index: expected an integer, got float"),
    (_matrix, {"ignore_index": None}, TypeError, "ignore_index: expected an integer, got NoneType"),
    (_matrix, {"ignore_index": True}, TypeError, "ignore_index: expected an integer, got bool"),
    (_matrix, {"ignore_index": 2**63}, ValueError, f"ignore_index: expected an integer that int64 has, got {2**63}"),
    (_matrix, {"target": "hard"}, ValueError, "target: expected one of 'soft', 'argmax', got 'hard'"),
    (_matrix, {"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    (_matrix, {"reduction": None}, ValueError, "reduction: .*got None"),
    (_matrix, {"target": np.ones(2)}, ValueError, r"target: expected one of 'soft', 'argmax', got array"),
    (_matrix, {"reduction": ["mean"]}, ValueError, r"reduction: .*got \['mean'\]"),
    (_matrix, {"backend": None}, ValueError, "backend: expected 'auto' or one of .*got None"),
    (_matrix, {"teachers": 0}, TypeError, "teachers: expected a sequence of exit indices, got 0"),
    *[
        (_matrix, {"teachers": bad}, TypeError, "teachers: expected a sequence of exit indices, got")
        for bad in ([0.0], [True], None, "0", {0})
    ],
    (_matrix, {"teachers": [3]}, ValueError, r"teachers: .*3 exits.*got 3"),
    (_matrix, {"teachers": [-4]}, ValueError, r"teachers: .*3 exits.*got -4"),
    (_matrix, {"teachers": [0, 2, -3]}, ValueError, r"teachers: expected distinct exits, got \(0, 2, -3\)"),
    (_matrix, {"labels": None, "mask_soft": True}, ValueError, "mask_soft=True needs labels"),
    (_total, {"mea_weight": "1"}, TypeError, "mea_weight: expected a number, got str"),
    (_total, {"sr_f_weight": torch.ones(1)}, TypeError, "sr_f_weight: expected a number, got Tensor"),
    (_total, {"sr_l_weight": True}, TypeError, "sr_l_weight: expected a number, got bool"),
    (_total, {"cls_weight": None}, TypeError, "cls_weight: expected a number, got NoneType"),
    (_total, {"cls_weight": "0.2"}, TypeError, "cls_weight: expected a number, got str"),
    (_total, {"exit_weights": [1.0]}, ValueError, "exit_weights: expected one for each of the 3 exits, got 1"),
    (_total, {"exit_weights": 1.0}, TypeError, "exit_weights: expected 3 numbers, got float"),
    (_total, {"exit_weights": [1.0, "2", 3.0]}, TypeError, r"exit_weights\[1\]: expected a number, got str"),
    # features of other images than the logits
    *[
        (
            _total,
            {"features": make_exits(2, shape)},
            ValueError,
            rf"features\[0\]: .*\(2, \*, \*, \*\).*got .{shape[0]}, 7",
        )
        for shape in ((3, 7, 4, 6), (2, 7, 24), (2, 7))
    ],
    (
        _total,
        {"logits": [z.flatten(2) for z in EXITS], "labels": LABELS.flatten(1), "features": make_exits(2, (2, 7, 9))},
        ValueError,
        r"features\[0\]: expected shape \(2, \*, 24\) like the logits, got \(2, 7, 9\)",
    ),
    (_total, {"features": [1.0, 2.0]}, TypeError, r"features\[0\]: expected a tensor, got float"),
    (_total, {"features": [z.to("meta") for z in EXITS]}, ValueError, r"features\[0\]: expected device cpu.*got meta"),
    # image-level predictions
    (
        _total,
        {"image_logits": make_exits(3, (3, 5)), "presence": torch.ones(3, 5)},
        ValueError,
        r"image_logits\[0\]: expected 2 images, got \(3, 5\)",
    ),
    (
        _total,
        {"image_logits": [z.to("meta") for z in IMAGE_LOGITS]},
        ValueError,
        r"image_logits\[0\]: expected device cpu.*got meta",
    ),
    (
        srf.presence_loss,
        {"image_logits": [IMAGE_LOGITS[0], IMAGE_LOGITS[1].to("meta")], "presence": torch.ones(2, 5)},
        ValueError,
        r"image_logits\[1\]: expected device cpu of image_logits\[0\], got meta",
    ),
    (
        srf.presence_loss,
        {"image_logits": IMAGE_LOGITS, "presence": torch.ones(2, 5, device="meta")},
        ValueError,
        "presence: expected device cpu.*got meta",
    ),
    (
        srf.presence_loss,
        {"image_logits": IMAGE_LOGITS, "presence": torch.ones(2, 5).cfloat()},
        TypeError,
        "presence: expected 0, 1 or probabilities, got torch.complex64",
    ),
    (
        srf.presence_vector,
        {"labels": LABELS, "num_classes": 5, "ignore_index": "255"},
        TypeError,
        "ignore_index: expected an integer, got str",
    ),
    (_total, {"presence": torch.ones(2, 5)}, ValueError, "presence is used with image_logits only"),
    (_total, {"image_logits": IMAGE_LOGITS, "reduction": "none"}, ValueError, 'image_logits .*reduction="none"'),
    (_total, {"image_logits": IMAGE_LOGITS[0]}, TypeError, "image_logits: expected a list or tuple"),
    (_total, {"image_logits": IMAGE_LOGITS[:2]}, ValueError, "image_logits: .*3.*got 2"),
    (_total, {"image_logits": [torch.zeros(2, 5, 1)] * 3}, ValueError, r"image_logits\[0\]: .*got \(2, 5, 1\)"),
    (_total, {"image_logits": [torch.zeros(2, 5).int()] * 3}, TypeError, r"image_logits\[0\]: .*got torch.int32"),
    (
        _total,
        {"image_logits": IMAGE_LOGITS, "presence": torch.ones(2, 4)},
        ValueError,
        r"presence: expected shape \(2, 5\), got \(2, 4\)",
    ),
    (srf.presence_loss, {"image_logits": IMAGE_LOGITS, "presence": 1}, TypeError, "presence: expected a tensor"),
    (srf.presence_loss, {"image_logits": [], "presence": torch.ones(2, 5)}, ValueError, "image_logits: .*got 0"),
    (srf.presence_distillation_loss, {"image_logits": IMAGE_LOGITS[:1]}, ValueError, "image_logits: .*2 exits, got 1"),
    (
        srf.mea_loss,
        {"logits": make_exits(2, (2, 5, 3, 3)), "labels": torch.zeros(2, 0, 6, dtype=torch.int64)},
        ValueError,
        r"logits\[0\]: .*\(3, 3\) to \(0, 6\).*no pixels",
    ),
    (srf.presence_vector, {"labels": LABELS, "num_classes": 0}, ValueError, "num_classes: .*got 0"),
    (srf.presence_vector, {"labels": LABELS, "num_classes": 5.0}, ValueError, "num_classes: .*got 5.0"),
    (srf.presence_vector, {"labels": LABELS.float(), "num_classes": 5}, TypeError, "labels: .*got torch.float32"),
    (srf.presence_vector, {"labels": LABELS, "num_classes": 3}, ValueError, "labels: .*got [34] at"),
]


@pytest.mark.parametrize(
    ("call", "kwargs", "error", "text"), WRONG, ids=[f"{i}-{next(iter(row[1]))}" for i, row in enumerate(WRONG)]
)
def test_wrong_arguments_are_named(
    call: Callable[..., Any], kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    """The exception names the argument, what was expected and what came."""
    with pytest.raises(error, match=text):
        call(**kwargs)


def test_an_unknown_backend_is_named() -> None:
    """A name that is none, and a backend that does not compute on these tensors."""
    with pytest.raises(ValueError, match="backend: .*got 'gpu'"):
        _matrix(backend="gpu")
    for name in ("cuda", "triton"):
        if device_of(name) == "cuda":  # not interpreted, nor compiled for the CPU
            with pytest.raises(ValueError, match=f"backend: '{name}'.*cpu"):
                _matrix(backend=name)


def test_what_backends_says_is_what_a_call_meets() -> None:
    """An absent backend raises with the reason that backends() gives; nothing falls back in silence."""
    state = srf.backends()
    assert set(state) == {"cuda", "triton", "cpu", "reference"}
    assert state["reference"] == "available"
    if state["cpu"] == "available":
        assert _matrix(backend="cpu").isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=re.escape(state["cpu"])):
            _matrix(backend="cpu")


def test_integers_of_numpy() -> None:
    """They are integers wherever one is expected."""
    one, two = np.int64(1), np.int32(2)
    given = _matrix(labels=None, teachers=[one], size=(one, two), temperature=np.float32(2), ignore_index=two)
    assert torch.equal(given, _matrix(labels=None, teachers=[1], size=(1, 2), temperature=2.0, ignore_index=2))
    assert srf.presence_vector(LABELS, np.int64(5)).shape == (2, 5)


def test_weights_that_want_a_gradient_are_refused(backend: Backend) -> None:
    """A fused loss says that it has no gradient for its weights, rather than giving none in silence."""
    exits, labels = _exits(backend.device), _labels(backend.device)
    weights = {
        "pixel_weight": make_pixel_weight((2, 4, 6), device=backend.device).requires_grad_(),
        "class_weight": make_class_weight(5, device=backend.device).requires_grad_(),
    }
    if backend.fused:
        for name, weight in weights.items():
            with pytest.raises(ValueError, match=f"{name}: .*gradient"):
                srf.mea_loss(exits, labels, backend=backend.name, **{name: weight})
    else:
        pixel_weight = weights["pixel_weight"]
        loss = srf.mea_loss(exits, labels, pixel_weight=pixel_weight, reduction="sum", backend=backend.name)
        (grad,) = torch.autograd.grad(loss, pixel_weight)
        expected = srf.mea_loss(exits, labels, reduction="none", backend=backend.name)
        counted = pixel_weight != 0
        assert_close(grad[counted], expected[counted], 1e-6)


# ----------------------------------------------------------------------------------------- labels


BAD_LABELS = [
    *[(torch.uint8, v) for v in (5, 254)],
    *[(torch.int32, v) for v in (5, -1, 2**31 - 1, -(2**31))],
    *[(torch.int64, v) for v in (5, -1, -100, 2**63 - 1, 2**32 + 1, 256 - 2**32)],  # the last: classes in 32 or 8 bits
]


@pytest.mark.parametrize(("dtype", "value"), BAD_LABELS)
@label_losses
def test_a_label_out_of_range_is_named_with_its_position(
    backend: Backend, loss: Loss, dtype: torch.dtype, value: int
) -> None:
    """ValueError with value and position; on a GPU, where looking costs a sync, the loss is NaN."""
    labels = _labels("cpu", dtype=dtype)
    labels[1, 2, 3] = value
    exits = leaves(_exits(backend.device))
    if backend.name in ("reference", "cpu"):
        with pytest.raises(ValueError, match=rf"labels: .*\[0, 5\).*got {value} at \(1, 2, 3\)"):
            loss(exits, labels, backend=backend.name)
    else:
        assert loss(exits, labels.to(backend.device), backend=backend.name).isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, -100, 300, 2**40, -(2**31) - 1])
def test_labels_are_compared_as_integers_of_any_size(backend: Backend, dtype: torch.dtype, ignore_index: int) -> None:
    """300 classes in uint8, and an `ignore_index` that the labels' dtype cannot hold: nothing wraps around."""
    exits = make_exits(2, (1, 300, 16, 16), dtype=torch.float64, device=backend.device)
    labels = torch.arange(256).view(1, 16, 16).to(device=backend.device, dtype=dtype)
    exact = reference.mea_loss(exits, labels.long(), ignore_index=ignore_index)
    actual = srf.mea_loss(exits, labels, ignore_index=ignore_index, backend=backend.name)
    assert_close(actual, exact, 1e-12)


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_that_counts_gives_exact_zeros(backend: Backend, loss: Loss, reduction: str) -> None:
    """Weight 0 everywhere: value and gradients exactly 0, and connected to the graph."""
    exits = leaves(_exits(backend.device))
    weight = torch.zeros(2, 4, 6, device=backend.device)
    out = loss(exits, _labels(backend.device), pixel_weight=weight, reduction=reduction, backend=backend.name)
    assert out.requires_grad
    assert not out.any()
    assert all(not g.any() for g in gradients(out, exits, torch.ones_like(out)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_pixels_ignored(backend: Backend, weighted: bool, reduction: str) -> None:
    """Label losses, and soft losses with mask_soft, are exactly 0 with gradients exactly 0."""
    labels = torch.full((2, 4, 6), 255, device=backend.device)
    weight = torch.ones(5, device=backend.device) if weighted else None
    kwargs = {"class_weight": weight, "label_smoothing": 0.1, "reduction": reduction, "backend": backend.name}
    for loss in (
        lambda e: srf.mea_loss(e, labels, **kwargs),
        lambda e: srf.exit_loss_matrix(e, labels, teachers=[0, 1], mask_soft=True, **kwargs),
    ):
        exits = leaves(_exits(backend.device))
        out = loss(exits)
        assert out.requires_grad
        assert not out.any()
        assert all(not g.any() for g in gradients(out, exits, torch.ones_like(out)))


def test_classes_of_weight_zero_only(backend: Backend) -> None:
    """A mean over weights that sum up to 0 is 0, not 0/0."""
    labels = torch.ones(2, 4, 6, dtype=torch.int64, device=backend.device)
    weight = torch.tensor([1.0, 0, 1, 1, 1], device=backend.device)
    value, *grads = value_and_gradients(
        lambda e: srf.mea_loss(e, labels, class_weight=weight, backend=backend.name), _exits(backend.device)
    )
    assert value == 0 and not any(g.any() for g in grads)


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (0, 5)])
def test_an_empty_batch_gives_exact_zeros(backend: Backend, loss: Loss, shape: tuple[int, ...], reduction: str) -> None:
    """Value 0 (or an empty map), empty gradients, connected to the graph: a rank without pixels does not hang."""
    exits = leaves(make_exits(3, shape, device=backend.device))
    labels = torch.zeros((0, *shape[2:]), dtype=torch.int64, device=backend.device)
    out = loss(exits, labels, reduction=reduction, backend=backend.name)
    assert out.requires_grad
    assert out.shape == (labels.shape if reduction == "none" else ())
    assert not out.any()
    out.sum().backward()
    assert all(z.grad is None or z.grad.shape == shape for z in exits)


def test_a_scale_without_exits_of_its_size_is_resized_in_an_empty_batch(backend: Backend) -> None:
    """Exits of different sizes, no image."""
    exits = leaves(make_exits(3, (0, 5, 4, 6), sizes=pyramid(3, (4, 6)), device=backend.device))
    out = srf.sr_l_loss(exits, size=(4, 6), backend=backend.name)
    assert out == 0 and out.requires_grad
    out.backward()


# ----------------------------------------------------------------------------------------- extreme logits


def _masked(exits: list[Tensor], which: dict[int, list[int]]) -> list[Tensor]:
    """The exits with -inf in the given classes at every other pixel."""
    exits = [z.clone() for z in exits]
    for i, classes in which.items():
        for c in classes:
            exits[i][:, c, :, ::2] = -math.inf
    return exits


MASKS = {
    "teacher": {0: [4]},
    "all": {0: [4], 1: [4], 2: [4]},
    "more_in_the_teacher": {0: [0, 4], 1: [4]},
    "student": {1: [4]},
    "one_class_left": {0: [0, 1, 2, 3], 1: [0, 1, 2]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS, ids=["raw", "renormalised", "argmax"])
@pytest.mark.parametrize("tau", [0.05, 1.0, 2.0, 2.7])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_classes(backend: Backend, mask: str, tau: float, target: dict[str, Any], dtype: torch.dtype) -> None:
    """-inf in teacher or student: 0 log 0 = 0; infinite or finite exactly where the exact value is, gradients too."""
    if mask == "student" and tau == 0.05:
        tau = 0.5  # p > 0, not underflown
    exits = _masked(_exits(backend.device, dtype=dtype), MASKS[mask])
    labels = _labels(backend.device) % 255 % 4  # some of them are masked by the last case
    for detach in (True, False):
        for reduction in ("none", "sum"):
            kwargs = {"temperature": tau, "teachers": [0], "detach_teacher": detach, "reduction": reduction, **target}
            exact = value_and_gradients(
                lambda e, k=kwargs: reference.exit_loss_matrix(e, labels, **k), [z.double() for z in exits]
            )
            actual = value_and_gradients(
                lambda e, k=kwargs: srf.exit_loss_matrix(e, labels, backend=backend.name, **k), exits
            )
            assert_close(actual[0], exact[0], 1e-5, 1e-30, "value")
            for a, e in zip(actual[1:], exact[1:], strict=True):
                if e.isfinite().all():  # a teacher that learns from an infinite loss has no finite gradient
                    assert_close(a, e, max(1e-5, RELATIVE[dtype]), torch.finfo(dtype).tiny, "gradient")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", TARGETS, ids=["raw", "renormalised", "argmax"])
@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0, 2.0, 3.0, 4.0, 2.7, 100.0])
def test_logits_at_the_end_of_float16(backend: Backend, tau: float, target: dict[str, Any], dtype: torch.dtype) -> None:
    """±6e4: differences of 1.2e5 over a small temperature, sums far above 65504; everything finite and right."""
    g = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, SHAPE, generator=g) * 2 - 1 for _ in range(3)]
    exits = [(6e4 * s).to(device=backend.device, dtype=dtype) for s in signs]
    labels = _labels(backend.device)
    for reduction in ("mean", "sum"):
        kwargs = {"temperature": tau, "teachers": [0, 2], "reduction": reduction, **target}
        exact = value_and_gradients(
            lambda e, k=kwargs: reference.exit_loss_matrix(e, labels, **k), [z.double() for z in exits]
        )
        actual = value_and_gradients(
            lambda e, k=kwargs: srf.exit_loss_matrix(e, labels, backend=backend.name, **k), exits
        )
        assert actual[0].isfinite().all()
        for a, e in zip(actual, exact, strict=True):
            assert_close(a, e, max(1e-5, RELATIVE[a.dtype]), 1e-6 * e.abs().max().item())


@pytest.mark.parametrize("target", TARGETS, ids=["raw", "renormalised", "argmax"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, -1e4])
@pytest.mark.parametrize("spread", [0.1, 30.0])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0, 2.7])
def test_float32_errors(backend: Backend, tau: float, spread: float, offset: float, target: dict[str, Any]) -> None:
    """Relative error below 1e-5 at any offset of the logits: x - max is exact, x - logsumexp is not.

    The specification divides by tau first, which rounds the offset.
    """
    exits = [z + offset for z in make_exits(3, (1, 19, 13, 17), scale=spread, device=backend.device)]
    labels = make_labels((1, 13, 17), 19, device=backend.device)
    kwargs = {"temperature": tau, **target}
    exact = value_and_gradients(
        lambda e: reference.self_regulation_loss(e, labels, **kwargs).total, [z.double() for z in exits]
    )
    actual = value_and_gradients(
        lambda e: srf.self_regulation_loss(e, labels, backend=backend.name, **kwargs).total, exits
    )
    bound = 1e-5 if backend.fused else 1e-5 + abs(offset) * torch.finfo(torch.float32).eps
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_mean_does_not_underflow(backend: Backend, dtype: torch.dtype) -> None:
    """A loss scaler multiplies before the gradient is rounded: in float16, 1/(H W) of a big image rounds to 0."""
    exits = make_exits(2, (1, 19, 300, 300), dtype=dtype, device=backend.device)
    labels = make_labels((1, 300, 300), 19, device=backend.device)
    exact = value_and_gradients(
        lambda e: reference.self_regulation_loss(e, labels).total, [z.double() for z in exits], factor=65536.0
    )
    actual = value_and_gradients(
        lambda e: srf.self_regulation_loss(e, labels, backend=backend.name).total, exits, factor=65536.0
    )
    for a, e in zip(actual[1:], exact[1:], strict=True):
        assert_close(a, e, RELATIVE[dtype], 6e-8)


def test_ties_go_to_the_first_class(backend: Backend) -> None:
    """target="argmax" takes the first of the largest, as torch.argmax."""
    teacher = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0], device=backend.device).view(1, 5, 1, 1).expand(2, 5, 4, 6)
    student = _exits(backend.device)[1]
    actual = srf.sr_f_loss([teacher, student], target="argmax", backend=backend.name)
    expected = -student.double().log_softmax(1)[:, 1].mean()
    assert_close(actual, expected, 1e-6)


# ----------------------------------------------------------------------------------------- NaN that does not count


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("loss", "weighted"),
    [("mea", False), ("matrix_masked", False), *[(name, True) for name in LOSSES]],
    ids=lambda v: {True: "by_weight", False: "by_label"}.get(v, v),
)
def test_what_does_not_count_reaches_nothing(
    backend: Backend, loss: str, weighted: bool, reduction: str, poison: float
) -> None:
    """NaN and inf at ignored pixels (of label losses and with mask_soft) and at pixels of weight 0."""
    clean, labels = _exits(backend.device), _labels(backend.device)
    weight = make_pixel_weight((2, 4, 6), device=backend.device) if weighted else None
    uncounted = weight == 0 if weighted else labels == 255
    assert uncounted.any()
    dirty = [z.masked_fill(uncounted[:, None], poison) for z in clean]
    kwargs = {"pixel_weight": weight, "reduction": reduction, "backend": backend.name}
    expected = value_and_gradients(lambda e: LOSSES[loss](e, labels, **kwargs), clean)
    actual = value_and_gradients(lambda e: LOSSES[loss](e, labels, **kwargs), dirty)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert all(not g.masked_select(uncounted[:, None]).any() for g in actual[1:])


def test_a_nan_that_counts_is_not_hidden(backend: Backend) -> None:
    """NaN in, NaN out: training code looks for it."""
    for loss in LOSSES.values():
        exits = _exits(backend.device)
        exits[1][0, 2, 0, 0] = math.nan
        labels = torch.zeros(2, 4, 6, dtype=torch.int64, device=backend.device)
        assert loss(exits, labels, backend=backend.name).isnan()


# ----------------------------------------------------------------------------------------- inputs and outputs


@losses
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "expanded"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_are_never_written_and_outputs_never_alias_them(
    backend: Backend, loss: Loss, reduction: str, layout: str
) -> None:
    """Neither forward nor backward writes into an argument or the gradient given; every output owns its memory."""
    exits = leaves(_exits(backend.device, layout=layout))
    labels = _labels(backend.device, layout=layout)
    weight = make_pixel_weight((2, 4, 6), device=backend.device, layout=layout)
    arguments = [*exits, labels, weight]
    copies = [t.detach().clone() for t in arguments]
    versions = [t._version for t in arguments]
    out = loss(exits, labels, pixel_weight=weight, reduction=reduction, backend=backend.name)
    value = out.detach().clone()
    grad_output = torch.full_like(out, 0.5)
    grads = torch.autograd.grad(out, exits, grad_output, allow_unused=True)
    assert all(torch.equal(t, c) for t, c in zip(arguments, copies, strict=True))
    assert [t._version for t in arguments] == versions
    assert torch.equal(out, value)
    assert torch.equal(grad_output, torch.full_like(out, 0.5))
    memory = [t.untyped_storage().data_ptr() for t in [*arguments, grad_output, out, *grads] if t is not None]
    assert len(set(memory)) == len(memory)


def test_size_equal_to_the_input_does_not_hand_out_the_input(backend: Backend) -> None:
    """One exit, no teacher, no label: a loss of 0 and no gradient, not an error."""
    exits = _exits(backend.device)[:1]
    out = srf.exit_loss_matrix(exits, size=(4, 6), backend=backend.name)
    assert out.shape == (1, 1) and out == 0


@losses
def test_gradients_have_the_strides_of_dense_exits(backend: Backend, loss: Loss) -> None:
    """channels_last in, channels_last out of a fused kernel: the convolution before it needs no copy."""
    if not backend.fused:
        pytest.skip("reference: PyTorch decides")
    exits = leaves(_exits(backend.device, layout="channels_last"))
    out = loss(exits, _labels(backend.device), backend=backend.name)
    for g in torch.autograd.grad(out, exits, allow_unused=True):
        assert g is None or g.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------- derivatives, determinism


@losses
def test_a_second_derivative_is_right_or_refused_by_name(backend: Backend, loss: Loss) -> None:
    """By the exits a fused loss has none and says so, by `grad` and by `backward`; the reference has."""
    exits, labels = leaves(_exits(backend.device)), _labels(backend.device)
    out = loss(exits, labels, backend=backend.name)
    grads = torch.autograd.grad(out, exits, create_graph=True, allow_unused=True)
    norm = sum(g.square().sum() for g in grads if g is not None)
    if backend.fused:
        with pytest.raises(RuntimeError, match="selfreg_fast.*reference"):
            torch.autograd.grad(norm, exits, retain_graph=True)
        with pytest.raises(RuntimeError, match="selfreg_fast.*reference"):
            norm.backward()
    else:
        second = torch.autograd.grad(norm, exits, allow_unused=True)
        assert any(g is not None and g.any() for g in second)


@losses
def test_deterministic_algorithms_are_no_obstacle(backend: Backend, loss: Loss) -> None:
    """use_deterministic_algorithms(True) never raises, forward and backward, resized exits included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        exits = make_exits(3, SHAPE, sizes=pyramid(3, (4, 6)), device=backend.device)
        value, *grads = value_and_gradients(
            lambda e: loss(e, _labels(backend.device), size=(4, 6), backend=backend.name), exits
        )
        assert value.isfinite() and all(g.isfinite().all() for g in grads)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("resized", [False, True])
@losses
def test_results_repeat_bitwise(
    backend: Backend, loss: Loss, resized: bool, layout: str, dtype: torch.dtype, threads: None
) -> None:
    """The same bits in every run, and of a fused kernel with any number of threads."""
    channels, size = (5, (9, 13)) if backend.interpreted else (19, (37, 61))
    sizes = pyramid(3, size) if resized else None
    exits = make_exits(3, (2, channels, *size), sizes=sizes, dtype=dtype, layout=layout, device=backend.device)
    labels = make_labels((2, *size), channels, device=backend.device)
    weight = make_pixel_weight((2, *size), device=backend.device)

    def run() -> list[Tensor]:
        return value_and_gradients(
            lambda e: loss(e, labels, pixel_weight=weight, backend=backend.name), exits, "random"
        )

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    if backend.name == "cpu":
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


def test_layout_does_not_change_the_value(backend: Backend) -> None:
    """The same numbers in another layout: the same loss up to the order of sums."""
    exits, labels = _exits(backend.device), _labels(backend.device)
    expected = srf.self_regulation_loss(exits, labels, backend=backend.name)
    for layout in ("channels_last", "transposed", "cropped", "cropped_channels_last"):
        moved = [in_layout(z, layout) for z in exits]
        actual = srf.self_regulation_loss(moved, labels, backend=backend.name)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-6)


def test_class_and_pixel_weights_of_any_floating_dtype(backend: Backend) -> None:
    """Weights need not have the exits' dtype: they are converted."""
    exits, labels = _exits(backend.device), _labels(backend.device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kwargs = {
            "class_weight": make_class_weight(5, device=backend.device).to(dtype),
            "pixel_weight": make_pixel_weight((2, 4, 6), device=backend.device).to(dtype),
        }
        exact = reference.mea_loss([z.double() for z in exits], labels, **{k: v.double() for k, v in kwargs.items()})
        assert_close(srf.mea_loss(exits, labels, backend=backend.name, **kwargs), exact, 1e-6)
