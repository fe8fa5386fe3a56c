"""The reference equals the formulas of the paper, written here a second time and in another way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import gradients, in_layout, leaves, make_class_weight, make_exits, make_labels, make_pixel_weight, pyramid
from torch import Tensor

from selfreg_fast import reference

TARGETS = [(False, "soft"), (True, "soft"), (False, "argmax")]
TAUS = [0.05, 0.5, 1.0, 2.0, 2.7, 4.0, 100.0]
EXACT = {"rtol": 1e-12, "atol": 0.0}


def _exits(n: int, shape: Sequence[int], **kwargs: Any) -> list[Tensor]:
    return make_exits(n, shape, dtype=torch.float64, **kwargs)


# ------------------------------------------------------------------------------ one pixel at a time, in plain Python


def _softmax(z: Sequence[float]) -> list[float]:
    exponentials = [math.exp(v - max(z)) for v in z]
    return [u / sum(exponentials) for u in exponentials]


def _soft(s: Sequence[float], t: Sequence[float], tau: float, renormalize: bool, target: str) -> float:
    """L(t -> s) of one pixel."""
    if target == "argmax":
        return -math.log(_softmax(s)[max(range(len(t)), key=lambda c: t[c])])
    if renormalize:
        p, q = _softmax([v / tau for v in t]), _softmax([v / tau for v in s])
    else:
        p, q = [v ** (1 / tau) for v in _softmax(t)], [v ** (1 / tau) for v in _softmax(s)]
    return -(tau**2) * sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def _hard(s: Sequence[float], y: int, w: Sequence[float], smoothing: float) -> float:
    """Cross-entropy of one pixel with the label y, as F.cross_entropy defines class weights w and smoothing."""
    logs = [math.log(v) for v in _softmax(s)]
    spread = sum(wc * lc for wc, lc in zip(w, logs, strict=True)) / len(s)
    return -(1 - smoothing) * w[y] * logs[y] - smoothing * spread


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask_soft", [False, True])
@pytest.mark.parametrize(("renormalize", "target"), TARGETS)
def test_matrix_pixel_by_pixel(renormalize: bool, target: str, mask_soft: bool, reduction: str) -> None:
    """Every entry of the matrix, with all options at once, by loops over pixels and classes."""
    n, batch, classes, height, width, tau, smoothing, ignored = 3, 2, 4, 2, 3, 1.7, 0.15, 2
    exits = _exits(n, (batch, classes, height, width))
    labels = make_labels((batch, height, width), classes, ignore_index=ignored)
    w = make_pixel_weight((batch, height, width)).double()
    k = make_class_weight(classes).double()
    teachers = [2, 0]
    maps = torch.zeros(3, n, batch, height, width, dtype=torch.float64)
    norms = torch.zeros(3, dtype=torch.float64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                label, weight = labels[b, y, x].item(), w[b, y, x].item()
                counts = label != ignored
                norms[0] += weight * k[label].item() if counts else 0
                norms[1:] += weight if counts or not mask_soft else 0
                for i in range(n):
                    s = exits[i][b, :, y, x].tolist()
                    if counts:
                        maps[0, i, b, y, x] = weight * _hard(s, label, k.tolist(), smoothing)
                    for r, t in enumerate(teachers):
                        if t != i and (counts or not mask_soft):
                            teacher = exits[t][b, :, y, x].tolist()
                            maps[1 + r, i, b, y, x] = weight * _soft(s, teacher, tau, renormalize, target)
    expected = {"none": maps, "sum": maps.sum((2, 3, 4)), "mean": maps.sum((2, 3, 4)) / norms[:, None]}[reduction]
    actual = reference.exit_loss_matrix(
        exits,
        labels,
        teachers=teachers,
        temperature=tau,
        renormalize=renormalize,
        target=target,
        ignore_index=ignored,
        class_weight=k,
        label_smoothing=smoothing,
        pixel_weight=w,
        mask_soft=mask_soft,
        reduction=reduction,
    )
    torch.testing.assert_close(actual, expected, **EXACT)


# -------------------------------------------------------------------------------------------------- by hand


def _one_pixel(*channels: float) -> Tensor:
    return torch.tensor(channels, dtype=torch.float64)[None, :, None, None]


def test_raw_power_of_a_uniform_teacher_by_hand() -> None:
    """tau = 2, teacher (1/2, 1/2), student (1/4, 3/4): L = -4 sqrt(1/2) (log 1/2 + log sqrt(3/4))."""
    exits = [_one_pixel(0.0, 0.0), _one_pixel(0.0, math.log(3))]
    expected = -4 * math.sqrt(0.5) * (math.log(0.5) + 0.5 * math.log(0.75))
    assert reference.sr_f_loss(exits, temperature=2.0).item() == pytest.approx(expected, rel=1e-14)


def test_renormalised_by_hand() -> None:
    """tau = 2, teacher logits 2 log(1, 3), student uniform: L = 4 log 2, whatever the teacher."""
    exits = [_one_pixel(0.0, 2 * math.log(3)), _one_pixel(5.0, 5.0)]
    loss = reference.sr_f_loss(exits, temperature=2.0, renormalize=True)
    assert loss.item() == pytest.approx(4 * math.log(2), rel=1e-14)


def test_argmax_by_hand() -> None:
    """The teacher says class 1, to which the student gives 3/4: L = log(4/3), at any temperature."""
    exits = [_one_pixel(-1.0, 2.0), _one_pixel(0.0, math.log(3))]
    for tau in TAUS:
        loss = reference.sr_f_loss(exits, temperature=tau, target="argmax")
        assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-14)


def test_raw_target_of_a_uniform_teacher_sums_to_c_to_the_one_minus_one_over_tau() -> None:
    """P = C^(1 - 1/tau), not 1: with a uniform student the loss is tau P log C."""
    for classes in (2, 19, 150):
        flat = torch.zeros(1, classes, 1, 1, dtype=torch.float64)
        for tau in TAUS:
            loss = reference.sr_f_loss([flat, flat], temperature=tau)
            expected = tau * classes ** (1 - 1 / tau) * math.log(classes)
            assert loss.item() == pytest.approx(expected, rel=1e-10)


# -------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("tau", TAUS)
def test_renormalised_is_the_divergence_plus_the_entropy(tau: float) -> None:
    """tau^2 (KL(teacher || student) + H(teacher)), with PyTorch's own F.kl_div."""
    teacher, student = _exits(2, (2, 5, 3, 4))
    p = (teacher / tau).softmax(1)
    entropy = -torch.special.xlogy(p, p).sum()
    divergence = F.kl_div((student / tau).log_softmax(1), p, reduction="sum")
    expected = tau**2 * (divergence + entropy) / (2 * 3 * 4)
    actual = reference.sr_f_loss([teacher, student], temperature=tau, renormalize=True)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("tau", [t for t in TAUS if t >= 0.5])
def test_raw_power_as_written(tau: float) -> None:
    """-tau^2 mean sum_c sigma(t)_c^(1/tau) log(sigma(s)_c^(1/tau)), by softmax, pow and log."""
    teacher, student = _exits(2, (2, 5, 3, 4))
    p, q = teacher.softmax(1).pow(1 / tau), student.softmax(1).pow(1 / tau)
    expected = -(tau**2) * (p * q.log()).sum(1).mean()
    torch.testing.assert_close(reference.sr_f_loss([teacher, student], temperature=tau), expected, **EXACT)


def test_raw_and_renormalised_agree_at_temperature_one() -> None:
    """At tau = 1 both are F.cross_entropy with the teacher's probabilities as target."""
    teacher, student = _exits(2, (2, 5, 3, 4))
    expected = F.cross_entropy(student, teacher.softmax(1))
    for renormalize in (False, True):
        actual = reference.sr_f_loss([teacher, student], renormalize=renormalize)
        torch.testing.assert_close(actual, expected, **EXACT)


def test_argmax_is_cross_entropy_with_the_teachers_classes() -> None:
    """The published code's SR-F: F.cross_entropy(student, teacher.argmax(1))."""
    teacher, student = _exits(2, (2, 5, 3, 4))
    expected = F.cross_entropy(student, teacher.argmax(1))
    torch.testing.assert_close(reference.sr_f_loss([teacher, student], target="argmax"), expected, **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_row_is_cross_entropy(smoothing: float, weighted: bool, reduction: str) -> None:
    """Row 0 and MEA are F.cross_entropy, its reductions, class weights and smoothing included."""
    exits, labels = _exits(2, (2, 5, 3, 4)), make_labels((2, 3, 4), 5)
    weight = make_class_weight(5).double() if weighted else None
    kwargs = {"label_smoothing": smoothing, "reduction": reduction}
    expected = [F.cross_entropy(z, labels, weight, ignore_index=255, **kwargs) for z in exits]
    actual = reference.exit_loss_matrix(exits, labels, class_weight=weight, **kwargs)[0]
    torch.testing.assert_close(actual, torch.stack(expected), **EXACT)
    mea = reference.mea_loss(exits, labels, class_weight=weight, exit_weights=[0.5, 2.0], **kwargs)
    torch.testing.assert_close(mea, 0.5 * expected[0] + 2.0 * expected[1], **EXACT)


def test_sr_f_and_sr_l_are_sums_over_students() -> None:
    """SR-F: the first teaches all deeper ones; SR-L: the last all shallower ones; the matrix has them as rows."""
    exits = _exits(4, (2, 5, 3, 4))
    pair = {(t, s): reference.sr_f_loss([exits[t], exits[s]], temperature=2.0) for t in range(4) for s in range(4)}
    sr_f, sr_l = reference.sr_f_loss(exits, temperature=2.0), reference.sr_l_loss(exits, temperature=2.0)
    torch.testing.assert_close(sr_f, pair[0, 1] + pair[0, 2] + pair[0, 3], **EXACT)
    torch.testing.assert_close(sr_l, pair[3, 0] + pair[3, 1] + pair[3, 2], **EXACT)
    matrix = reference.exit_loss_matrix(exits, teachers=[-1, 1], temperature=2.0)
    zero = torch.zeros((), dtype=torch.float64)
    for row, teacher in enumerate([3, 1]):
        for i in range(4):
            expected = zero if i == teacher else pair[teacher, i]
            torch.testing.assert_close(matrix[1 + row, i], expected, **EXACT)
    assert not matrix[0].any()


def test_the_total_is_the_weighted_sum_of_its_parts() -> None:
    """total = l1 MEA + l2 SR-F + l3 SR-L, MEA = 0.8 CE + 0.2 BCE; a part without weight is left out."""
    exits, features = _exits(3, (2, 5, 3, 4)), _exits(3, (2, 8, 3, 4), seed=5)
    labels, image_logits = make_labels((2, 3, 4), 5), _exits(3, (2, 5), seed=6)
    present = torch.tensor([[float((labels[b] == c).any()) for c in range(5)] for b in range(2)], dtype=torch.float64)
    seg = sum(F.cross_entropy(z, labels, ignore_index=255) for z in exits)
    cls = sum(F.binary_cross_entropy(z.sigmoid(), present) for z in image_logits)
    out = reference.self_regulation_loss(
        exits,
        labels,
        features=features,
        image_logits=image_logits,
        mea_weight=0.3,
        sr_f_weight=0.5,
        sr_l_weight=0.7,
        temperature=2.0,
    )
    torch.testing.assert_close(out.mea, 0.8 * seg + 0.2 * cls, **EXACT)
    torch.testing.assert_close(out.sr_f, reference.sr_f_loss(features, temperature=2.0), **EXACT)
    torch.testing.assert_close(out.sr_l, reference.sr_l_loss(exits, temperature=2.0), **EXACT)
    torch.testing.assert_close(out.total, 0.3 * out.mea + 0.5 * out.sr_f + 0.7 * out.sr_l, **EXACT)
    only = reference.self_regulation_loss(exits, labels, mea_weight=None, sr_f_weight=None)
    assert only.mea == 0 and only.sr_f == 0
    torch.testing.assert_close(only.total, reference.sr_l_loss(exits), **EXACT)


def test_presence() -> None:
    """A class is present where any pixel of the image has it; the image-level losses are sigmoid cross-entropies."""
    labels = torch.tensor([[[0, 2], [2, 255]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    vector = reference.presence_vector(labels, 4)
    assert torch.equal(vector, torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]]))
    a, b, c = _exits(3, (2, 4))
    bce = F.binary_cross_entropy
    expected = sum(bce(z.sigmoid(), vector.double()) for z in (a, b, c))
    torch.testing.assert_close(reference.presence_loss([a, b, c], vector), expected, **EXACT)
    taught = bce(a.sigmoid(), c.sigmoid()) + bce(b.sigmoid(), c.sigmoid())
    torch.testing.assert_close(reference.presence_distillation_loss([a, b, c]), taught, **EXACT)
    inputs = leaves([a, b, c])
    grads = gradients(reference.presence_distillation_loss(inputs), inputs)
    assert grads[0].any() and grads[1].any() and not grads[2].any()


# -------------------------------------------------------------------------------------------------- gradients


def _onehot(index: Tensor, classes: int) -> Tensor:
    return F.one_hot(index, classes).movedim(-1, 1).double()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("renormalize", "target"), TARGETS)
def test_gradient_formulas(renormalize: bool, target: str, tau: float) -> None:
    """The student's gradient in closed form, and the teacher's where it is not detached."""
    inputs = leaves(_exits(2, (2, 5, 3, 4)))
    t, s = (z.detach() for z in inputs)
    pixels = 2 * 3 * 4
    kwargs = {"temperature": tau, "renormalize": renormalize, "target": target}
    grad_t = torch.zeros_like(t)
    if target == "argmax":
        grad_s = (s.softmax(1) - _onehot(t.argmax(1), 5)) / pixels
    elif renormalize:
        q, log = (t / tau).softmax(1), (s / tau).log_softmax(1)
        grad_s = tau / pixels * ((s / tau).softmax(1) - q)
        grad_t = -tau / pixels * (q * log - q * (q * log).sum(1, keepdim=True))
    else:
        p, log = (t.log_softmax(1) / tau).exp(), s.log_softmax(1)
        grad_s = tau / pixels * (p.sum(1, keepdim=True) * s.softmax(1) - p)
        grad_t = -1 / pixels * (p * log - t.softmax(1) * (p * log).sum(1, keepdim=True))
    close = {"rtol": 1e-11, "atol": 1e-13 * tau / pixels}
    learning = gradients(reference.sr_f_loss(inputs, detach_teacher=False, **kwargs), inputs)
    torch.testing.assert_close(learning, [grad_t, grad_s], **close)
    detached = gradients(reference.sr_f_loss(inputs, **kwargs), inputs)
    torch.testing.assert_close(detached, [torch.zeros_like(t), grad_s], **close)


def test_label_gradient_formula() -> None:
    """(1/M) (sigma(s) - onehot), 0 at ignored pixels."""
    inputs, labels = leaves(_exits(1, (2, 5, 3, 4))), make_labels((2, 3, 4), 5)
    valid = labels != 255
    onehot = _onehot(torch.where(valid, labels, 0), 5)
    expected = valid[:, None] * (inputs[0].detach().softmax(1) - onehot) / valid.sum()
    grads = gradients(reference.mea_loss(inputs, labels), inputs)
    torch.testing.assert_close(grads, [expected], rtol=1e-11, atol=1e-15)


def test_the_raw_power_is_least_where_the_student_equals_the_tempered_teacher() -> None:
    """Its gradient vanishes at s = t / tau, not at s = t."""
    (t,) = _exits(1, (2, 5, 3, 4))
    for tau in (0.5, 2.0, 4.0):
        inputs = leaves([t, t / tau])
        at_minimum = gradients(reference.sr_f_loss(inputs, temperature=tau), inputs)[1]
        inputs = leaves([t, t])
        at_teacher = gradients(reference.sr_f_loss(inputs, temperature=tau), inputs)[1]
        assert at_minimum.norm() < 1e-13 * at_teacher.norm()


# -------------------------------------------------------------------------------------------------- sizes, weights


@pytest.mark.parametrize("align_corners", [False, True])
def test_resizing_is_interpolation(align_corners: bool) -> None:
    """Exits of other sizes are resized by F.interpolate to `size`, else to the labels' size, else to the largest."""
    sizes = pyramid(3, (6, 9))
    exits, labels = _exits(3, (2, 5, 6, 9), sizes=sizes), make_labels((2, 8, 7), 5)

    def resized(size: Sequence[int]) -> list[Tensor]:
        return [F.interpolate(z, size=tuple(size), mode="bilinear", align_corners=align_corners) for z in exits]

    kwargs = {"align_corners": align_corners}
    largest = max(sizes, key=lambda s: s[0] * s[1])
    torch.testing.assert_close(reference.sr_l_loss(exits, **kwargs), reference.sr_l_loss(resized(largest)), **EXACT)
    torch.testing.assert_close(
        reference.sr_l_loss(exits, size=(4, 11), **kwargs), reference.sr_l_loss(resized((4, 11))), **EXACT
    )
    actual = reference.self_regulation_loss(exits, labels, **kwargs)
    torch.testing.assert_close(actual, reference.self_regulation_loss(resized((8, 7)), labels), **EXACT)


def test_reductions_agree() -> None:
    """The maps sum up to the sum, and the sum over the weights that count is the mean."""
    exits, labels, weight = _exits(3, (2, 5, 3, 4)), make_labels((2, 3, 4), 5), make_pixel_weight((2, 3, 4))
    maps, total, mean = (
        reference.exit_loss_matrix(exits, labels, teachers=[0, 1], pixel_weight=weight, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(maps.sum((2, 3, 4)), total, **EXACT)
    weight = weight.double()
    norms = torch.stack([weight[labels != 255].sum(), weight.sum(), weight.sum()])
    torch.testing.assert_close(total / norms[:, None], mean, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    """The loss of half-precision exits is that of the same numbers in float32."""
    exits, labels = make_exits(3, (2, 5, 3, 4), dtype=dtype), make_labels((2, 3, 4), 5)
    actual = reference.exit_loss_matrix(exits, labels, teachers=[0], temperature=2.0)
    expected = reference.exit_loss_matrix([z.float() for z in exits], labels, teachers=[0], temperature=2.0)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_other_ranks_are_pixels_in_a_row() -> None:
    """(B, C), (B, C, L) and (B, C, D, H, W) have the losses of the same pixels in (B, C, H, W)."""
    flat, labels = _exits(3, (24, 5)), make_labels((24,), 5)
    expected = reference.exit_loss_matrix(flat, labels, teachers=[0])
    for spatial in [(6,), (2, 3), (1, 3, 2)]:
        exits = [z.reshape(4, *spatial, 5).movedim(-1, 1) for z in flat]
        actual = reference.exit_loss_matrix(exits, labels.reshape(4, *spatial), teachers=[0])
        torch.testing.assert_close(actual, expected, **EXACT)
        exits = [in_layout(z, "transposed") for z in exits]
        torch.testing.assert_close(
            reference.exit_loss_matrix(exits, labels.reshape(4, *spatial), teachers=[0]), expected, **EXACT
        )


# -------------------------------------------------------------------------------------------------- extreme logits


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("renormalize", "target"), TARGETS)
def test_masked_classes_are_as_if_they_were_not_there(renormalize: bool, target: str, tau: float) -> None:
    """-inf for a class in teacher and student: value and gradients are those of the other classes alone."""
    kwargs = {"temperature": tau, "renormalize": renormalize, "target": target, "detach_teacher": False}
    exits, labels = _exits(3, (2, 5, 3, 4)), make_labels((2, 3, 4), 4)
    few, masked = leaves([z[:, :4] for z in exits]), leaves([z.clone() for z in exits])
    for z in masked:
        z.data[:, 4] = -math.inf
    expected = reference.self_regulation_loss(few, labels, **kwargs)
    actual = reference.self_regulation_loss(masked, labels, **kwargs)
    torch.testing.assert_close(actual, expected, **EXACT)
    grads, expected_grads = gradients(actual.total, masked), gradients(expected.total, few)
    for g, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g[:, :4], e, **EXACT)
        assert not g[:, 4].any()
