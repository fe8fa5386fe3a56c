"""Inside PyTorch's machinery: operator checks, torch.compile, autocast."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    Backend,
    assert_close,
    gradients,
    leaves,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    pyramid,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx

import selfreg_fast as srf
from selfreg_fast import reference
from selfreg_fast.ops import OPERATORS

SHAPE = (2, 5, 6, 8)

# ------------------------------------------------------------------------------------------ the operator itself


def _operands(**changes: Any) -> dict[str, Any]:
    """Arguments of torch.ops.selfreg_fast.exit_loss, by the names of its schema."""
    layout = changes.pop("layout", "contiguous")
    dtype = changes.pop("dtype", torch.float32)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    operands = {
        "exits": make_exits(3, SHAPE, dtype=dtype, layout=layout),
        "labels": make_labels((2, 6, 8), 5),
        "class_weight": make_class_weight(5).to(exact),
        "pixel_weight": make_pixel_weight((2, 6, 8)).to(exact),
        "grad_losses": None,
        "weights": [0.5] * 9,
        "wanted": [0, 1, 2],
        "teachers": [0, 2],
        "temperature": 2.0,
        "target": 0,
        "ignore_index": 255,
        "label_smoothing": 0.1,
        "mask_soft": False,
        "detach_teacher": True,
        "reduction": 0,
        "size": [6, 8],
        "align_corners": False,
    }
    return {**operands, **changes}


SAMPLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels_last": {"layout": "channels_last"},
    "cropped": {"layout": "cropped"},
    "expanded": {"layout": "expanded"},
    "transposed": {"layout": "transposed", "dtype": torch.float64},
    "halves": {"dtype": torch.bfloat16, "target": 1},
    "no_labels": {"labels": None, "class_weight": None, "target": 2},
    "no_gradient": {"wanted": [], "weights": [], "pixel_weight": None},
    "maps": {"weights": [], "wanted": [], "reduction": 2},
    "backward": {"weights": [], "wanted": [1], "grad_losses": torch.randn(3, 3), "detach_teacher": False},
    "backward_of_maps": {"weights": [], "reduction": 2, "grad_losses": torch.randn(3, 3, 2, 6, 8)},
    "resized": {"exits": make_exits(3, SHAPE, sizes=pyramid(3, SHAPE[2:])), "align_corners": True},
    "empty": {
        "exits": make_exits(3, (0, 5, 6, 8)),
        "labels": make_labels((0, 6, 8), 5),
        "pixel_weight": torch.ones(0, 6, 8),
    },
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_opcheck(backend: Backend, sample: dict[str, Any]) -> None:
    """Schema, fake kernel (sizes, strides and dtypes of every output) and dynamic shapes of the raw operator."""
    if not backend.fused:
        pytest.skip("reference: has no operator")
    operands = _operands(**sample)
    if not backend.resizes([z.shape[2:] for z in operands["exits"]], (6, 8)):
        pytest.skip(f"{backend.name}: exits are resized before the operator")
    on_device = {
        k: [z.to(backend.device) for z in v] if k == "exits" else v.to(backend.device) if isinstance(v, Tensor) else v
        for k, v in operands.items()
    }
    torch.library.opcheck(getattr(torch.ops.selfreg_fast, OPERATORS[backend.name]), (), on_device)


# ------------------------------------------------------------------------------------------ torch.compile


def _functions(backend: Backend) -> dict[str, Callable[..., Any]]:
    b = {"backend": backend.name}
    module = srf.SelfRegulationLoss(temperature=2.0, class_weight=make_class_weight(5, device=backend.device), **b)
    published = srf.SelfRegulationLoss.published(**b)
    return {
        "sr_f": lambda e, y: srf.sr_f_loss(e, temperature=2.0, **b),
        "sr_l": lambda e, y: srf.sr_l_loss(e, temperature=2.0, renormalize=True, **b),
        "mea": lambda e, y: srf.mea_loss(e, y, label_smoothing=0.1, **b),
        "matrix": lambda e, y: srf.exit_loss_matrix(e, y, teachers=[0, 1], detach_teacher=False, **b).sum(),
        "maps": lambda e, y: srf.exit_loss_matrix(e, y, teachers=[0], reduction="none", mask_soft=True, **b).mean(),
        "resized": lambda e, y: srf.sr_l_loss([F.avg_pool2d(e[0], 2), *e[1:]], **b),
        "all_resized": lambda e, y: srf.self_regulation_loss([F.avg_pool2d(z, 2) for z in e], y, **b).total,
        "total": lambda e, y: srf.self_regulation_loss(e, y, pixel_weight=e[0].detach()[:, 0].abs(), **b).total,
        "features": lambda e, y: srf.self_regulation_loss(e, y, features=[z[:, :4] for z in e], **b).total,
        "module": lambda e, y: module(e, y).total,
        "published": lambda e, y: published(e, y, image_logits=[z.mean((2, 3)) for z in e]).total,
    }


REFERENCE = ("sr_l", "matrix", "maps", "all_resized", "module", "published")  # each of its formulas, and resizing
NAMES = ["sr_f", "sr_l", "mea", "matrix", "maps", "resized", "all_resized", "total", "features", "module", "published"]


def _run(function: Callable[..., Tensor], backend: Backend, size: tuple[int, int], **kwargs: Any) -> list[Tensor]:
    exits = leaves(make_exits(3, (2, 5, *size), device=backend.device, **kwargs))
    labels = make_labels((2, *size), 5, device=backend.device)
    out = function(exits, labels)
    return [out.detach(), *gradients(out, exits)]


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_compile_without_graph_breaks(backend: Backend, name: str, fresh_dynamo: None) -> None:
    """fullgraph=True, values and gradients; a new size makes the shapes dynamic, further sizes compile nothing."""
    if not backend.fused and name not in REFERENCE:
        pytest.skip("reference: seconds each, and nothing in them that the others or the fused backends do not trace")
    function = _functions(backend)[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for size in ((6, 8), (10, 12), (4, 14)):
        actual, expected = _run(compiled, backend, size), _run(function, backend, size)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-6, 1e-9)
    assert counter.frame_count <= 2, "recompiled for a size after shapes became dynamic"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_compile_to_machine_code(backend: Backend, layout: str, fresh_dynamo: None) -> None:
    """The default backend of torch.compile, which trusts the fake kernel's strides, around the module."""
    if not backend.fused:
        pytest.skip("reference: has no fake kernel")
    if backend.device == "cpu" and not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    module = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)

    def function(exits: list[Tensor], labels: Tensor) -> Tensor:
        return module([z.mul(0.5) for z in exits], labels).total.square()

    compiled = torch.compile(function, fullgraph=True)
    actual = _run(compiled, backend, (6, 8), layout=layout)
    for a, e in zip(actual, _run(function, backend, (6, 8), layout=layout), strict=True):
        assert_close(a, e, 1e-5, 1e-8)


def test_compile_with_halves(backend: Backend, fresh_dynamo: None) -> None:
    """float16, whose gradients are recomputed in the backward, and bfloat16."""
    function = _functions(backend)["total"]
    for dtype in (torch.float16, torch.bfloat16):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, e in zip(
            _run(compiled, backend, (6, 8), dtype=dtype), _run(function, backend, (6, 8), dtype=dtype), strict=True
        ):
            assert_close(a, e, torch.finfo(a.dtype).eps, 1e-7)


def test_compile_without_gradients(backend: Backend, fresh_dynamo: None) -> None:
    """Validation losses: under no_grad, in one graph."""
    function = _functions(backend)["module"]
    exits, labels = make_exits(3, SHAPE, device=backend.device), make_labels((2, 6, 8), 5, device=backend.device)
    with torch.no_grad():
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(exits, labels)
    assert_close(actual, function(exits, labels), 1e-6)


# ------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [None, "pyramid"])
def test_autocast_changes_nothing_within_the_loss(
    backend: Backend, sizes: str | None, given: torch.dtype, dtype: torch.dtype
) -> None:
    """Losses are computed in float32 whatever autocast would choose; exits of several sizes included."""
    exits = make_exits(3, SHAPE, dtype=given, device=backend.device, sizes=pyramid(3, SHAPE[2:]) if sizes else None)
    labels = make_labels((2, 6, 8), 5, device=backend.device)
    exact = leaves([z.double() for z in exits])
    expected = reference.self_regulation_loss(exact, labels, temperature=2.0).total
    inputs = leaves(exits)
    with torch.autocast(backend.device, dtype=dtype):
        total = srf.self_regulation_loss(inputs, labels, temperature=2.0, backend=backend.name).total
    assert total.dtype == torch.float32
    in_half = given != torch.float32 and not backend.resizes([z.shape[2:] for z in exits], SHAPE[2:])
    resized_in_half = 4 * torch.finfo(given).eps if in_half else 0
    assert_close(total.detach(), expected.detach(), 1e-5 + resized_in_half)
    for a, e in zip(gradients(total, inputs), gradients(expected, exact), strict=True):
        assert a.dtype == given
        assert_close(a, e, 1e-5 + 2 * torch.finfo(given).eps + resized_in_half, 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_under_autocast(backend: Backend, dtype: torch.dtype) -> None:
    """Half-precision logits from float32 parameters, loss inside the autocast region, a loss scaler for float16."""
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Conv2d(3, 5, 3, padding=1) for _ in range(3)).to(backend.device)
    x, labels = torch.randn(2, 3, 6, 8, device=backend.device), make_labels((2, 6, 8), 5, device=backend.device)
    scaler = torch.amp.GradScaler(backend.device, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    with torch.autocast(backend.device, dtype=dtype):
        logits = [head(x) for head in heads]
        assert logits[0].dtype == dtype
        total = srf.self_regulation_loss(logits, labels, backend=backend.name).total
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    grads = [p.grad.clone() for p in heads.parameters()]
    optimizer.zero_grad()
    reference.self_regulation_loss([head(x) for head in heads], labels).total.backward()
    for g, p in zip(grads, heads.parameters(), strict=True):
        assert (g - p.grad).norm() < 10 * torch.finfo(dtype).eps * p.grad.norm()


def test_all_operators_have_one_schema() -> None:
    """What is written in csrc/operator.h and in ops.py: the backends can stand in for each other."""
    from selfreg_fast import ops

    names = [ops.OPERATORS[name] for name in ("cpu", "cuda", "triton") if srf.backends()[name] == "available"]
    schemas = {str(getattr(torch.ops.selfreg_fast, name).default._schema).partition("(")[2] for name in names}
    assert len(schemas) <= 1


# --------------------------------------------------------------------------------------- tensors without values


def _training_step(backend: Backend, a: Tensor, b: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the total, scaled, of a part, of a map, and of image-level predictions."""
    exits = [a, b]
    options: dict[str, Any] = {"backend": backend.name}
    out = srf.self_regulation_loss(exits, labels, image_logits=[z.mean((2, 3)) for z in exits], **options)
    loss = 3 * out.total + srf.mea_loss(exits, labels, reduction="none", **options).sum()
    return torch.autograd.grad(loss + srf.self_regulation_loss(exits, labels, **options).sr_l, exits)


@pytest.mark.parametrize("how", ["fake", "fake, mode not entered", "make_fx real", "make_fx symbolic", "MemTracker"])
def test_a_step_asks_for_no_values(backend: Backend, how: str) -> None:
    """Fake tensors, traced ones and counted memory: what plans a training run without running it."""
    if how == "fake, mode not entered" and not backend.fused:
        pytest.skip("reference: in PyTorch's own derivatives are real numbers")
    a, b = leaves(make_exits(2, SHAPE, device=backend.device))
    labels = make_labels((2, 6, 8), 5, device=backend.device)
    step = partial(_training_step, backend)
    if how.startswith("make_fx"):
        traced = make_fx(step, tracing_mode=how.split()[1])(a, b, labels)
        for given, expected in zip(traced(a, b, labels), step(a, b, labels), strict=True):
            assert_close(given, expected, 1e-6)
        return
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (a, b, labels)]
    with nullcontext() if "not entered" in how else mode, MemTracker() if how == "MemTracker" else nullcontext():
        grads = step(*fakes)
    assert [(g.shape, g.dtype) for g in grads] == [(z.shape, z.dtype) for z in (a, b)]
