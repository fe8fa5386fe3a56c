"""What only a GPU can show: streams, graphs, the absence of waiting, memory, several devices, tensors of any size."""

from __future__ import annotations

import copy
import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support import (
    Backend,
    Network,
    assert_close,
    leaves,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    value_and_gradients,
)
from torch import Tensor

import selfreg_fast as srf
from selfreg_fast import reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True),
]
HALVES = (torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["float32", "float16", "bfloat16"])
SHAPE = (2, 21, 33, 47)


@pytest.fixture(autouse=True)
def on_a_gpu(backend: Backend) -> None:
    if backend.device != "cuda" and os.environ.get("SELFREG_REHEARSAL") != "1":
        pytest.skip(f"{backend.name}: its kernels run on the CPU here")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Within `torch.cuda.set_sync_debug_mode("error")`, what waits for the GPU raises; here it is put back."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def _inputs(
    shape: Sequence[int] = SHAPE, n: int = 3, device: str = "cuda", **kwargs: Any
) -> tuple[list[Tensor], Tensor]:
    exits = make_exits(n, shape, device=device, **kwargs)
    return leaves(exits), make_labels((shape[0], *shape[2:]), shape[1], device=device)


def _step(
    backend: Backend, exits: Sequence[Tensor], labels: Tensor, factor: Tensor | float = 1.0, **options: Any
) -> list[Tensor]:
    """[loss, gradients of factor * loss]: a training step."""
    out = srf.self_regulation_loss(exits, labels, temperature=2.0, backend=backend.name, **options)
    return [out.total.detach(), *torch.autograd.grad(out.total * factor, exits)]


def _captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the step, and what the step returned, which a replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks of a capture: what is set up in a first call is set up
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which runs nothing
        result = step()
    return graph, result


def _assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"{'loss' if i == 0 else f'gradient {i - 1}'} differs"


# ------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("dtype", "label"),
    [
        (torch.int64, 200),
        (torch.int64, -1),
        (torch.int64, 2**40 + 3),
        (torch.int64, -(2**62)),
        (torch.int32, 2**31 - 1),
        (torch.uint8, 254),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [21, 150])
def test_a_bad_label_is_a_nan_and_nothing_worse(
    backend: Backend, channels: int, layout: str, dtype: torch.dtype, label: int
) -> None:
    """No read out of bounds and no assertion on the device, after which no call would work: the loss is NaN."""
    exits, labels = _inputs((2, channels, 9, 16), layout=layout)
    bad = labels.to(dtype, copy=True)
    bad[-1, -1, 1] = label
    weight = make_class_weight(channels, device="cuda")
    for options in ({}, {"class_weight": weight, "label_smoothing": 0.1}):
        assert _step(backend, exits, bad, **options)[0].isnan()
    with pytest.raises(ValueError, match=f"got {label} at"):
        _step(backend, exits, bad, validate=True)
    torch.cuda.synchronize()
    exact = reference.self_regulation_loss([z.detach().double() for z in exits], labels, temperature=2.0).total
    assert_close(_step(backend, exits, labels)[0], exact, 1e-5)


# ------------------------------------------------------------------------------------------ graphs, streams, devices


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_graph_capture_and_replay(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """A captured step, replayed on new values, gives what an eager step gives on them."""
    exits, labels = _inputs(dtype=dtype, layout=layout)
    factor = torch.tensor(3.0, device="cuda")
    graph, captured = _captured(lambda: _step(backend, exits, labels, factor))
    for seed in (7, 8):
        fresh = make_exits(3, SHAPE, dtype=dtype, layout=layout, device="cuda", seed=seed)
        with torch.no_grad():
            for z, new in zip(exits, fresh, strict=True):
                z.copy_(new)
            labels.copy_(make_labels(labels.shape, SHAPE[1], seed=seed))
            factor.fill_(float(seed))
        graph.replay()
        torch.cuda.synchronize()
        _assert_same(captured, _step(backend, leaves(fresh), labels, factor))


def test_a_captured_training_step(backend: Backend) -> None:
    """Network, loss and update in one graph, replayed on other images: the parameters of the same steps without it."""
    torch.manual_seed(0)
    networks = [Network().double().cuda()]
    networks.append(copy.deepcopy(networks[0]))
    criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)
    batches = [torch.randn(2, 3, 16, 24, dtype=torch.float64, device="cuda") for _ in range(5)]
    targets = [make_labels((2, 16, 24), 5, device="cuda", seed=seed) for seed in range(5)]
    images, labels = batches[0].clone(), targets[0].clone()

    def trained(network: Network) -> Callable[[], None]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

        def step() -> None:
            optimizer.zero_grad()
            criterion(network(images), labels).total.backward()
            optimizer.step()

        return step

    eager, step = map(trained, networks)
    graph, _ = _captured(step)
    for _ in range(3):
        eager()
    for new_images, new_labels in zip(batches, targets, strict=True):
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        eager()
    torch.cuda.synchronize()
    for a, e in zip(networks[1].parameters(), networks[0].parameters(), strict=True):
        assert_close(a.detach(), e.detach(), 1e-9)


@dtypes
def test_side_stream(backend: Backend, dtype: torch.dtype) -> None:
    """The kernels run on the current stream: they wait for what is before them there, and for nothing else."""
    exits, labels = _inputs(dtype=dtype)
    factor = torch.tensor(3.0, device="cuda")
    expected = _step(backend, exits, labels, factor)
    late = leaves([torch.full_like(z, float("nan")) for z in exits])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(300_000_000)  # clock cycles: more than a tenth of a second
        with torch.no_grad():
            for z, value in zip(late, exits, strict=True):
                z.copy_(value)
        actual = _step(backend, late, labels, factor)
    stream.synchronize()
    _assert_same(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="has one CUDA device")
@dtypes
def test_second_device(backend: Backend, dtype: torch.dtype) -> None:
    """Tensors on cuda:1 while cuda:0 is current."""
    exits, labels = _inputs(dtype=dtype)
    expected = _step(backend, exits, labels, 3.0)
    assert torch.cuda.current_device() == 0
    actual = _step(backend, leaves([z.to("cuda:1") for z in exits]), labels.to("cuda:1"), 3.0)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in actual)
    torch.cuda.synchronize("cuda:1")
    for a, e in zip(actual, expected, strict=True):  # another GPU may have another number of blocks
        assert_close(a.cpu(), e.cpu(), 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@dtypes
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_waits_for_the_gpu(backend: Backend, weighted: bool, dtype: torch.dtype, no_waiting: None) -> None:
    """Forward and backward of the total and of its parts, as with a loss scaler, twice through one graph."""
    exits, labels = _inputs(dtype=dtype)
    options: dict[str, Any] = {"temperature": 2.0, "backend": backend.name}
    if weighted:
        options |= {
            "class_weight": make_class_weight(SHAPE[1], device="cuda"),
            "pixel_weight": make_pixel_weight(labels.shape, device="cuda"),
            "label_smoothing": 0.1,
        }
    scale = torch.tensor(1024.0, device="cuda")

    def steps() -> None:
        out = srf.self_regulation_loss(exits, labels, **options)
        (out.total * scale).backward(retain_graph=True)
        (out.total * scale).backward()
        srf.self_regulation_loss(exits, labels, **options).total.backward()
        out = srf.self_regulation_loss(exits, labels, **options)
        (out.mea + 0.5 * out.sr_f + out.sr_l).backward()
        srf.self_regulation_loss(exits, labels, reduction="none", **options).total.mean().backward()
        with torch.no_grad():
            srf.self_regulation_loss(exits, labels, **options)

    steps()  # Triton compiles in the first
    torch.cuda.set_sync_debug_mode("error")
    steps()


# ------------------------------------------------------------------------------------------ memory


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_peak_memory_is_that_of_the_gradients(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """Above the inputs, a step takes the gradients and 5 % at most."""
    exits, labels = _inputs((2, 21, 256, 256), 5, dtype=dtype, layout=layout)
    _step(backend, exits, labels)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = srf.self_regulation_loss(exits, labels, temperature=2.0, backend=backend.name)
    grads = torch.autograd.grad(out.total, exits)
    peak = torch.cuda.max_memory_allocated() - before
    wanted = sum(g.nbytes for g in grads)
    print(f"peak above the inputs: {peak / wanted:.3f} x the gradients")
    assert peak <= 1.05 * wanted


@dtypes
def test_steps_leave_nothing_behind(backend: Backend, dtype: torch.dtype) -> None:
    """Memory after 20 steps is that after the first, without the help of the garbage collector."""
    exits, labels = _inputs(dtype=dtype)
    gc.collect()
    taken = []
    for _ in range(20):
        _step(backend, exits, labels, 3.0)
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
    assert max(taken) <= taken[0]


# ------------------------------------------------------------------------------------------ gradients


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_in_every_run(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """`use_deterministic_algorithms` changes nothing and forbids nothing. It also fills what torch leaves unwritten."""
    exits, labels = _inputs((2, 21, 97, 101), 5, dtype=dtype, layout=layout)
    expected = _step(backend, exits, labels, 3.0)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            _assert_same(_step(backend, exits, labels, 3.0), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_saved_gradients_are_scaled_once(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """A factor of 1 leaves every bit, one of 2 doubles, and two backwards through one graph add up."""
    exits, labels = _inputs(dtype=dtype, layout=layout)
    once = _step(backend, exits, labels)[1:]
    one = torch.ones((), device="cuda", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _assert_same(_step(backend, exits, labels, one)[1:], once)
    _assert_same(_step(backend, exits, labels, 2 * one)[1:], [2 * g for g in once])

    total = srf.self_regulation_loss(exits, labels, temperature=2.0, backend=backend.name).total
    total.backward(retain_graph=True)
    total.backward()
    _assert_same([z.grad for z in exits], [2 * g for g in once])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(backend: Backend, layout: str) -> None:
    """2.3e9 elements an exit: the loss, and the gradients of pixels on both sides of 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 26 * 2**30:
        pytest.skip("needs 26 GiB of free device memory")
    channels, height, width = 21, 11000, 10000
    random_numbers = torch.Generator("cuda").manual_seed(0)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    exits = []
    for _ in range(2):
        z = torch.empty((1, channels, height, width), dtype=torch.bfloat16, device="cuda", memory_format=memory)
        exits.append(z.normal_(generator=random_numbers).requires_grad_())
    labels = torch.randint(channels, (1, height, width), generator=random_numbers, device="cuda", dtype=torch.uint8)
    loss, *grads = _step(backend, exits, labels, reduction="sum")

    # In channels_last, element 2^31 belongs to pixel 2^31 / 21; in NCHW pixel 2^31 - 19 H W of channel 19 does.
    border = 2**31 // channels if layout == "channels_last" else 2**31 - 19 * height * width
    pixels = torch.tensor([0, 1, *range(border - 40, border + 40), height * width - 2, height * width - 1])
    pixels = torch.cat([pixels, torch.randint(height * width, (400,), generator=torch.Generator().manual_seed(0))])
    rows, columns = (pixels // width).cuda(), (pixels % width).cuda()
    samples = [z.detach()[:, :, rows, columns].double() for z in exits]
    exact = value_and_gradients(
        lambda e: reference.self_regulation_loss(e, labels[:, rows, columns], temperature=2.0, reduction="sum").total,
        samples,
    )
    for g, e in zip(grads, exact[1:], strict=True):
        assert_close(g[:, :, rows, columns], e, torch.finfo(torch.bfloat16).eps)
    del grads

    expected = torch.zeros((), dtype=torch.float64, device="cuda")
    with torch.no_grad():
        for top in range(0, height, 250):
            part = slice(top, top + 250)
            out = reference.self_regulation_loss(
                [z[:, :, part].float() for z in exits], labels[:, part], temperature=2.0, reduction="sum"
            )
            expected += out.total.double()
    assert_close(loss, expected, 1e-4)
    del exits, z, samples, out
    torch.cuda.empty_cache()  # for the tests in other processes


# ------------------------------------------------------------------------------------------ training


def test_autocast_and_gradient_scaler(backend: Backend) -> None:
    """float16 exits and a scaled loss: every step is taken, and the first gradients are those of float32.

    Their largest is 0.88, which 2^16 times would be just below float16's largest number: the scale is less.
    """
    torch.manual_seed(0)
    network = Network(stride=1).cuda()
    x = torch.randn(2, 3, 256, 256, device="cuda")
    labels = make_labels((2, 256, 256), 5, device="cuda")
    criterion = srf.SelfRegulationLoss(temperature=2.0, backend=backend.name)
    exact = torch.autograd.grad(
        reference.self_regulation_loss(network(x), labels, temperature=2.0).total, list(network.parameters())
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            exits = network(x)
            assert exits[0].dtype == torch.float16
            loss = criterion(exits, labels).total
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step == 0:
            for p, e in zip(network.parameters(), exact, strict=True):
                assert_close(p.grad, e, 5e-2)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**14, "a step was skipped: its gradients were not finite"
    assert losses[-1] < losses[0]


def test_crops_of_random_size_compile_little(backend: Backend) -> None:
    """20 sizes: at most three compilations of each kernel."""
    if backend.name != "triton":
        pytest.skip(f"{backend.name}: compiles nothing at run time")
    from triton.runtime.jit import JITFunction

    from selfreg_fast.triton import kernels

    def compiled() -> dict[str, int]:
        found = {name: k for name, k in vars(kernels).items() if isinstance(k, JITFunction)}
        return {name: sum(len(cache[0]) for cache in k.device_caches.values()) for name, k in found.items()}

    sizes = random.Random(0)
    before = compiled()
    for _ in range(20):
        exits, labels = _inputs((sizes.choice((1, 2, 4)), 23, sizes.randint(16, 90), sizes.randint(16, 90)))
        _step(backend, exits, labels, 3.0)
    new = {name: count - before[name] for name, count in compiled().items()}
    print(new)
    assert max(new.values()) >= 1, "nothing was counted"
    assert all(count <= 3 for count in new.values()), new
