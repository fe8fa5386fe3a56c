"""SelfRegulationLoss holds options and calls the function; ExitHead is the published head."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Backend, assert_close, gradients, leaves, make_class_weight, make_exits, make_labels
from torch import Tensor, nn

import selfreg_fast as srf
from selfreg_fast import reference

OPTIONS: list[dict[str, Any]] = [
    {},
    {"mea_weight": 0.5, "sr_f_weight": 2.0, "sr_l_weight": 0.1, "seg_weight": 0.3, "cls_weight": 0.6},
    {"temperature": 2.0, "renormalize": True},
    {"target": "argmax", "ignore_index": 2},
    {"label_smoothing": 0.1, "exit_weights": [1.0, 0.0, 2.0]},
    {"size": (4, 6), "align_corners": True},
    {"reduction": "sum", "detach_teacher": False},
    {"sr_f_weight": None},
    {"class_weight": make_class_weight(5)},
]


def _inputs(backend: Backend) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    exits = make_exits(3, (2, 5, 4, 6), device=backend.device)
    labels = make_labels((2, 4, 6), 5, device=backend.device)
    extras = {
        "features": make_exits(2, (2, 7, 4, 6), seed=5, device=backend.device),
        "image_logits": make_exits(3, (2, 5), seed=6, device=backend.device),
    }
    return exits, labels, extras


def _on(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "defaults")
def test_the_module_is_the_function(backend: Backend, options: dict[str, Any]) -> None:
    """Same options, same bits, with and without features and image-level predictions."""
    exits, labels, extras = _inputs(backend)
    labels = labels.where(labels != 255, options.get("ignore_index", 255))
    options = {k: _on(v, backend.device) for k, v in options.items()}
    module = srf.SelfRegulationLoss(backend=backend.name, **options)
    for more in ({}, extras, {"pixel_weight": torch.rand(2, 4, 6, device=backend.device)}):
        expected = srf.self_regulation_loss(exits, labels, backend=backend.name, **options, **more)
        assert all(torch.equal(a, e) for a, e in zip(module(exits, labels, **more), expected, strict=True))


def test_the_modules_options_are_the_functions() -> None:
    """No option is missing in the module or in the reference, none has another default."""
    function = dict(inspect.signature(srf.self_regulation_loss).parameters)
    forward = dict(inspect.signature(srf.SelfRegulationLoss.forward).parameters)
    module = dict(inspect.signature(srf.SelfRegulationLoss).parameters)
    assert module.pop("image_level_sr_l").default is False
    assert set(function) == (set(forward) - {"self"}) | set(module)
    assert {k: p.default for k, p in module.items()} == {k: function[k].default for k in module}
    for name in ("sr_f_loss", "sr_l_loss", "mea_loss", "self_regulation_loss", "exit_loss_matrix"):
        ours = dict(inspect.signature(getattr(srf, name)).parameters)
        theirs = inspect.signature(getattr(reference, name)).parameters
        assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


def test_the_published_variant(backend: Backend) -> None:
    """SR-F by argmax on logits, SR-L between image-level predictions, MEA = 0.8 CE + 0.2 BCE, SR weights 1."""
    exits, labels, extras = _inputs(backend)
    image_logits = extras["image_logits"]
    out = srf.SelfRegulationLoss.published(backend=backend.name)(exits, labels, image_logits=image_logits)
    ce = sum(F.cross_entropy(z.double(), labels, ignore_index=255) for z in exits)
    present = srf.presence_vector(labels, 5).double()
    bce = sum(F.binary_cross_entropy(z.double().sigmoid(), present) for z in image_logits)
    sr_f = sum(F.cross_entropy(z.double(), exits[0].argmax(1)) for z in exits[1:])
    soft = image_logits[-1].double().sigmoid()
    sr_l = sum(F.binary_cross_entropy(z.double().sigmoid(), soft) for z in image_logits[:-1])
    for a, e in zip(out, (0.8 * ce + 0.2 * bce + sr_f + sr_l, 0.8 * ce + 0.2 * bce, sr_f, sr_l), strict=True):
        assert_close(a, e, 1e-6)


def test_the_published_variant_takes_options(backend: Backend) -> None:
    """Any option can be overridden; SR-L has its weight; without image-level predictions it says what it needs."""
    exits, labels, extras = _inputs(backend)
    image_logits = extras["image_logits"]
    module = srf.SelfRegulationLoss.published(sr_l_weight=0.25, mea_weight=None, sr_f_weight=None, backend=backend.name)
    inputs = leaves(image_logits)
    out = module(exits, labels, image_logits=inputs)
    assert_close(out.total.detach(), 0.25 * out.sr_l.detach(), 1e-6)
    grads = gradients(out.total, inputs)
    assert grads[0].any() and grads[1].any() and not grads[2].any()
    with pytest.raises(ValueError, match="image_logits"):
        module(exits, labels)


@pytest.mark.parametrize("published", [False, True])
def test_sr_can_wait_for_the_warm_up(backend: Backend, published: bool) -> None:
    """enable_sr(False): MEA alone, SR parts 0; enable_sr() brings them back. It returns the module."""
    exits, labels, extras = _inputs(backend)
    make = srf.SelfRegulationLoss.published if published else srf.SelfRegulationLoss
    module = make(backend=backend.name)
    full = module(exits, labels, **extras)
    assert module.enable_sr(False) is module
    out = module(exits, labels, **extras)
    assert out.sr_f == 0 and out.sr_l == 0
    assert_close(out.total, out.mea, 1e-6)
    assert_close(out.mea, full.mea, 1e-6)
    if published:  # the switch needs no image-level predictions either
        assert module(exits, labels).sr_l == 0
    again = module.enable_sr()(exits, labels, **extras)
    assert all(torch.equal(a, e) for a, e in zip(again, full, strict=True))


def test_one_exit_will_do_without_sr(backend: Backend) -> None:
    """As of a network that is validated: the same value and gradient as mea_loss; with SR it says what to do."""
    (exit,), labels = leaves(_inputs(backend)[0][:1]), _inputs(backend)[1]
    criterion = srf.SelfRegulationLoss(backend=backend.name, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"at least 2 exits, got 1; .*enable_sr\(False\)"):
        criterion([exit], labels)
    loss = criterion.enable_sr(False)([exit], labels)
    expected = srf.mea_loss([exit], labels, backend=backend.name, label_smoothing=0.1)
    assert torch.equal(loss.total, expected) and loss.sr_f == 0 and loss.sr_l == 0
    assert torch.equal(*gradients(loss.total, [exit]), *gradients(expected, [exit]))


def test_copy_pickle_move_and_state(backend: Backend) -> None:
    """deepcopy and pickle keep the options; class weights move with the module."""
    exits, labels, _ = _inputs(backend)
    weight = make_class_weight(5, device=backend.device)
    module = srf.SelfRegulationLoss(temperature=2.0, class_weight=weight, backend=backend.name).enable_sr(False)
    expected = module(exits, labels)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(a, e) for a, e in zip(other(exits, labels), expected, strict=True))
        assert not other.sr_enabled
    assert not list(module.parameters())
    assert module.to(torch.float64).class_weight.dtype == torch.float64
    assert_close(module(exits, labels).total, expected.total, 1e-6)
    assert module.to("meta").class_weight.device.type == "meta"
    assert "temperature=2.0" in repr(module)


def test_class_weights_are_saved() -> None:
    """As those of nn.CrossEntropyLoss: a model made on meta gets them back; files without them, as of 0.1, load."""
    weight = torch.tensor([0.5, 2.0, 1.0])
    saved = nn.Sequential(nn.Linear(2, 2), srf.SelfRegulationLoss(class_weight=weight))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(2, 2), srf.SelfRegulationLoss(class_weight=torch.ones(3)))
    for made in (empty.to_empty(device="cpu"), copy.deepcopy(empty)):
        made.load_state_dict(saved.state_dict(), assign=made is not empty)
        assert torch.equal(made[1].class_weight, weight)
    old = {k: v for k, v in saved.state_dict().items() if not k.endswith("class_weight")}
    again = nn.Sequential(nn.Linear(2, 2), srf.SelfRegulationLoss(class_weight=weight.clone()))
    again.load_state_dict(old)
    assert torch.equal(again[1].class_weight, weight)
    assert not srf.SelfRegulationLoss().state_dict()


def test_the_exit_head() -> None:
    """Two 3x3 conv-BN-ReLU and a 1x1 conv to the logits, at the features' size."""
    head = srf.ExitHead(6, 4, hidden_channels=8)
    kinds = [type(m) for m in head]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.Conv2d]
    assert [m.kernel_size for m in head if isinstance(m, nn.Conv2d)] == [(3, 3), (3, 3), (1, 1)]
    assert srf.ExitHead(6, 4)[0].out_channels == 256
    out = head(torch.randn(2, 6, 5, 7))
    assert out.shape == (2, 4, 5, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_a_network_with_exits_learns(backend: Backend) -> None:
    """Features of three stages, heads, the module: every parameter gets a finite gradient."""
    torch.manual_seed(0)
    stages = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, stride=2, padding=1) for i in range(3))
    heads = nn.ModuleList(srf.ExitHead(6, 5, hidden_channels=8) for _ in range(3))
    network = nn.ModuleList([stages, heads]).to(backend.device)
    criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)
    x, labels = torch.randn(2, 3, 24, 32, device=backend.device), make_labels((2, 24, 32), 5, device=backend.device)
    logits = []
    for stage, head in zip(stages, heads, strict=True):
        x = stage(x).relu()
        logits.append(head(x))
    criterion(logits, labels).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
