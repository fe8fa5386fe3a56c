"""The ways in which networks are trained: memory formats, compilation, checkpoints, accumulation, several processes.

Autocast with a loss scaler is in test_torch.py, CUDA graphs are in test_on_gpu.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import (
    Backend,
    Network,
    assert_close,
    generator,
    gradients,
    leaves,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import selfreg_fast as srf
from selfreg_fast import reference

TESTS = Path(__file__).parent


def _network(backend: Backend) -> Network:
    torch.manual_seed(0)
    return Network().double().to(backend.device)


def _batch(backend: Backend, size: tuple[int, int] = (8, 12)) -> tuple[Tensor, Tensor]:
    images = torch.randn(4, 3, *size, dtype=torch.float64, generator=generator(0))
    return images.to(backend.device), make_labels((4, *size), 5, device=backend.device)


def _step(network: nn.Module, criterion: Callable[..., Any], images: Tensor, labels: Tensor) -> list[Tensor]:
    """[loss, gradients of the parameters]."""
    total = criterion(network(images), labels).total
    return [total.detach(), *torch.autograd.grad(total, list(network.parameters()))]


def _assert_same(actual: list[Tensor], expected: list[Tensor], relative: float = 1e-12) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, relative, what=f"gradient {i - 1}" if i else "loss")


# ------------------------------------------------------------------------------------------ one process


def test_a_network_in_channels_last(backend: Backend) -> None:
    """Exits and gradients stay in channels_last; the parameters' gradients are those of the reference in NCHW."""
    network, (images, labels) = _network(backend), _batch(backend)
    expected = _step(network, srf.SelfRegulationLoss(temperature=2.0, backend="reference"), images, labels)
    network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)
    exits = network(images)
    grads = torch.autograd.grad(criterion(exits, labels).total, exits)
    resized = not backend.resizes([z.shape[2:] for z in exits], labels.shape[1:])  # then the layout is F.interpolate's
    for t in (*exits, *([] if resized or not backend.fused else grads)):
        assert t.is_contiguous(memory_format=torch.channels_last)
    _assert_same(_step(network, criterion, images, labels), expected)


def test_network_and_loss_compiled_together(backend: Backend) -> None:
    """One graph, compiled once for crops of every size. (Machine code is in test_torch.py.)"""
    if backend.interpreted or not backend.fused:
        pytest.skip(f"{backend.name}: takes long to trace, and test_torch.py compiles its losses")
    torch._dynamo.reset()
    network = _network(backend)
    criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        return criterion(network(images), labels).total

    # Inductor's convolutions specialise on the image's size, whatever the loss.
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, size in enumerate(((8, 12), (10, 14), (6, 18))):
        images, labels = _batch(backend, size)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            total = compiled(images, labels)
        actual = [total.detach(), *torch.autograd.grad(total, list(network.parameters()))]
        _assert_same(actual, _step(network, criterion, images, labels))


def test_a_checkpointed_network(backend: Backend) -> None:
    """Stages, heads and loss recomputed in the backward: the same bits."""
    network, (images, labels) = _network(backend), _batch(backend)
    criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)
    expected = _step(network, criterion, images, labels)

    def recomputed(images: Tensor) -> list[Tensor]:
        x, exits = images, []
        for stage, head in zip(network.stages, network.heads, strict=True):
            x = checkpoint(stage, x, use_reentrant=False).relu()
            exits.append(checkpoint(head, x, use_reentrant=False))
        return exits

    total = checkpoint(lambda x: criterion(recomputed(x), labels).total, images, use_reentrant=False)
    actual = [total.detach(), *torch.autograd.grad(total, list(network.parameters()))]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_accumulated_gradients_are_those_of_the_whole_batch(backend: Backend) -> None:
    """Each part weighs as its share: of the labelled pixels in MEA, of all pixels in the SR terms."""
    network, (images, labels) = _network(backend), _batch(backend)
    labels[0, 1:] = 255
    criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)
    expected = _step(network, criterion, images, labels)
    total = torch.zeros((), dtype=torch.float64, device=backend.device)
    for part in (slice(0, 1), slice(1, 4)):
        y = labels[part]
        pixels = y.numel() / labels.numel()
        valid = (y != 255).sum().item() / (labels != 255).sum().item()
        weights = {"mea_weight": valid, "sr_f_weight": pixels, "sr_l_weight": pixels}
        out = srf.self_regulation_loss(network(images[part]), y, temperature=2.0, backend=backend.name, **weights)
        out.total.backward()
        total += out.total.detach()
    _assert_same([total, *(p.grad for p in network.parameters())], expected)


# ------------------------------------------------------------------------------------------ process groups


@pytest.fixture
def world(backend: Backend) -> Iterator[None]:
    """A default process group of this process alone."""
    kind = "nccl" if backend.device == "cuda" else "gloo"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_group_of_one_process_changes_nothing(backend: Backend, world: None, dtype: torch.dtype) -> None:
    """Every kind of divisor on every backend: the mean over the group is the one over this process's pixels."""
    if backend.interpreted and dtype != torch.float32:
        pytest.skip("triton: interpreted, it takes long")
    exits = make_exits(3, (2, 5, 6, 8), dtype=dtype, device=backend.device)
    labels = make_labels((2, 6, 8), 5, dtype=torch.uint8, device=backend.device)
    weights = {
        "class_weight": make_class_weight(5, device=backend.device).half(),
        "pixel_weight": make_pixel_weight((2, 6, 8), device=backend.device),
    }
    more: dict[str, Any] = {**weights, "temperature": 2.0, "label_smoothing": 0.1}

    def total(exits: list[Tensor], **options: Any) -> Tensor:
        return 8 * srf.self_regulation_loss(exits, labels, **more, **options).total

    def unweighted(exits: list[Tensor], **options: Any) -> Tensor:
        out = srf.self_regulation_loss(exits, labels, **options)
        return out.total + out.mea

    def of_weight_zero(exits: list[Tensor], **options: Any) -> Tensor:
        exits = [exits[0], exits[1].index_fill(1, torch.tensor(0, device=backend.device), -torch.inf), exits[2]]
        out = srf.self_regulation_loss(exits, labels.clamp(min=1), sr_f_weight=0.0, sr_l_weight=None, **options)
        assert out.sr_f.isinf()
        return out.total

    def masked(exits: list[Tensor], **options: Any) -> Tensor:
        return srf.exit_loss_matrix(exits, labels, teachers=[2, 0], mask_soft=True, **more, **options).sum()

    def unlabelled(exits: list[Tensor], **options: Any) -> Tensor:
        losses = srf.exit_loss_matrix(exits, teachers=[1], temperature=2.0, detach_teacher=False, **options)
        return losses.square().sum()

    def nothing_ignored(exits: list[Tensor], **options: Any) -> Tensor:  # 300 fits no uint8
        return srf.mea_loss(exits, labels.clamp(max=4), ignore_index=300, **options)

    for loss in (total, unweighted, of_weight_zero, masked, unlabelled, nothing_ignored):
        results = []
        for group in (None, "world") if backend.interpreted else (None, "world", dist.group.WORLD):
            inputs = leaves(exits)
            value = loss(inputs, backend=backend.name, process_group=group)
            results.append([value.detach(), *gradients(value, inputs)])
        # The same sums, divided after the launch or in it: some roundings apart.
        unit = max(8 * torch.finfo(results[0][0].dtype).eps, torch.finfo(dtype).eps)
        for result in results[1:]:
            _assert_same(result, results[0], unit)


def test_a_group_waits_for_no_gpu(backend: Backend, world: None) -> None:
    """With NCCL, forward and backward of a step wait for nothing on the device."""
    if backend.device != "cuda" or not backend.fused:
        pytest.skip(f"{backend.name}: no kernels of a GPU")
    exits = leaves(make_exits(3, (2, 5, 6, 8), device="cuda"))
    labels, weight = make_labels((2, 6, 8), 5, device="cuda"), make_class_weight(5, device="cuda")
    criterion = srf.SelfRegulationLoss(class_weight=weight, process_group="world", backend=backend.name)
    criterion(exits, labels).total.backward()  # the first call sets up the communicator, or compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(exits, labels).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"process_group": "ranks"}, ValueError, "process_group: expected a ProcessGroup, 'world' or None, got 'ranks'"),
    ({"process_group": 2}, TypeError, "process_group: expected a torch.distributed.ProcessGroup.*got int"),
    ({"process_group": "world", "reduction": "sum"}, ValueError, "process_group .*reduction=\"mean\", got 'sum'"),
    ({"process_group": "world", "reduction": "none"}, ValueError, "process_group .*reduction=\"mean\", got 'none'"),
    (
        {"process_group": "world", "pixel_weight": torch.ones(2, 6, 8, requires_grad=True)},
        ValueError,
        "pixel_weight.*gradient|gradient.*pixel_weight",
    ),
]


@pytest.mark.parametrize("library", [srf, reference], ids=["fused", "reference"])
def test_a_wrong_process_group_is_named(library: Any) -> None:
    """Not initialised; neither a group nor "world"; a reduction or a weight that has no mean over ranks."""
    exits, labels = make_exits(3, (2, 5, 6, 8)), make_labels((2, 6, 8), 5)
    for group in ("world", object()):
        with pytest.raises(RuntimeError, match="process_group: torch.distributed is not initialised"):
            library.self_regulation_loss(exits, labels, process_group=group)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for options, error, text in WRONG:
            with pytest.raises(error, match=text):
                library.self_regulation_loss(exits, labels, **options)
        with pytest.raises(TypeError, match="process_group: .*got DeviceMesh"):
            library.presence_loss(
                [exits[0][:, :, 0, 0]], torch.ones(2, 5), process_group=dist.init_device_mesh("cpu", (1,))
            )
    finally:
        dist.destroy_process_group()
    assert copy.deepcopy(srf.SelfRegulationLoss(process_group="world")).options["process_group"] == "world"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_ranks(device: str, tmp_path: Path) -> None:
    """The example, then the checks of two_ranks.py: DDP, FSDP2, a rank without labels, compiled, groups, MultiExit."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices here, one for each rank needed")
    script = TESTS / "two_ranks.py"
    # `timeout` sends SIGTERM, at which torchrun ends its ranks.
    command = ["timeout", "200", sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    # From elsewhere: in the repository's root, -m would put its source directory before the installed package.
    done = subprocess.run(
        [*command, script, device],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **hidden},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    first, *_, last = (float(line.rpartition(" ")[2]) for line in lines if "MEA" in line)
    assert last < 0.8 * first, "the example has learned nothing"
    asked = [line.partition("(")[0][10:] for line in script.read_text().splitlines() if line.startswith("def check_")]
    assert [line[3:] for line in lines if line.startswith("ok ")] == asked and len(asked) == 7
