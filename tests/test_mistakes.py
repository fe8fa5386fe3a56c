"""Common mistakes: each meets an error or a warning that says what to do, at the first line that can tell."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support import Backend, assert_close, make_exits, make_labels
from torch import Tensor, nn

import selfreg_fast as srf
from selfreg_fast import checks, reference

EXITS = make_exits(3, (2, 5, 8, 8))
LABELS = make_labels((2, 8, 8), 5)
PREDICTIONS = make_exits(3, (2, 5))


@pytest.fixture
def nothing_said() -> Iterator[None]:
    """What is said once a process has not been said yet."""
    before = set(checks._warned)
    checks._warned.clear()
    yield
    checks._warned.clear()
    checks._warned.update(before)


def _warnings(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


# ------------------------------------------------------------------------------------------------ said once


SWAPPED: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "labels (B, W, H)": ((2, 5, 16, 32), (2, 32, 16), True),
    "logits (B, H, W, C)": ((2, 64, 64, 21), (2, 64, 64), True),
    "labels (B, W, H) of resized exits": ((2, 5, 15, 20), (2, 160, 120), True),
    "an exit of an eighth": ((2, 5, 9, 17), (2, 65, 130), False),
    "rounded to 8 rows": ((2, 5, 8, 16), (2, 69, 121), False),
    "few rows": ((2, 5, 7, 32), (2, 32, 7), False),
    "of one size": ((2, 5, 8, 64), (2, 8, 64), False),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_swapped_axes_are_warned_of_once(nothing_said: None, case: str) -> None:
    """Resizing makes anything fit: another aspect ratio is said, once, with both shapes and how to silence it."""
    shape, of_labels, swapped = SWAPPED[case]
    exits, labels = [torch.zeros(shape)] * 2, torch.zeros(of_labels, dtype=torch.int64)
    said = _warnings(lambda: srf.mea_loss(exits, labels)) + _warnings(lambda: srf.sr_l_loss(exits, size=of_labels[1:]))
    assert len(said) == int(swapped), said
    if swapped:
        assert str(shape) in said[0] and str(of_labels[1:]) in said[0]
        (silent,) = re.findall(r"warnings.filterwarnings\('ignore', message='(.*)'\)", said[0])
        assert re.match(silent, said[0])


def test_a_warning_points_to_the_users_line(nothing_said: None) -> None:
    """Not to ours, nor to torch's, which calls modules."""
    labels = torch.zeros(2, 32, 16, dtype=torch.int64)
    with pytest.warns(UserWarning, match="aspect ratio") as caught:
        srf.SelfRegulationLoss()([torch.zeros(2, 5, 16, 32)] * 2, labels)
    assert caught[0].filename == __file__


def test_logits_of_one_channel_are_warned_of_once(nothing_said: None) -> None:
    """Their label loss is 0 whatever they are; what is said instead to do learns."""
    z, labels = make_exits(2, (2, 1, 8, 8)), make_labels((2, 8, 8), 1)
    (said,) = _warnings(lambda: srf.self_regulation_loss(z, labels)) + _warnings(lambda: srf.mea_loss(z, labels))
    assert "torch.cat([torch.zeros_like(z), z], 1)" in said
    two = torch.cat([torch.zeros_like(z[0]), z[0]], 1)
    binary = (labels == 0).long().where(labels == 0, 255)
    exact = nn.functional.binary_cross_entropy_with_logits(
        z[0][:, 0][binary == 1], torch.ones(int((binary == 1).sum()))
    )
    assert_close(srf.mea_loss([two], binary), exact, 1e-6)
    assert not _warnings(lambda: srf.sr_f_loss(z))


# ------------------------------------------------------------------------------------------ errors with a hint


def _output() -> srf.SelfRegulationOutput:
    return srf.self_regulation_loss(EXITS, LABELS)


HINTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # labels and exits
    "labels with a channel": (
        lambda: srf.self_regulation_loss(EXITS, LABELS[:, None]),
        ValueError,
        r"labels: expected shape \(B, H, W\), got \(2, 1, 8, 8\); pass labels.squeeze\(1\)",
    ),
    "volumes' labels with a channel": (
        lambda: srf.mea_loss([torch.zeros(2, 3, 4, 4, 4)], torch.zeros(2, 1, 4, 4, 4, dtype=torch.int64)),
        ValueError,
        r"labels: expected shape \(B, D, H, W\), got .*squeeze\(1\)",
    ),
    "labels one-hot": (
        lambda: srf.mea_loss(EXITS, torch.zeros(2, 5, 8, 8, dtype=torch.int64)),
        ValueError,
        r"got \(2, 5, 8, 8\); pass labels.argmax\(1\)",
    ),
    "labels one-hot, as numbers": (
        lambda: srf.mea_loss(EXITS, torch.zeros(2, 5, 8, 8)),
        ValueError,
        r"got \(2, 5, 8, 8\); pass labels.argmax\(1\)",
    ),
    "another void label": (
        lambda: srf.mea_loss(EXITS, LABELS.int().masked_fill(LABELS == 255, -100)),
        ValueError,
        "got -100 at .*; if -100 is void, pass ignore_index=-100",
    ),
    "a mask as pixel_weight": (
        lambda: srf.mea_loss(EXITS, LABELS, pixel_weight=LABELS != 255),
        TypeError,
        r"got torch.bool; pass pixel_weight.float\(\)",
    ),
    "pixel_weight with a channel": (
        lambda: srf.mea_loss(EXITS, LABELS, pixel_weight=torch.ones(2, 1, 8, 8)),
        ValueError,
        r"expected shape \(2, 8, 8\), got \(2, 1, 8, 8\); pass pixel_weight.squeeze\(1\)",
    ),
    "labels as numbers": (
        lambda: srf.mea_loss(EXITS, LABELS.double()),
        TypeError,
        r"torch.float64; pass labels.long\(\)",
    ),
    "labels as a mask": (lambda: srf.mea_loss(EXITS, LABELS > 2), TypeError, r"pass labels.to\(torch.uint8\)"),
    "labels of numpy": (lambda: srf.mea_loss(EXITS, LABELS.numpy()), TypeError, r"pass torch.tensor\(labels\)"),
    "a network's output in evaluation mode": (
        lambda: srf.mea_loss({"out": EXITS[0]}, LABELS),
        TypeError,
        r"got dict; a MultiExit in evaluation mode .*model\.all_exits",
    ),
    "one tensor": (lambda: srf.mea_loss(EXITS[0], LABELS), TypeError, r"logits: .*got Tensor; pass \[logits\]"),
    "one exit": (lambda: srf.self_regulation_loss(EXITS[:1], LABELS), ValueError, "logits: .*got 1; mea_loss"),
    "one exit of SR-L": (lambda: srf.sr_l_loss(EXITS[:1]), ValueError, "logits: .*got 1; mea_loss"),
    "a MultiExit's output": (
        lambda: srf.mea_loss(srf.MultiExitOutput(EXITS, [], None, None), LABELS),
        TypeError,
        "logits: .*got MultiExitOutput; pass its .logits",
    ),
    "features of other channels": (
        lambda: srf.sr_f_loss([torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)]),
        ValueError,
        r"features\[1\]: .*projection.*MultiExit",
    ),
    "image-level predictions of other classes": (
        lambda: srf.self_regulation_loss(EXITS, LABELS, image_logits=make_exits(3, (2, 4))),
        ValueError,
        r"image_logits\[0\]: expected the 5 classes of the logits, got \(2, 4\)",
    ),
    # the tuple of losses
    **{
        f"loss.{name}": (lambda name=name: getattr(_output(), name), AttributeError, rf"use \.total\.{name}")
        for name in ("backward", "item", "detach")
    },
    "2 * loss": (lambda: 2 * _output(), TypeError, r"scale \.total"),
    "loss * 2.0": (lambda: _output() * 2.0, TypeError, r"scale \.total"),
    "a format": (lambda: f"{_output():.3f}", TypeError, r"format \.total"),
    "a scaler": (lambda: torch.amp.GradScaler("cpu").scale(_output()), TypeError, r"scale \.total"),
    # names of other libraries
    **{
        f"{theirs}=": (
            lambda f=f, theirs=theirs: f(EXITS, LABELS, **{theirs: None}),
            TypeError,
            f"unexpected keyword argument '{theirs}'; do you mean '{ours}'",
        )
        for f in (srf.mea_loss, reference.mea_loss)
        for theirs, ours in {
            "weight": "class_weight",
            "class_weights": "class_weight",
            "ignore_label": "ignore_index",
            "label_smooth": "label_smoothing",
        }.items()
    },
    "a criterion's call": (
        lambda: srf.SelfRegulationLoss()(EXITS, LABELS, pixel_weights=None),
        TypeError,
        r"forward\(\) got .*'pixel_weights'; do you mean 'pixel_weight'",
    ),
    "nothing like it": (lambda: srf.sr_l_loss(EXITS, class_weights=None), TypeError, "argument 'class_weights'$"),
    "tau=": (
        lambda: srf.SelfRegulationLoss(tau=2),
        TypeError,
        r"SelfRegulationLoss\(\) got .*do you mean 'temperature'",
    ),
    "published(tau=)": (lambda: srf.SelfRegulationLoss.published(tau=2), TypeError, "do you mean 'temperature'"),
    "no such option": (lambda: srf.SelfRegulationLoss(xyz=2), TypeError, "unexpected keyword argument 'xyz'$"),
    # the criterion's options, when it is made
    **{
        f"{name}={value}": (lambda name=name, value=value: srf.SelfRegulationLoss(**{name: value}), error, f"^{name}: ")
        for name, value, error in (
            ("temperature", 0, ValueError),
            ("temperature", "2", TypeError),
            ("reduction", "avg", ValueError),
            ("target", "hard", ValueError),
            ("label_smoothing", 2, ValueError),
            ("ignore_index", 0.5, TypeError),
            ("renormalize", 1, TypeError),
            ("mea_weight", "1", TypeError),
            ("seg_weight", "1", TypeError),
            ("exit_weights", 1.0, TypeError),
            ("size", (4, 0), ValueError),
            ("size", (1, 2, 3, 4), ValueError),
            ("process_group", "foo", ValueError),
            ("backend", "gpu", ValueError),
            ("class_weight", [1.0, 2.0], TypeError),
            ("class_weight", torch.tensor(1.0), ValueError),
            ("class_weight", torch.ones(2, 3), ValueError),
        )
    },
    "a list of weights": (
        lambda: srf.SelfRegulationLoss(class_weight=[1.0, 2.0]),
        TypeError,
        r"class_weight: expected a tensor, got list; pass torch.tensor\(class_weight\)",
    ),
    # numbers that are none
    **{
        f"{name}={value}": (
            lambda name=name, value=value: srf.self_regulation_loss(EXITS, LABELS, **{name: value}),
            ValueError,
            f"{name}.*: expected a finite number, got",
        )
        for name in ("mea_weight", "sr_f_weight", "sr_l_weight", "seg_weight", "cls_weight")
        for value in (float("nan"), float("-inf"))
    },
    "exit_weights of NaN": (
        lambda: srf.mea_loss(EXITS, LABELS, exit_weights=[1, float("nan"), 1]),
        ValueError,
        r"exit_weights\[1\]: expected a finite number, got nan",
    ),
}


@pytest.mark.parametrize("case", HINTS)
def test_the_error_says_what_to_do(case: str) -> None:
    call, error, text = HINTS[case]
    with pytest.raises(error, match=text):
        call()


# ------------------------------------------------------------------------------------ what should just work


class _OtherSequence(Sequence):  # type: ignore[type-arg]
    """A sequence that is neither list nor tuple, as OmegaConf's ListConfig."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __getitem__(self, i: Any) -> Any:
        return self.items[i]

    def __len__(self) -> int:
        return len(self.items)


def test_sequences_and_numbers_of_other_libraries(backend: Backend) -> None:
    """Whatever is a sequence or has a float is taken as one, by the reference, too."""
    exits, labels = [z.to(backend.device) for z in EXITS], LABELS.to(backend.device)
    functions = srf if backend.fused else reference
    seq = _OtherSequence
    given = functions.self_regulation_loss(
        exits,
        labels,
        mea_weight=Fraction(1, 2),
        sr_f_weight=np.float32(0.25),
        seg_weight=np.float64(2),
        temperature=Fraction(3, 2),
        label_smoothing=np.float16(0.5),
        exit_weights=seq(1, Fraction(1, 2), np.int64(2)),
        size=seq(8, 8),
        backend=backend.name,
    )
    expected = functions.self_regulation_loss(
        exits,
        labels,
        mea_weight=0.5,
        sr_f_weight=0.25,
        seg_weight=2.0,
        temperature=1.5,
        label_smoothing=0.5,
        exit_weights=[1.0, 0.5, 2.0],
        size=(8, 8),
        backend=backend.name,
    )
    assert all(torch.equal(a, e) for a, e in zip(given, expected, strict=True))
    matrix = functions.exit_loss_matrix(seq(*exits), labels, teachers=seq(0, -1), backend=backend.name)
    assert torch.equal(matrix, functions.exit_loss_matrix(exits, labels, teachers=[0, -1], backend=backend.name))


def test_the_reference_takes_the_same_arguments() -> None:
    """One can stand for the other, `backend` and `validate` included; validating, it names a label out of range."""
    options = {"backend": "cpu", "validate": True}
    for name in ("mea_loss", "self_regulation_loss", "exit_loss_matrix"):
        getattr(reference, name)(EXITS, LABELS, **options)
        with pytest.raises(ValueError, match=r"labels: .*got 7 at \(0, 0, 0\)"):
            getattr(reference, name)(EXITS, torch.full_like(LABELS, 7), **options)
    for name in ("sr_f_loss", "sr_l_loss"):
        getattr(reference, name)(EXITS, backend="triton")


def test_the_segmentation_part_alone_has_weight_one(backend: Backend) -> None:
    """0.8 beside image-level predictions, as in the published code; without them MEA is the cross-entropies' sum."""
    exits, labels = [z.to(backend.device) for z in EXITS], LABELS.to(backend.device)
    mea = srf.mea_loss(exits, labels, backend=backend.name)
    criterion = srf.SelfRegulationLoss(sr_f_weight=0, sr_l_weight=0, backend=backend.name)
    assert_close(criterion(exits, labels).total, mea, 1e-6)
    predictions = [z.to(backend.device) for z in PREDICTIONS]
    of_images = srf.presence_loss(predictions, srf.presence_vector(labels, 5))
    assert_close(criterion(exits, labels, image_logits=predictions).total, 0.8 * mea + 0.2 * of_images, 1e-6)
    plain = reference.self_regulation_loss(exits, labels)
    assert_close(plain.mea, reference.mea_loss(exits, labels), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_image_level_losses_are_float32(dtype: torch.dtype) -> None:
    """Of halves as of others, whatever the default dtype is; computed in float32, too."""
    predictions = [z.to(dtype) for z in PREDICTIONS]
    out = srf.SelfRegulationLoss.published()(EXITS, LABELS, image_logits=predictions)
    exact = srf.SelfRegulationLoss.published()(EXITS, LABELS, image_logits=[z.double() for z in predictions])
    assert {x.dtype for x in (*out, *exact)} == {torch.float32}
    assert all(torch.allclose(a, e, rtol=1e-6) for a, e in zip(out, exact, strict=True))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert srf.presence_vector(LABELS, 5).dtype == reference.presence_vector(LABELS, 5).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_printing_a_criterion_shows_what_it_does() -> None:
    """Class weights, and that the SR terms are off."""
    weight = torch.tensor([1.0, 0.5])
    assert "class_weight=[1, 0.5]" in repr(srf.SelfRegulationLoss(class_weight=weight))
    assert "of 150 classes" in repr(srf.SelfRegulationLoss(class_weight=torch.ones(150)))
    assert "sr_enabled=False" in repr(srf.SelfRegulationLoss().enable_sr(False))
    assert "image_level_sr_l=True" in repr(srf.SelfRegulationLoss.published())
    assert "class_weight" not in repr(srf.SelfRegulationLoss())
    repr(srf.SelfRegulationLoss(class_weight=weight.to("meta")))


def test_what_the_objective_returns_adds_up() -> None:
    """total is the sum of the weighted parts; `mea` has the weights within MEA in it, and not its own."""
    weights = {"mea_weight": 0.5, "sr_f_weight": 0.25, "sr_l_weight": 0.125}
    out = srf.self_regulation_loss(EXITS, LABELS, seg_weight=0.3, exit_weights=[1, 2, 0.5], **weights)
    assert_close(out.mea, 0.3 * srf.mea_loss(EXITS, LABELS, exit_weights=[1, 2, 0.5]), 1e-6)
    assert_close(out.sr_f, srf.sr_f_loss(EXITS), 1e-6)
    assert_close(out.sr_l, srf.sr_l_loss(EXITS), 1e-6)
    parts: list[Tensor] = [w * part for w, part in zip(weights.values(), out[1:], strict=True)]
    assert_close(out.total, torch.stack(parts).sum(), 1e-6)


def test_presence_of_labels_of_any_rank() -> None:
    """(B,) as (B, L) and (B, H, W)."""
    labels = torch.tensor([0, 3, 255, 3])
    for shape in ((4,), (4, 1), (4, 1, 1)):
        assert torch.equal(srf.presence_vector(labels.view(shape), 4).argmax(1), torch.tensor([0, 3, 0, 3]))
        assert srf.presence_vector(labels.view(shape), 4).sum() == 3
    assert srf.presence_vector(labels[:0], 4).shape == (0, 4)
