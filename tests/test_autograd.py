"""Gradients as users of autograd need them: numerically right, of every output, repeatedly, for any of the inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import (
    RELATIVE,
    Backend,
    assert_close,
    gradients,
    leaves,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import selfreg_fast as srf
from selfreg_fast import reference

SHAPE = (2, 3, 2, 3)
TARGETS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0},
    {"temperature": 0.6},
    {"temperature": 3.0, "renormalize": True},
    {"target": "argmax"},
]
targets = pytest.mark.parametrize("target", TARGETS, ids=["tau1", "tau2", "tau0.6", "renormalised", "argmax"])
PARTS = ["total", "mea", "sr_f", "sr_l"]


def _exits(backend: Backend, n: int = 3, dtype: torch.dtype = torch.float64, **kwargs: Any) -> list[Tensor]:
    return make_exits(n, SHAPE, dtype=dtype, device=backend.device, scale=1.0, **kwargs)


def _labels(backend: Backend) -> Tensor:
    return make_labels((2, 2, 3), 3, device=backend.device)


def _gradcheck(backend: Backend, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    # The fast mode compares one random direction, not every element; gradients that are undefined no kernel sees.
    few = {"fast_mode": True, "check_undefined_grad": False} if backend.interpreted else {}
    assert torch.autograd.gradcheck(function, tuple(leaves(inputs)), eps=1e-6, atol=1e-7, rtol=1e-5, **few)


# ------------------------------------------------------------------------------------------ finite differences


@targets
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_the_matrix(backend: Backend, reduction: str, target: dict[str, Any]) -> None:
    """All entries, all exits, teachers that learn, every weight in use."""
    labels = _labels(backend)
    kwargs = {
        "teachers": [0, 2],
        "class_weight": make_class_weight(3, device=backend.device),
        "label_smoothing": 0.1,
        "pixel_weight": make_pixel_weight((2, 2, 3), device=backend.device),
        "reduction": reduction,
        "detach_teacher": False,
        "backend": backend.name,
        **target,
    }
    _gradcheck(backend, lambda *e: srf.exit_loss_matrix(e, labels, **kwargs), _exits(backend))


@targets
def test_gradcheck_of_detached_teachers(backend: Backend, target: dict[str, Any]) -> None:
    """The students' gradients, the teacher being a constant."""
    exits = _exits(backend)
    kwargs = {"backend": backend.name, **target}
    _gradcheck(backend, lambda *e: srf.sr_f_loss([exits[0], *e], **kwargs), exits[1:])
    _gradcheck(backend, lambda *e: srf.sr_l_loss([*e, exits[2]], **kwargs), exits[:2])


@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck_of_resized_exits(backend: Backend, align_corners: bool) -> None:
    """Through the interpolation, from sizes below and above the output's."""
    labels = make_labels((2, 3, 4), 3, device=backend.device)
    kwargs = {"temperature": 2.0, "detach_teacher": False, "align_corners": align_corners, "backend": backend.name}
    exits = _exits(backend, sizes=[(2, 2), (3, 4), (5, 3)])
    _gradcheck(backend, lambda *e: srf.self_regulation_loss(e, labels, **kwargs).total, exits)


@targets
def test_gradcheck_of_the_total_and_its_parts(backend: Backend, target: dict[str, Any]) -> None:
    """Four outputs of one launch, each differentiable; features and image-level predictions included."""
    labels = _labels(backend)
    features = make_exits(2, (2, 4, 2, 3), dtype=torch.float64, device=backend.device, scale=1.0, seed=5)
    image_logits = make_exits(3, (2, 3), dtype=torch.float64, device=backend.device, scale=1.0, seed=6)
    kwargs = {"detach_teacher": False, "mea_weight": 0.5, "sr_f_weight": 2.0, "backend": backend.name, **target}
    _gradcheck(backend, lambda *e: srf.self_regulation_loss(e, labels, **kwargs), _exits(backend))
    _gradcheck(
        backend,
        lambda *e: srf.self_regulation_loss(e[:3], labels, features=e[3:5], image_logits=e[5:], **kwargs),
        [*_exits(backend), *features, *image_logits],
    )


# ------------------------------------------------------------------------------------------ the total and its parts


def _both(backend: Backend, combine: Callable[[srf.SelfRegulationOutput], Tensor], **kwargs: Any) -> None:
    """combine(output) has the reference's value and gradients."""
    labels = _labels(backend)
    kwargs = {"temperature": 2.0, "mea_weight": 0.7, "sr_f_weight": 1.3, "sr_l_weight": 0.4, **kwargs}
    exact, actual = leaves(_exits(backend)), leaves(_exits(backend))
    expected = combine(reference.self_regulation_loss(exact, labels, **kwargs))
    out = combine(srf.self_regulation_loss(actual, labels, backend=backend.name, **kwargs))
    assert_close(out.detach(), expected.detach(), 1e-12)
    expected_grads = gradients(expected, exact, torch.ones_like(expected))
    for a, e in zip(gradients(out, actual, torch.ones_like(out)), expected_grads, strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("detach_teacher", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone(backend: Backend, part: str, reduction: str, detach_teacher: bool) -> None:
    """The gradient of a part is not that of the total whose gradients the launch has already written."""
    _both(backend, lambda out: getattr(out, part), reduction=reduction, detach_teacher=detach_teacher)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_total_and_its_parts_together(backend: Backend, reduction: str) -> None:
    """Gradients of the total and of its parts add up."""
    _both(backend, lambda out: out.total + 0.5 * out.mea - 3 * out.sr_f + out.sr_l.square(), reduction=reduction)


@pytest.mark.parametrize("factor", [0.0, 0.5, -3.0, 65536.0])
def test_an_outer_factor(backend: Backend, factor: float) -> None:
    """Loss scaling, accumulation steps, a weight of 0."""
    _both(backend, lambda out: factor * out.total)


@pytest.mark.parametrize(
    "weights",
    [
        {"mea_weight": 0.0},
        {"mea_weight": None},
        {"sr_f_weight": 0.0, "sr_l_weight": 0.0},
        {"sr_f_weight": None, "sr_l_weight": None},
        {"mea_weight": None, "sr_f_weight": None},
        {"mea_weight": None, "sr_f_weight": 0.0},
        {"sr_l_weight": -1.0},
        {"seg_weight": 0.0},
        {"exit_weights": [0.0, 1.0, 0.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("part", PARTS)
def test_weights_of_zero_and_parts_left_out(backend: Backend, part: str, weights: dict[str, Any]) -> None:
    """A weight of 0 keeps the part differentiable on its own; None leaves it out."""
    _both(backend, lambda out: getattr(out, part), **weights)


def test_a_part_of_weight_zero_may_be_infinite(backend: Backend) -> None:
    """0 x inf is not computed: a term switched off by its weight cannot break the total."""
    exits = _exits(backend)
    exits[1][:, 0] = -torch.inf  # the teachers still believe in class 0: SR-F and SR-L are infinite
    labels = torch.ones(2, 2, 3, dtype=torch.int64, device=backend.device)
    inputs = leaves(exits)
    out = srf.self_regulation_loss(inputs, labels, sr_f_weight=0.0, sr_l_weight=0.0, backend=backend.name)
    assert out.sr_f.isinf() and out.sr_l.isinf() and out.total.isfinite()
    assert all(g.isfinite().all() for g in gradients(out.total, inputs))


# ------------------------------------------------------------------------------------------ again and again


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again_under_retain_graph(backend: Backend, reduction: str, dtype: torch.dtype, factor: float) -> None:
    """The second and third backward give the first one's gradients: nothing is scaled twice."""
    exits, labels = leaves(_exits(backend, dtype=dtype)), _labels(backend)
    total = srf.self_regulation_loss(exits, labels, reduction=reduction, backend=backend.name).total
    grad_output = torch.full_like(total, factor)
    first = gradients(total, exits, grad_output, retain_graph=True)
    expected = [g.clone() for g in first]
    for retain_graph in (True, False):
        again = gradients(total, exits, grad_output, retain_graph=retain_graph)
        assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))


def _right_or_refused(backward: Callable[[], list[Tensor]], expected: Sequence[Tensor]) -> None:
    try:
        actual = backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_gradients_changed_in_place_do_no_harm(backend: Backend) -> None:
    """Under retain_graph, after writing into the gradients: the right ones again, or PyTorch's error; no wrong ones."""
    exits, labels = leaves(_exits(backend)), _labels(backend)
    total = srf.self_regulation_loss(exits, labels, backend=backend.name).total
    first = gradients(total, exits, retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    _right_or_refused(lambda: gradients(total, exits), expected)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_accumulate_in_leaves(backend: Backend, factor: float) -> None:
    """Three times backward() on leaves is three times the gradient: .grad must not be the memory of what is saved."""
    exits, labels = leaves(_exits(backend)), _labels(backend)
    total = srf.self_regulation_loss(exits, labels, backend=backend.name).total
    expected = gradients(factor * total, exits, retain_graph=True)
    for _ in range(3):
        (factor * total).backward(retain_graph=True)
    for z, e in zip(exits, expected, strict=True):
        assert_close(z.grad, 3 * e, 1e-12)


def test_after_the_graph_is_gone_backward_is_refused(backend: Backend) -> None:
    """Without retain_graph a second backward is PyTorch's own error."""
    exits, labels = leaves(_exits(backend)), _labels(backend)
    total = srf.self_regulation_loss(exits, labels, backend=backend.name).total
    total.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_exits_changed_in_place_are_noticed(backend: Backend) -> None:
    """A backward that needs exits overwritten in the meantime is PyTorch's own error, never a wrong gradient."""
    exits = leaves(_exits(backend))

    def backward(overwrite: bool) -> list[Tensor]:
        inner = [2 * z for z in exits]
        loss = srf.sr_l_loss(inner, temperature=2.0, reduction="none", backend=backend.name)
        if overwrite:
            inner[0].zero_()
        return gradients(loss, exits, torch.ones_like(loss))

    expected = backward(overwrite=False)
    _right_or_refused(lambda: backward(overwrite=True), expected)


def test_two_losses_on_the_same_exits(backend: Backend) -> None:
    """Two launches on the same exits in one graph: the gradients add up."""
    labels = _labels(backend)

    def objective(module: Any, exits: list[Tensor], **kwargs: Any) -> Tensor:
        return (
            2 * module.mea_loss(exits, labels, **kwargs)
            + module.sr_f_loss(exits, temperature=2.0, **kwargs)
            + module.self_regulation_loss(exits, labels, **kwargs).total
        )

    exact, actual = leaves(_exits(backend)), leaves(_exits(backend))
    expected = gradients(objective(reference, exact), exact)
    for a, e in zip(gradients(objective(srf, actual, backend=backend.name), actual), expected, strict=True):
        assert_close(a, e, 1e-12)


# ------------------------------------------------------------------------------------------ any subset of inputs


@pytest.mark.parametrize("detach_teacher", [True, False])
@pytest.mark.parametrize("learning", [(), (0,), (1,), (2,), (0, 2)])
def test_exits_that_need_no_gradient(backend: Backend, learning: tuple[int, ...], detach_teacher: bool) -> None:
    """Frozen exits get none, the others the same as ever; without any, the loss has no graph."""
    labels = _labels(backend)
    kwargs = {"temperature": 2.0, "detach_teacher": detach_teacher}
    exact = leaves(_exits(backend))
    expected_total = reference.self_regulation_loss(exact, labels, **kwargs).total
    expected = gradients(expected_total, exact)
    exits = _exits(backend)
    for i in learning:
        exits[i].requires_grad_()
    total = srf.self_regulation_loss(exits, labels, backend=backend.name, **kwargs).total
    assert_close(total.detach(), expected_total.detach(), 1e-12)
    assert total.requires_grad == bool(learning)
    if learning:
        total.backward()
    for i, z in enumerate(exits):
        assert (z.grad is not None) == (i in learning)
        if i in learning:
            assert_close(z.grad, expected[i], 1e-12)


@pytest.mark.parametrize("loss", ["sr_f_loss", "sr_l_loss"])
def test_a_detached_teacher_gets_nothing(backend: Backend, loss: str) -> None:
    """Neither value nor zeros: autograd sees no path to the teacher."""
    exits = leaves(_exits(backend))
    grads = torch.autograd.grad(getattr(srf, loss)(exits, backend=backend.name), exits, allow_unused=True)
    teacher = 0 if loss == "sr_f_loss" else 2
    for i, g in enumerate(grads):
        assert (g is None or not g.any()) == (i == teacher)


BY_A_WEIGHT: dict[str, Callable[..., Tensor]] = {
    **{
        part: lambda e, y, part=part, **k: getattr(srf.self_regulation_loss(e, y, temperature=2.0, **k), part)
        for part in PARTS
    },
    "learning teachers": lambda e, y, **k: srf.self_regulation_loss(e, y, detach_teacher=False, **k).total,
    "matrix": lambda e, y, **k: srf.exit_loss_matrix(e, y, teachers=[0, 2], renormalize=True, temperature=2.0, **k),
    "total and part": lambda e, y, **k: torch.stack(srf.self_regulation_loss(e, y, **k)[:2]),
    "map": lambda e, y, **k: srf.mea_loss(e, y, reduction="none", **k),
    "resized": lambda e, y, **k: srf.sr_l_loss([*e[:2], e[2][..., :2, :2]], size=(3, 5), **k),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", BY_A_WEIGHT)
def test_a_gradient_differentiated_by_a_learned_weight(backend: Backend, case: str, dtype: torch.dtype) -> None:
    """GradNorm: the norm of the gradient of w * loss, differentiated by w, has the loss's part, of any output."""
    labels = make_labels((SHAPE[0], *SHAPE[2:]), 3, device=backend.device)

    def by_weight(name: str, dtype: torch.dtype) -> list[Tensor]:
        mixing = torch.linspace(-1, 1, 9, dtype=dtype, device=backend.device).view(3, 3).requires_grad_()
        features = [z.to(dtype) for z in _exits(backend)]
        exits = [torch.einsum("oc,bc...->bo...", mixing, z) for z in features]
        loss = BY_A_WEIGHT[case](exits, labels, backend=name)
        w = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss).requires_grad_()
        (g,) = torch.autograd.grad((w * loss).sum(), mixing, create_graph=True)
        (by_w,) = torch.autograd.grad(g.double().norm(), w, retain_graph=True)
        if backend.fused and name != "reference":
            with pytest.raises(RuntimeError, match="selfreg_fast.*reference"):
                g.norm().backward()
        return [g.detach(), by_w]

    exact = by_weight("reference", torch.float64)
    given = by_weight(backend.name, dtype)
    # Some roundings one after the other: of the exits, their gradients and the sums over pixels.
    tolerance = 4 * RELATIVE[dtype]
    for a, e in zip(given, exact, strict=True):
        assert_close(a, e, tolerance)


def test_gradients_handed_out_stay_as_they_are(backend: Backend) -> None:
    """A later backward of the same graph scales none of those that an earlier one gave, be they tracked or not."""
    exits = leaves(_exits(backend))
    labels = make_labels((SHAPE[0], *SHAPE[2:]), 3, device=backend.device)
    w = torch.tensor(0.3, dtype=torch.float64, device=backend.device, requires_grad=True)
    total = srf.self_regulation_loss(exits, labels, backend=backend.name).total
    first = torch.autograd.grad(total, exits, retain_graph=True)
    tracked = torch.autograd.grad(w * total, exits, create_graph=True)
    before = [g.clone() for g in first]
    five = torch.autograd.grad(5 * total, exits)
    norm = sum(g.square().sum() for g in before)
    for g, b, f in zip(first, before, five, strict=True):
        assert torch.equal(g, b)
        assert_close(f, 5 * b, 1e-12)
    (by_w,) = torch.autograd.grad(sum(g.square().sum() for g in tracked), w)
    assert_close(by_w, 2 * w.detach() * norm, 1e-10)


@pytest.mark.parametrize("part", PARTS)
def test_a_third_derivative_is_right_or_refused_by_name(backend: Backend, part: str) -> None:
    """The derivative by a learned weight is a function of the exits, too."""
    exits = leaves(_exits(backend))
    labels = make_labels((SHAPE[0], *SHAPE[2:]), 3, device=backend.device)
    w = torch.ones((), dtype=torch.float64, device=backend.device, requires_grad=True)
    loss = getattr(srf.self_regulation_loss(exits, labels, backend=backend.name), part)
    grads = torch.autograd.grad(w * loss, exits, create_graph=True, allow_unused=True)
    (by_w,) = torch.autograd.grad(sum(g.sin().sum() for g in grads if g is not None), w, create_graph=True)
    assert by_w.requires_grad
    if backend.fused:
        with pytest.raises(RuntimeError, match="selfreg_fast.*reference"):
            torch.autograd.grad(by_w, exits, allow_unused=True)
    else:
        assert any(g is not None and g.any() for g in torch.autograd.grad(by_w, exits, allow_unused=True))


def test_losses_without_a_gradient_have_no_second(backend: Backend) -> None:
    """Zeros, where nothing that is weighted depends on an exit."""
    exits = leaves(_exits(backend, n=1))
    losses = srf.exit_loss_matrix(exits, teachers=(0,), detach_teacher=False, backend=backend.name)
    w = torch.rand_like(losses).requires_grad_()
    weighted = (w * losses).sum()
    grads = torch.autograd.grad(weighted, exits, create_graph=True, allow_unused=True)
    total = sum((g.sum() for g in grads if g is not None), start=0 * w.sum())
    (by_w,) = torch.autograd.grad(total, w)
    assert not by_w.any()


@pytest.mark.parametrize("detach_teacher", [True, False])
def test_the_same_tensor_given_twice(backend: Backend, detach_teacher: bool) -> None:
    """As teacher and student, or as two students: its gradients add up."""
    labels = _labels(backend)

    def objective(module: Any, inputs: list[Tensor], **kwargs: Any) -> Tensor:
        a, b = inputs
        kwargs = {"temperature": 2.0, "detach_teacher": detach_teacher, **kwargs}
        return module.self_regulation_loss([a, b, b, a], labels, **kwargs).total

    exact, actual = leaves(_exits(backend, 2)), leaves(_exits(backend, 2))
    expected = gradients(objective(reference, exact), exact)
    for a, e in zip(gradients(objective(srf, actual, backend=backend.name), actual), expected, strict=True):
        assert_close(a, e, 1e-12)


def test_a_tuple_is_a_sequence_too(backend: Backend) -> None:
    """Networks return tuples."""
    exits = _exits(backend)
    assert torch.equal(srf.sr_l_loss(tuple(exits), backend=backend.name), srf.sr_l_loss(exits, backend=backend.name))


# ------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_does_not_depend_on_the_gradient(backend: Backend, mode: Callable[[], Any]) -> None:
    """no_grad and inference_mode give the very bits of the training value, without a graph."""
    labels = _labels(backend)
    expected = srf.self_regulation_loss(leaves(_exits(backend)), labels, backend=backend.name)
    with mode():
        actual = srf.self_regulation_loss(_exits(backend), labels, backend=backend.name)
    assert not actual.total.requires_grad
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(backend: Backend, use_reentrant: bool) -> None:
    """Under activation checkpointing the gradients are the same bits."""
    labels = _labels(backend)

    def objective(*exits: Tensor) -> Tensor:
        return srf.self_regulation_loss([2 * z for z in exits], labels, temperature=2.0, backend=backend.name).total

    plain, saved = leaves(_exits(backend)), leaves(_exits(backend))
    expected = gradients(objective(*plain), plain)
    checkpoint(objective, *saved, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(z.grad, e) for z, e in zip(saved, expected, strict=True))


def test_anomaly_mode(backend: Backend) -> None:
    """Anomaly detection finds nothing in a sound backward."""
    exits = leaves(_exits(backend))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        anomaly = torch.autograd.detect_anomaly(check_nan=True)
    with anomaly:
        srf.self_regulation_loss(exits, _labels(backend), backend=backend.name).total.backward()


def test_training_lowers_the_loss(backend: Backend) -> None:
    """Fifteen steps of gradient descent on the exits: the sign is right, every exit learns the labels."""
    exits, labels = leaves(_exits(backend, dtype=torch.float32)), _labels(backend)
    optimizer = torch.optim.SGD(exits, lr=2.0)
    history = []
    for _ in range(15):
        out = srf.self_regulation_loss(exits, labels, temperature=2.0, backend=backend.name)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        history.append(out)
    assert history[-1].mea < 0.5 * history[0].mea
    assert history[-1].total < 0.8 * history[0].total
