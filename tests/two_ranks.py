"""Checks between two ranks: test_training.py runs this under torchrun, and reads `ok NAME` for each check.

Rank 0 has one image with few labels, rank 1 three others; one process with all four has the gradient to be met.
"""

from __future__ import annotations

import copy
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from support import Network, assert_close, generator, make_class_weight, make_labels, make_pixel_weight
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import selfreg_fast as srf
from selfreg_fast import passes, reference

RANK = int(os.environ["RANK"])
DEVICE = torch.device(sys.argv[1], RANK if sys.argv[1] == "cuda" else None)
MINE = slice(0, 1) if RANK == 0 else slice(1, 4)

torch.manual_seed(0)
NETWORK = Network().double().to(DEVICE)
IMAGES = torch.randn(4, 3, 12, 16, dtype=torch.float64, generator=generator(0)).to(DEVICE)
LABELS = make_labels((4, 12, 16), 5)
LABELS[0, 1:] = 255
LABELS = LABELS.to(DEVICE)
CLASS_WEIGHT, PIXEL_WEIGHT = make_class_weight(5, device=DEVICE), make_pixel_weight(LABELS.shape, device=DEVICE)


# ------------------------------------------------------------------------------------------------- losses


def mea(library: Any, exits: list[Tensor], labels: Tensor, weight: Tensor, **group: Any) -> Tensor:
    return library.mea_loss(exits, labels, class_weight=CLASS_WEIGHT, label_smoothing=0.1, **group)


def soft(library: Any, exits: list[Tensor], labels: Tensor, weight: Tensor, **group: Any) -> Tensor:
    sr_f = library.sr_f_loss(exits, temperature=2.0, pixel_weight=weight, size=labels.shape[1:], **group)
    return sr_f + library.sr_l_loss(exits, temperature=2.0, renormalize=True, **group)


def total(library: Any, exits: list[Tensor], labels: Tensor, weight: Tensor, **group: Any) -> Tensor:
    options = {"temperature": 2.0, "class_weight": CLASS_WEIGHT, "pixel_weight": weight, "mea_weight": 0.7, **group}
    return library.self_regulation_loss(exits, labels, **options).total


def parts(library: Any, exits: list[Tensor], labels: Tensor, weight: Tensor, **group: Any) -> Tensor:
    out = library.self_regulation_loss(exits, labels, temperature=2.0, **group)
    return out.mea + 0.5 * out.sr_f + 2 * out.sr_l + 0.1 * out.total


def features(library: Any, exits: list[Tensor], labels: Tensor, weight: Tensor, **group: Any) -> Tensor:
    more = {"features": [2 * z[:, :3] for z in exits], "image_logits": [z.mean((2, 3)) for z in exits]}
    return library.self_regulation_loss(exits, labels, sr_f_weight=0.3, **more, **group).total


def matrix(library: Any, exits: list[Tensor], labels: Tensor, weight: Tensor, **group: Any) -> Tensor:
    options = {"teachers": [0, -1], "mask_soft": True, "detach_teacher": False, "pixel_weight": weight, **group}
    return library.exit_loss_matrix(exits, labels, **options).sum()


def published(library: Any, exits: list[Tensor], labels: Tensor, weight: Tensor, **group: Any) -> Tensor:
    module = srf.SelfRegulationLoss.published(backend="reference" if library is reference else "auto", **group)
    return module(exits, labels, image_logits=[z.mean((2, 3)) for z in exits]).total


LOSSES: list[Callable[..., Tensor]] = [mea, soft, total, parts, features, matrix, published]


def alone(loss: Callable[..., Tensor], labels: Tensor = LABELS, part: slice = slice(None)) -> list[Tensor]:
    """[loss, gradients of the parameters] of one process with these images."""
    network = copy.deepcopy(NETWORK)
    value = loss(reference, network(IMAGES[part]), labels[part], PIXEL_WEIGHT[part])
    return [value.detach(), *torch.autograd.grad(value, list(network.parameters()))]


def together(
    network: nn.Module, loss: Callable[..., Tensor], labels: Tensor = LABELS, part: slice = MINE, library: Any = srf
) -> list[Tensor]:
    """[mean of the ranks' losses, gradients of the parameters] of ranks that have a part of the images, each."""
    value = loss(library, network(IMAGES[part]), labels[part], PIXEL_WEIGHT[part], process_group="world")
    value.backward()
    value = value.detach().clone()
    dist.all_reduce(value)
    return [value / dist.get_world_size(), *(p.grad for p in network.parameters())]


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, device_ids=[DEVICE] if DEVICE.type == "cuda" else None)


def parallel() -> nn.Module:
    return data_parallel(copy.deepcopy(NETWORK))


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Within 1e-12: some hundreds of roundings of float64, relative to the largest element."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, 1e-12, what=f"{what}, {f'gradient {i - 1}' if i else 'loss'}")


# ------------------------------------------------------------------------------------------------- checks


def check_that_two_ranks_have_the_gradient_of_one() -> None:
    """Every loss, fused and reference, in DDP; a local mean would not do."""
    for loss in LOSSES:
        expected = alone(loss)
        for library in (srf, reference):
            assert_same(together(parallel(), loss, library=library), expected, f"{loss.__name__}, {library.__name__}")
    network = parallel()
    total(srf, network(IMAGES[MINE]), LABELS[MINE], PIXEL_WEIGHT[MINE]).backward()
    local, expected = next(network.parameters()).grad, alone(total)[1]
    assert (local - expected).abs().max() > 0.1 * expected.abs().max(), "the ranks are too even to tell"


def check_a_rank_on_which_nothing_counts() -> None:
    """Every pixel ignored, then no image at all: it adds exactly 0, and nobody waits for it."""
    nothing = LABELS.index_fill(0, torch.tensor([0], device=DEVICE), 255)
    for loss in (mea, matrix):
        assert_same(together(parallel(), loss, nothing), alone(loss, nothing), f"{loss.__name__}, ignored")
    exits = [z.detach().requires_grad_() for z in NETWORK(IMAGES[MINE])]
    value = mea(srf, exits, nothing[MINE], PIXEL_WEIGHT, process_group="world")
    value.backward()
    assert (RANK == 0) == (not value) == (not any(z.grad.any() for z in exits))

    for loss in (mea, total, features, published):
        empty = MINE if RANK == 1 else slice(0, 0)
        assert_same(together(parallel(), loss, part=empty), alone(loss, part=slice(1, 4)), f"{loss.__name__}, empty")
    for loss in (mea, matrix):  # nor on any other
        assert not any(x.any() for x in together(parallel(), loss, torch.full_like(LABELS, 255)))


def check_one_launch_and_one_all_reduce() -> None:
    """A step of the total writes its gradients in the forward launch, as without a group."""
    exits = [z.detach().requires_grad_() for z in NETWORK(IMAGES[MINE])]
    with (
        patch.object(passes, "exit_loss", wraps=passes.exit_loss) as launches,
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduces,
    ):
        total(srf, exits, LABELS[MINE], PIXEL_WEIGHT[MINE], process_group="world").backward()
    assert (launches.call_count, all_reduces.call_count) == (1, 1)


def check_a_group_of_some_ranks() -> None:
    """Each rank in a group of its own: the mean over its own pixels."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    exits = NETWORK(IMAGES[MINE])
    for loss in LOSSES:
        arguments = (srf, exits, LABELS[MINE], PIXEL_WEIGHT[MINE])
        assert_close(loss(*arguments, process_group=groups[RANK]), loss(*arguments), 1e-12, what=loss.__name__)
    try:
        mea(*arguments, process_group=groups[1 - RANK])  # what new_group gives to those who are not in it
    except TypeError as error:
        assert "process_group: expected" in str(error)
    else:
        raise AssertionError("a rank outside the group was let in")


def check_compiled_model_and_loss() -> None:
    """In one graph, of any size; the group by name and as an object."""
    for group in ("world", dist.group.WORLD):
        network = copy.deepcopy(NETWORK)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            return srf.self_regulation_loss(network(images), labels, process_group=group).total  # noqa: B023

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
        for width in (16, 10):
            images, labels = IMAGES[MINE, :, :, :width], LABELS[MINE, :, :width]
            results = []
            for function in (step, compiled):
                value = function(images, labels)
                results.append([value.detach(), *torch.autograd.grad(value, list(network.parameters()))])
            assert_same(*results, f"width {width}")


def check_fsdp() -> None:
    """FSDP2 shards every stage and head; a step of SGD gives the parameters of one process."""
    expected = alone(total)
    network = copy.deepcopy(NETWORK)
    mesh = dist.init_device_mesh(DEVICE.type, (2,))
    for module in (*network.stages, *network.heads, network):
        fully_shard(module, mesh=mesh)
    mean, *grads = together(network, total)
    assert_same([mean, *(g.full_tensor() for g in grads)], expected, "FSDP2")
    torch.optim.SGD(network.parameters(), lr=0.5).step()
    stepped = [p.detach() - 0.5 * g for p, g in zip(NETWORK.parameters(), expected[1:], strict=True)]
    assert_same([p.detach().full_tensor() for p in network.parameters()], stepped, "FSDP2, after a step")


class Staged(nn.Module):
    """The network up to its last exit, of which MultiExit is to make exits again; stages recomputed if `recompute`."""

    def __init__(self) -> None:
        super().__init__()
        network = copy.deepcopy(NETWORK)
        self.stages = nn.ModuleList(nn.Sequential(stage, nn.SiLU()) for stage in network.stages)
        self.classifier = network.heads[-1]
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=False) if self.recompute else stage(x)
        return self.classifier(x)


def check_multi_exit() -> None:
    """In DDP as it is, compiled or with recomputed stages, and in FSDP2: several steps, validation in between."""
    torch.manual_seed(1)
    names = ("stages.0", "stages.1", "stages.2")
    exits = {"feature_channels": 6, "head": lambda channels, classes: nn.Conv2d(channels, classes, 1)}
    model = srf.MultiExit(Staged(), names, 5, IMAGES[:1], image_level=True, **exits)

    def gradient(wrapped: nn.Module, labels: Tensor, part: slice, sr: bool, **options: Any) -> list[Tensor]:
        """[loss, gradients of the parameters], by the same step of any model."""
        out = wrapped(IMAGES[part])
        criterion = srf.SelfRegulationLoss(temperature=2.0, class_weight=CLASS_WEIGHT, **options).enable_sr(sr)
        total = criterion(out.logits, labels[part], features=out.features, image_logits=out.image_logits).total
        total.backward()
        return [total.detach(), *(p.grad for p in wrapped.parameters())]

    nothing = LABELS.index_fill(0, torch.tensor([0], device=DEVICE), 255)
    steps = [(LABELS, False), (LABELS, True), (nothing, True), (nothing, False)]
    whole = slice(None)
    expected = [gradient(copy.deepcopy(model), labels, whole, sr, backend="reference") for labels, sr in steps]
    evaluated = copy.deepcopy(model).eval()(IMAGES)

    recomputed = copy.deepcopy(model)
    recomputed.network.recompute = True
    sharded, mesh = copy.deepcopy(model), dist.init_device_mesh(DEVICE.type, (2,))
    for module in (*sharded.network.stages, *sharded.exits, sharded):
        fully_shard(module, mesh=mesh)
    for what, wrapped in {
        "DDP": data_parallel(copy.deepcopy(model)),
        "DDP, recomputed": data_parallel(recomputed),
        "DDP, compiled": data_parallel(torch.compile(copy.deepcopy(model), backend="aot_eager")),
        "FSDP2": sharded,
    }.items():
        optimizer = torch.optim.SGD(wrapped.parameters())
        for (labels, sr), exact in zip(steps, expected, strict=True):
            optimizer.zero_grad()
            loss, *grads = gradient(wrapped, labels, MINE, sr, process_group="world")
            dist.all_reduce(loss)
            grads = [g.full_tensor() if wrapped is sharded else g for g in grads]
            assert_same([loss / 2, *grads], exact, f"{what}, SR {sr}")
            with torch.no_grad():
                assert_close(wrapped.eval()(IMAGES), evaluated, 1e-12, what=f"{what}, evaluated")
            wrapped.train()


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, function in globals().copy().items():
        if name.startswith("check_"):
            yield name.removeprefix("check_"), function


def main() -> None:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "ddp.py"), run_name="__main__")
    # Where one rank fails, the other one's all-reduce ends with an error, instead of waiting for half an hour.
    timeout = timedelta(seconds=60)
    # A store within torchrun's: the example has left in that one where its ranks met.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "nccl" if DEVICE.type == "cuda" else "gloo",
        store=dist.PrefixStore("checks", store),
        rank=RANK,
        world_size=2,
        timeout=timeout,
    )
    for name, check in checks():
        check()
        dist.barrier()
        if RANK == 0:
            print(f"ok {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
