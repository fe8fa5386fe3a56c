"""The losses among autograd's other inhabitants: odd gradients, hooks, torch.func, torch.export, threads, fork."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support import (
    LAYOUTS,
    Backend,
    assert_close,
    gradients,
    in_layout,
    leaves,
    make_exits,
    make_labels,
    upstream,
    value_and_gradients,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import selfreg_fast as srf
from selfreg_fast import reference

SHAPE = (2, 5, 6, 8)


def _exits(backend: Backend, n: int = 3, **kwargs: Any) -> list[Tensor]:
    return make_exits(n, SHAPE, device=backend.device, **kwargs)


def _labels(backend: Backend) -> Tensor:
    return make_labels((2, 6, 8), 5, device=backend.device)


def _total(backend: Backend) -> Callable[[Sequence[Tensor]], Tensor]:
    labels = _labels(backend)
    return lambda exits: srf.self_regulation_loss(list(exits), labels, temperature=2.0, backend=backend.name).total


# ------------------------------------------------------------------------------------------ gradients from above


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_given_may_lie_anyhow_in_memory(backend: Backend, reduction: str, layout: str) -> None:
    """Of the matrix and of its maps: strides of 0, transposed, cropped out of NaN; the bits of its contiguous copy."""
    labels, exits = _labels(backend), leaves(_exits(backend))
    kwargs = {"teachers": [0, 2], "temperature": 2.0, "reduction": reduction, "backend": backend.name}
    out = srf.exit_loss_matrix(exits, labels, **kwargs)
    grad_output = in_layout(upstream("random", out), layout)
    assert not grad_output.is_contiguous() or (reduction == "mean" and layout == "channels_last")
    expected = gradients(out, exits, grad_output.contiguous(), retain_graph=True)
    assert all(g.any() for g in expected)
    for a, e in zip(gradients(out, exits, grad_output), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_and_frozen_exits_of_the_matrix(backend: Backend, reduction: str) -> None:
    """An exit three times, in two roles, resized; another that needs no gradient, between them."""
    size = SHAPE[2:]
    a, b = _exits(backend, 2, sizes=[(3, 5), (6, 8)], dtype=torch.float64)
    labels = _labels(backend)

    def objective(module: Any, inputs: list[Tensor], **kwargs: Any) -> Tensor:
        (z,) = inputs
        kwargs = {"teachers": [0, 1], "temperature": 2.0, "detach_teacher": False, "size": size, **kwargs}
        return module.exit_loss_matrix([z, b, z, z], labels, reduction=reduction, **kwargs)

    expected = value_and_gradients(lambda e: objective(reference, e), [a], "random")
    actual = value_and_gradients(lambda e: objective(srf, e, backend=backend.name), [a], "random")
    for x, e in zip(actual, expected, strict=True):
        assert_close(x, e, 1e-11)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_saved_tensors_that_move_away(backend: Backend, factor: float) -> None:
    """Under hooks that pack what is saved, as save_on_cpu does, and give back copies: the same bits, all packed."""
    loss, exits = _total(backend), leaves(_exits(backend))
    expected = gradients(factor * loss(exits), exits)
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.numel()) or t.clone(), Tensor.clone):
        total = factor * loss(exits)
    assert sum(packed) >= sum(z.numel() for z in exits)
    for _ in range(2):
        assert all(torch.equal(a, e) for a, e in zip(gradients(total, exits, retain_graph=True), expected, strict=True))


def test_hooks_on_exits_see_their_gradients(backend: Backend) -> None:
    """Tensor hooks run once an exit, and what they return is passed on."""
    inputs = leaves(_exits(backend))
    exits = [2 * z for z in inputs]
    seen: list[int] = []
    for i, z in enumerate(exits):
        z.register_hook(lambda g, i=i: seen.append(i) or 3 * g)
    actual = gradients(_total(backend)(exits), inputs)
    expected = gradients(_total(backend)([2 * z for z in inputs]), inputs)
    assert sorted(seen) == [0, 1, 2]
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, 3 * e, 1e-6)


@pytest.mark.parametrize("dims", [(0,), (1,), (2, 3), (0, 1, 2, 3)])
def test_an_expanded_exit_has_the_same_bits_without_a_gradient(backend: Backend, dims: tuple[int, ...]) -> None:
    """Its gradient is dense, and lies otherwise than it does."""
    shape = (2, 5, 9, 15)
    labels = (torch.arange(270) * 7 % 5).reshape(2, 9, 15).to(backend.device)
    for seed in range(40 if backend.name == "cpu" else 5):  # one in ten shows another order of sums
        a, b = make_exits(2, shape, seed=seed, device=backend.device)
        some = a[tuple(slice(0, 1) if d in dims else slice(None) for d in range(4))].contiguous()
        exits = leaves([some.expand(shape), b.transpose(0, 1).contiguous().transpose(0, 1)])
        kwargs = {"temperature": 2.0, "backend": backend.name}
        total = srf.self_regulation_loss(exits, labels, **kwargs).total
        with torch.no_grad():
            assert torch.equal(srf.self_regulation_loss(exits, labels, **kwargs).total, total)


# ------------------------------------------------------------------------------------------ torch.func, torch.export

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, a, b: torch.func.grad(f)(a, b),
    "jacrev": lambda f, a, b: torch.func.jacrev(f)(a, b),
    "jvp": lambda f, a, b: torch.func.jvp(f, (a, b), (b, a))[1],
    "vmap": lambda f, a, b: torch.func.vmap(f)(a[:, None], b[:, None]),
}


def _is_right_or_refused(backend: Backend, transform: Callable[..., Tensor], refusal: str) -> None:
    """As of the reference, or an error whose text `refusal` matches: nothing wrong, nothing silent."""
    a, b = _exits(backend, 2)

    def loss(of: str) -> Callable[..., Tensor]:
        return lambda s, t: srf.sr_l_loss([s, t], temperature=2.0, backend=of)

    expected = transform(loss("reference"), a, b)
    assert expected.any()
    try:
        actual = transform(loss(backend.name), a, b)
    except RuntimeError as error:  # NotImplementedError is one
        assert backend.fused and re.search(refusal, str(error))
    else:
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_functions_are_right_or_refused(backend: Backend, name: str) -> None:
    """torch.func of the reference is right; a fused loss is, too, or raises by name."""
    _is_right_or_refused(backend, TRANSFORMS[name], "selfreg_fast: the fused losses do not work under torch.func")


def _forward_mode(f: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(a, b), b)).tangent


def _batched(f: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    inputs = leaves([a, b])
    some = torch.tensor([1.0, -2.0], device=a.device)
    return torch.autograd.grad(f(*inputs), inputs[:1], some, is_grads_batched=True)[0]


@pytest.mark.parametrize("transform", [_forward_mode, _batched])
def test_what_autograd_transforms_is_right_or_refused(backend: Backend, transform: Callable[..., Tensor]) -> None:
    """Forward-mode derivatives and batches of gradients: PyTorch refuses them for an operator that has none."""
    _is_right_or_refused(backend, transform, "jvp|Batching rule")


def test_functional_call(backend: Backend) -> None:
    """Stateless calls of a network with the loss in it."""
    network = _Training(backend)
    doubled = {name: 2 * p for name, p in network.named_parameters()}
    out = torch.func.functional_call(network, doubled, _batch(backend))
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    assert torch.equal(out, network(*_batch(backend)))


class _Training(nn.Module):
    """Three heads and their loss."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Conv2d(3, 5, 1) for _ in range(3)).to(backend.device)
        self.criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.criterion([head(images) for head in self.heads], labels).total


def _batch(backend: Backend) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1)).to(backend.device), _labels(backend)


def test_an_exported_training_step(backend: Backend) -> None:
    """torch.export of network and loss: the operator is in the graph, values and gradients are the same."""
    network, batch = _Training(backend), _batch(backend)
    program = torch.export.export(network, batch)
    called = {str(node.target) for node in program.graph.nodes}
    assert not backend.fused or any(name.startswith("selfreg_fast.") for name in called)
    exported, expected = program.module()(*batch), network(*batch)
    assert_close(exported.detach(), expected.detach(), 1e-6)


def test_an_exported_step_of_any_size(backend: Backend) -> None:
    """Exported with sizes left open, it takes others."""
    network, batch = _Training(backend), _batch(backend)
    sizes = [torch.export.Dim(name, min=2, max=512) for name in ("batch", "height")]
    shapes = ({0: sizes[0], 2: sizes[1]}, {0: sizes[0], 1: sizes[1]})
    program = torch.export.export(network, batch, dynamic_shapes=shapes)
    others = [torch.cat([x, x[:1]]).repeat_interleave(2, -2) for x in batch]
    assert_close(program.module()(*others).detach(), network(*others).detach(), 1e-6)


# ------------------------------------------------------------------------------------------ threads and processes


LARGE = (2, 5, 64, 96)  # enough for the kernels to share it among their threads


def _step(backend: Backend, seed: int = 0, between: Callable[[], Any] = lambda: None) -> list[Tensor]:
    exits = leaves(make_exits(3, LARGE, seed=seed, device=backend.device))
    labels = make_labels((2, 64, 96), 5, seed=seed, device=backend.device)
    total = srf.self_regulation_loss(exits, labels, temperature=2.0, backend=backend.name).total
    between()
    return [total.detach(), *gradients(0.5 * total, exits)]


def test_threads_do_not_disturb_each_other(backend: Backend, threads: None) -> None:
    """Four threads, each with its exits and two kernel threads, between each other's forward and backward: the bits of
    one thread."""
    if backend.name != "cpu" and backend.device == "cpu":
        pytest.skip("PyTorch's own, or a GPU's stand-in, which runs one kernel at a time")
    torch.set_num_threads(2)
    expected = [_step(backend, seed) for seed in range(4)]
    all_forward = threading.Barrier(4)

    def step(seed: int) -> list[Tensor]:
        torch.set_num_threads(2)  # each thread has its own setting
        return _step(backend, seed, lambda: all_forward.wait(60))

    with ThreadPoolExecutor(4) as pool:
        for i, actual in enumerate(pool.map(step, [0, 1, 2, 3] * 4)):
            assert all(torch.equal(a, e) for a, e in zip(actual, expected[i % 4], strict=True))


def test_backward_in_another_thread(backend: Backend) -> None:
    loss, exits = _total(backend), leaves(_exits(backend))
    expected = gradients(loss(exits), exits)
    total = loss(exits)
    with ThreadPoolExecutor(1) as pool:
        actual = pool.submit(gradients, total, exits).result()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class _Losses(Dataset[Tensor]):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: int) -> Tensor:
        return torch.cat([t.flatten() for t in _step(self.backend)])


def test_fork_after_use(backend: Backend, threads: None) -> None:
    """A data worker, forked from a process that has used two threads, computes losses with one, as workers do (with
    more, all of PyTorch hangs there: OpenMP's threads do not survive a fork), and the process goes on."""
    if backend.name != "cpu":
        pytest.skip("PyTorch's own, or CUDA, which does not survive a fork")
    torch.set_num_threads(2)
    losses = _Losses(backend)
    expected = losses[0]
    loader = DataLoader(losses, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    for actual in [*loader, losses[0]]:
        assert_close(actual, expected, 1e-6)
