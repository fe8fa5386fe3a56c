"""Random cases on every backend: the reference's values and gradients, and what may change neither.

The profile `long` (HYPOTHESIS_PROFILE) tries 10,000 cases; hypothesis then steers towards larger errors.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings, target
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    Backend,
    eighth,
    gradients,
    in_double,
    in_layout,
    leaves,
    magnitudes,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    share_of_bound,
    share_where_rounded,
    upstream,
    value_and_gradients,
)
from torch import Tensor

import selfreg_fast as srf
from selfreg_fast import reference

Case = dict[str, Any]
fewer = settings(max_examples=settings.default.max_examples // 6)

SIDES = st.integers(1, 12)
SPATIAL = st.one_of(
    st.lists(SIDES, max_size=3),
    st.lists(SIDES, min_size=2, max_size=2),  # the usual rank, of which exits are resized
    st.tuples(st.integers(1, 3), st.integers(30, 300)).map(list),  # across the borders of tiles
)
OPTIONS = {
    "temperature": st.one_of(st.sampled_from([1, 2, 3, 4]), st.floats(0.3, 10)),
    "renormalize": st.booleans(),
    "target": st.sampled_from(["soft", "soft", "argmax"]),
    "ignore_index": st.sampled_from([255, 0, -1, -100]),
    "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "detach_teacher": st.booleans(),
    "align_corners": st.booleans(),
}


@st.composite
def cases(
    draw: st.DrawFn, exits: int = 1, batch: int = 0, labelled: bool = False, resized: bool = True, **fixed: Any
) -> Case:
    """Exits of any number, rank, size, layout, dtype and scale, and any options; at least as many as said here."""
    n = draw(st.integers(exits, 9))
    labelled = labelled or draw(st.booleans())
    shape = (draw(st.integers(batch, 3)), *draw(SPATIAL))
    layout, sizes = draw(st.sampled_from(LAYOUTS)), None
    if resized and len(shape) == 3 and layout != "expanded" and draw(st.booleans()):
        any_size = st.tuples(st.integers(1, 20), st.integers(1, 20))
        some = st.one_of(st.just(shape[1:]), st.just(eighth(1, shape[1:])[0]), any_size)
        sizes = draw(st.lists(some, min_size=n, max_size=n))
    return {
        "n": n,
        "channels": draw(st.integers(1, 40)),
        "shape": shape,
        "sizes": sizes,
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])),
        "layout": layout,
        "scale": draw(st.sampled_from([0.3, 3.0, 30.0])),
        "seed": draw(st.integers(0, 10**6)),
        "kind": draw(st.sampled_from(["one", "random", "expanded"])),
        "labels": draw(st.sampled_from([torch.uint8, torch.int32, torch.int64])) if labelled else None,
        "pixel_weight": draw(st.booleans()),
        "class_weight": draw(st.booleans()),
        "teachers": draw(st.permutations(range(n)))[: draw(st.integers(0, 3))],
        "mask_soft": labelled and draw(st.booleans()),
        **{name: draw(values) for name, values in OPTIONS.items()},
        **fixed,
    }


OBJECTIVES = st.fixed_dictionaries(
    {
        "weights": st.tuples(*[st.sampled_from([1.0, 0.7, -2.0, 0.0, None])] * 3),
        "parts": st.sampled_from([(1, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 0.5, -3, 2)]),
        "features": st.booleans(),
    }
)


# What failed is made of this, the simplest case.
SIMPLE: Case = {
    "n": 2,
    "channels": 2,
    "shape": (1,),
    "sizes": None,
    "dtype": torch.float32,
    "layout": "contiguous",
    "scale": 0.3,
    "seed": 0,
    "kind": "one",
    "labels": torch.uint8,
    "pixel_weight": False,
    "class_weight": False,
    "teachers": [0, -1],
    "mask_soft": False,
    "temperature": 1,
    "renormalize": False,
    "target": "soft",
    "ignore_index": 255,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "detach_teacher": True,
    "align_corners": False,
}


def _left_out(backend: Backend, case: Case, of: int = 6) -> bool:
    """Triton's interpreter is slow: of the small cases it gets one of so many."""
    work = case["n"] * (1 + len(case["teachers"])) * case["channels"]
    small = work <= 96 and math.prod(case["shape"]) <= 256
    return backend.interpreted and not (small and zlib.crc32(repr(case).encode()) % of == 0)


def _arguments(backend: Backend, case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """The exits of a case, and the matrix's other arguments."""
    (batch, *spatial), channels, sizes, seed = case["shape"], case["channels"], case["sizes"], case["seed"]
    place = {"device": backend.device, "layout": case["layout"]}
    shape = (batch, channels, *spatial)
    exits = make_exits(case["n"], shape, dtype=case["dtype"], sizes=sizes, scale=case["scale"], seed=seed, **place)
    kwargs = {name: case[name] for name in ("teachers", "mask_soft", *OPTIONS)}
    if sizes:
        kwargs["size"] = tuple(spatial)
    if case["labels"] is not None:
        how = {"dtype": case["labels"], "ignore_index": case["ignore_index"], "seed": seed}
        kwargs["labels"] = make_labels(case["shape"], channels, **how, **place)
    if case["pixel_weight"]:
        kwargs["pixel_weight"] = make_pixel_weight(case["shape"], seed=seed, **place)
    if case["class_weight"]:
        kwargs["class_weight"] = make_class_weight(channels, device=backend.device)
    return exits, kwargs


def _loss_scale(case: Case) -> float:
    """A mean gradient in half precision is multiplied by a loss scaler, here by the number of pixels."""
    return math.prod(case["shape"]) if case["dtype"].itemsize == 2 and case["reduction"] == "mean" else 1


def _share_of_bound(
    backend: Backend,
    case: Case,
    exits: list[Tensor],
    actual: list[Tensor],
    exact: list[Tensor],
    added: list[Tensor],
) -> float:
    """That of support.py, with its leeway where logits are rounded on their way.

    Kernels divide differences of logits, and interpolate at exact positions. The reference does not, so that float64
    cannot be told better.
    """
    sizes, exactly = case["sizes"], backend.fused and case["dtype"] != torch.float64
    if exactly and not sizes:
        return share_of_bound(actual, exact, added, case["dtype"])
    positions = bool(sizes) and not exactly
    return share_where_rounded(exits, actual, exact, added, case["shape"][1:], case["temperature"], positions)


def _decided(case: Case, teachers: list[Tensor]) -> bool:
    """Whether rounding cannot decide which class is a teacher's most likely, at any pixel where it is resized."""
    if case["target"] != "argmax" or not case["sizes"] or case["channels"] == 1 or not case["shape"][0]:
        return True
    how = {"size": case["shape"][1:], "mode": "bilinear", "align_corners": case["align_corners"]}
    best = [F.interpolate(z.double(), **how).topk(2, 1).values for z in teachers]
    return all((b[:, 0] - b[:, 1]).min() > 1e-4 * case["scale"] for b in best)


# ------------------------------------------------------------------------------------------ values and gradients


@given(case=cases())
def test_the_matrix_equals_the_reference(backend: Backend, case: Case) -> None:
    """Value and every gradient, as exactly as is promised."""
    if _left_out(backend, case):
        return
    exits, kwargs = _arguments(backend, case)
    assume(_decided(case, [exits[t] for t in case["teachers"]]))
    exactly, kind, factor = in_double(kwargs), case["kind"], _loss_scale(case)
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, **exactly), [z.double() for z in exits], kind, factor
    )
    actual = value_and_gradients(lambda e: srf.exit_loss_matrix(e, backend=backend.name, **kwargs), exits, kind, factor)
    added = magnitudes(exits, factor * upstream(kind, exact[0]), **exactly)
    _assert_within_bound(backend, case, exits, actual, exact, added)


@given(case=cases(exits=2, labelled=True, teachers=[0, -1], mask_soft=False), objective=OBJECTIVES)
# The deepest exit learned nothing from MEA alone where MEA had no part in the total.
@example(case=SIMPLE, objective={"weights": (0.0, 1.0, 1.0), "parts": (0, 1, 0, 0), "features": True})
# The map of a part left out was a scalar.
@example(
    case=SIMPLE | {"reduction": "none"},
    objective={"weights": (None, 1.0, 1.0), "parts": (0, 1, 0, 0), "features": False},
)
def test_the_objective_equals_the_reference(backend: Backend, case: Case, objective: Case) -> None:
    """The total, whose gradient the forward launch writes, its parts, and sums of them; also with features."""
    if _left_out(backend, {**case, **objective}, 12):
        return
    exits, kwargs = _arguments(backend, case)
    n, kind, factor = case["n"], case["kind"], _loss_scale(case)
    of_features = {**case, "channels": case["channels"] + 2, "seed": case["seed"] + 1, "class_weight": False}
    features = _arguments(backend, of_features)[0] if objective["features"] else []
    assume(_decided(case, [exits[0], exits[-1]]) and _decided(of_features, features[:1]))
    for name in ("teachers", "mask_soft"):
        del kwargs[name]
    exit_weights = [0.5 + i for i in range(n)]
    weights = dict(zip(("mea_weight", "sr_f_weight", "sr_l_weight"), objective["weights"], strict=True))

    def loss(module: Any, e: list[Tensor], **more: Any) -> Tensor:
        more |= weights | {"exit_weights": exit_weights, "features": e[n:] or None}
        out = module.self_regulation_loss(e[:n], **more)
        return sum(part * share for part, share in zip(out, objective["parts"], strict=True) if share)

    exactly, inputs = in_double(kwargs), exits + features
    exact = value_and_gradients(lambda e: loss(reference, e, **exactly), [z.double() for z in inputs], kind, factor)
    actual = value_and_gradients(lambda e: loss(srf, e, backend=backend.name, **kwargs), inputs, kind, factor)

    # How often each part counts, and so each loss of the matrix.
    total, *alone = map(abs, objective["parts"])
    mea, sr_f, sr_l = (0 if w is None else total * abs(w) + a for w, a in zip(objective["weights"], alone, strict=True))
    often = torch.tensor([[0.8 * mea * w for w in exit_weights], [0] + [sr_f] * (n - 1), [sr_l] * (n - 1) + [0]])
    given = factor * upstream(kind, exact[0]).abs()
    added = [torch.zeros_like(exact[0])]
    soft = {k: v for k, v in exactly.items() if k not in ("labels", "class_weight")}
    for e, teachers, times, options in (
        (exits, [0, -1], often * torch.tensor([[1], [not features], [1]]), exactly),
        (features, [0], often[:2] * torch.tensor([[0], [1]]), soft),
    ):
        if e:
            times = times.to(given).view(*times.shape, *[1] * given.dim())
            losses, *of_gradients = magnitudes(e, times * given, teachers=teachers, **options)
            losses = losses + reference.exit_loss_matrix([z.double() for z in e], teachers=teachers, **options)
            added = [added[0] + (times * losses).sum((0, 1)), *added[1:], *of_gradients]
    _assert_within_bound(backend, case, inputs, actual, exact, added)


def _assert_within_bound(
    backend: Backend,
    case: Case,
    exits: list[Tensor],
    actual: list[Tensor],
    exact: list[Tensor],
    added: list[Tensor],
) -> None:
    share = _share_of_bound(backend, case, exits, actual, exact, added)
    target(share, label=f"share of the error bound, {str(case['dtype'])[6:]}{', resized' * bool(case['sizes'])}")
    assert share <= 1


# ------------------------------------------------------------------------------------------ what changes nothing


def _run(backend: Backend, exits: list[Tensor], kwargs: dict[str, Any], grad: Tensor | float = 1.0) -> list[Tensor]:
    """The matrix, and the gradients of the exits when `grad` is its own."""
    inputs = leaves(exits)
    out = srf.exit_loss_matrix(inputs, backend=backend.name, **kwargs)
    return [out.detach(), *gradients(out, inputs, torch.zeros_like(out) + grad)]


def _assert_as_good(
    backend: Backend,
    case: Case,
    exits: list[Tensor],
    kwargs: dict[str, Any],
    grad: Tensor | float,
    actual: list[Tensor],
    expected: list[Tensor],
) -> None:
    """Two results of the same, each as exact as is promised."""
    added = magnitudes(exits, torch.zeros_like(expected[0]) + grad, **in_double(kwargs))
    assert _share_of_bound(backend, case, exits, actual, expected, added) <= 2


def _assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@fewer
@given(case=cases(batch=1, reduction="mean"), copies=st.integers(2, 3), dimension=st.integers(0, 3))
def test_tiling_leaves_the_mean(backend: Backend, case: Case, copies: int, dimension: int) -> None:
    """Copies of the image beside each other, or in a larger batch: the same mean, and a share of gradient for each."""
    if _left_out(backend, case):
        return
    exits, kwargs = _arguments(backend, case)
    dimension = 0 if case["sizes"] else dimension % len(case["shape"])  # at their borders, exits would be resized anew
    of_exits = dimension + (dimension > 0)

    def tiled(x: Tensor, dimension: int) -> Tensor:
        return torch.cat([x] * copies, dimension)

    maps = {name: tiled(kwargs[name], dimension) for name in ("labels", "pixel_weight") if name in kwargs}
    grad = _loss_scale(case)
    actual = _run(backend, [in_layout(tiled(z, of_exits), case["layout"]) for z in exits], kwargs | maps, copies * grad)
    expected = _run(backend, exits, kwargs, grad)
    for part in zip(*(g.chunk(copies, of_exits) for g in actual[1:]), strict=True):
        _assert_as_good(backend, case, exits, kwargs, grad, [actual[0], *part], expected)


@fewer
@given(case=cases(exits=2), data=st.data())
def test_permuting_exits_permutes_the_matrix(backend: Backend, case: Case, data: st.DataObject) -> None:
    """Its columns and the gradients, bit by bit where no sum is in another order; rows are in that of the teachers."""
    if _left_out(backend, case):
        return
    order = data.draw(st.permutations(range(case["n"])))
    exits, kwargs = _arguments(backend, case)
    of_losses = torch.empty(1 + len(case["teachers"]), case["n"], device=backend.device)
    grad = upstream("random", of_losses)
    maps = [1] * len(case["shape"]) if case["reduction"] == "none" else []
    given_losses, moved_losses = (g.view(*g.shape, *maps) for g in (grad, grad[:, order]))
    losses, *grads = _run(backend, exits, kwargs, given_losses)
    expected = [losses[:, order], *[grads[i] for i in order]]
    moved = kwargs | {"teachers": [order.index(t) for t in kwargs["teachers"]]}
    exits = [exits[i] for i in order]
    actual = _run(backend, exits, moved, moved_losses)
    if backend.fused and case["detach_teacher"]:
        _assert_equal(actual, expected)
    else:  # a teacher that learns sums over its students, in their order
        _assert_as_good(backend, case, exits, moved, moved_losses, actual, expected)


@fewer
@given(case=cases(resized=False))
def test_shifting_logits_changes_nothing(backend: Backend, case: Case) -> None:
    """By a number for each pixel: bit by bit, where a sum has room for the bits of logit and number."""
    if _left_out(backend, case):
        return
    exits, kwargs = _arguments(backend, case)
    quarters = [(4 * z).round().clamp(-32, 32) / 4 for z in exits]
    shifts = [(8 * z[:, :1]).round().clamp(-64, 64) / 4 for z in reversed(exits)]  # seven bits with the logits
    grad = _loss_scale(case)
    expected = _run(backend, [in_layout(z, case["layout"]) for z in quarters], kwargs, grad)
    shifted = [in_layout(z + c, case["layout"]) for z, c in zip(quarters, shifts, strict=True)]
    actual = _run(backend, shifted, kwargs, grad)
    if backend.fused:
        _assert_equal(actual, expected)
    else:  # divides by the temperature first, which rounds the shift
        _assert_as_good(backend, case, shifted, kwargs, grad, actual, expected)


@fewer
@given(case=cases(batch=2), data=st.data())
def test_parts_of_a_batch_make_the_whole(backend: Backend, case: Case, data: st.DataObject) -> None:
    """Their means averaged over the weights that count, their sums, their maps; the gradients image by image."""
    if _left_out(backend, case):
        return
    exits, kwargs = _arguments(backend, case)
    at, grad = data.draw(st.integers(1, case["shape"][0] - 1)), _loss_scale(case)
    weight = kwargs.get("pixel_weight", torch.ones(case["shape"], device=backend.device)).double()
    labelled, rows = torch.zeros_like(weight), 1 + len(case["teachers"])
    if "labels" in kwargs:
        valid = kwargs["labels"].long() != case["ignore_index"]
        labelled = weight * valid
        weight = labelled if case["mask_soft"] else weight
        if "class_weight" in kwargs:
            labelled = labelled * kwargs["class_weight"].double()[kwargs["labels"].long() * valid]
    parts, shares = [], []
    for images in (slice(None, at), slice(at, None)):
        maps = {name: kwargs[name][images] for name in ("labels", "pixel_weight") if name in kwargs}
        # A part of which all labels have the weight 0 is 0, by definition, also where it is smoothed.
        assume(not case["class_weight"] or case["label_smoothing"] == 0 or labelled[images].any())
        share = weight.new_ones(rows, 1)
        if case["reduction"] == "mean":
            share[0] = (labelled[images].sum() / labelled.sum()).nan_to_num()
            share[1:] = (weight[images].sum() / weight.sum()).nan_to_num()
        share = share.view(rows, 1, *([1] * len(case["shape"]) if case["reduction"] == "none" else []))
        parts.append(_run(backend, [z[images] for z in exits], kwargs | maps, grad * share))
        shares.append(share)
    if case["reduction"] == "none":
        losses = torch.cat([part[0] for part in parts], 2)
    else:
        losses = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
    actual = [losses, *map(torch.cat, zip(*(part[1:] for part in parts), strict=True))]
    _assert_as_good(backend, case, exits, kwargs, grad, actual, _run(backend, exits, kwargs, grad))


@fewer
@given(case=cases(exits=2, labelled=True))
# Exits were cut for the batch, their gradients for an image. (Expanded over channels alone: test_hygiene.py.)
@example(case=SIMPLE | {"shape": (2, 1, 30), "layout": "expanded", "scale": 3.0, "detach_teacher": False})
# Of teachers that learn, exits were computed another way where no gradient was wanted.
@example(case=SIMPLE | {"shape": (1, 1, 4), "sizes": [(1, 4), (1, 1)], "seed": 1, "detach_teacher": False})
def test_values_need_no_gradient(backend: Backend, case: Case) -> None:
    """Bit by bit the same without them, also of the objective, whose training launch writes gradients.

    But on a GPU, where teachers learn: that launch has other tiles, and so another order of sums.
    """
    if _left_out(backend, case):
        return
    exits, kwargs = _arguments(backend, case)
    of_objective = {k: v for k, v in kwargs.items() if k not in ("teachers", "mask_soft")}

    def values(exits: list[Tensor]) -> list[Tensor]:
        matrix = srf.exit_loss_matrix(exits, backend=backend.name, **kwargs)
        return [matrix, *srf.self_regulation_loss(exits, backend=backend.name, **of_objective)]

    expected = values(leaves(exits))
    assert expected[1].requires_grad
    with torch.no_grad():
        without = values(leaves(exits))
    _assert_equal(values(exits), without)
    if case["detach_teacher"] or backend.name not in ("cuda", "triton"):
        _assert_equal(without, expected)
    else:
        _assert_equal(without[:1], expected[:1])
        assert all(torch.allclose(a, e, rtol=1e-5, atol=1e-5) for a, e in zip(without, expected, strict=True))


@fewer
@given(case=cases())
def test_inputs_stay_as_they_are(backend: Backend, case: Case) -> None:
    """Every byte of their memory, also between the elements; so does the gradient given."""
    if _left_out(backend, case):
        return
    exits, kwargs = _arguments(backend, case)
    inputs = leaves(exits)
    out = srf.exit_loss_matrix(inputs, backend=backend.name, **kwargs)
    grad = in_layout(upstream("random", out), case["layout"]) if out.dim() > 1 and out.numel() else upstream("one", out)
    given = [*exits, grad, *(t for t in kwargs.values() if isinstance(t, Tensor))]

    def memory() -> list[Tensor]:
        return [torch.tensor([], dtype=torch.uint8, device=t.device).set_(t.untyped_storage()) for t in given]

    before = [m.clone() for m in memory()]
    again = srf.exit_loss_matrix(inputs, backend=backend.name, **kwargs)
    gradients(again, inputs, grad)
    _assert_equal(memory(), before)
    assert torch.equal(again, out)


@fewer
@given(case=cases(batch=1))
def test_ten_runs_give_the_same_bits(backend: Backend, case: Case) -> None:
    """With one thread and with two."""
    if _left_out(backend, case, 12):
        return
    exits, kwargs = _arguments(backend, case)
    grad = upstream("random", srf.exit_loss_matrix(exits, backend=backend.name, **kwargs))
    before = torch.get_num_threads()
    try:
        expected = _run(backend, exits, kwargs, grad)
        for run in range(1 if backend.interpreted else 9):  # an interpreter has no other order
            torch.set_num_threads(2 - run % 2 if backend.fused else 1)
            _assert_equal(_run(backend, exits, kwargs, grad), expected)
    finally:
        torch.set_num_threads(before)
