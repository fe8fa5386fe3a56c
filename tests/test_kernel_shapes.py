"""Numbers of channels, layouts and alignments for which a kernel takes another way through the same formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import (
    RELATIVE,
    Backend,
    assert_close,
    generator,
    in_double,
    make_class_weight,
    make_exits,
    make_labels,
    make_pixel_weight,
    smallest,
    value_and_gradients,
)

import selfreg_fast as srf
from selfreg_fast import reference

# Around the borders of rows that stay in registers, are spread over lanes or warps, or are read block by block.
CHANNELS = (1, 4, 8, 9, 16, 20, 24, 27, 32, 33, 64, 100, 128, 150, 192, 256, 300, 512, 600, 1024, 1100)
# A size that vectors of four and of two pixels divide, and one that none does; more than a tile where rows are short.
SIZES = {"aligned": (2, 6, 4), "odd": (1, 5, 7), "tiles": (3, 20, 32)}
OPTIONS: dict[str, dict[str, Any]] = {
    "objective": {"teachers": (0, -1), "temperature": 2},
    "renormalised": {"teachers": (0,), "temperature": 2, "renormalize": True, "label_smoothing": 0.1},
    "argmax": {"teachers": (1, 0), "target": "argmax"},
    "learning": {"teachers": (-1,), "temperature": 3, "detach_teacher": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped_channels_last"])
@pytest.mark.parametrize(("channels", "size"), [(c, s) for c in CHANNELS for s in SIZES if c <= 32 or s != "tiles"])
def test_every_way_through_the_kernels(
    backend: Backend, channels: int, layout: str, size: str, dtype: torch.dtype, not_all: bool
) -> None:
    """Value and gradients, with labels and without, of one option for each case, in turn."""
    if not_all and (dtype != torch.float32 or size != "odd" or layout == "contiguous"):
        pytest.skip("triton, interpreted: one dtype, size and layout for each number of channels")
    batch, *spatial = shape = SIZES[size]
    name = list(OPTIONS)[(channels + len(layout) + len(size)) % len(OPTIONS)]
    exits = make_exits(3, (batch, channels, *spatial), dtype=dtype, device=backend.device, layout=layout)
    kwargs = dict(OPTIONS[name])
    if (channels + len(size)) % 3:
        kwargs["labels"] = make_labels(shape, channels, ignore_index=-1, device=backend.device)
        kwargs["ignore_index"] = -1
        kwargs["class_weight"] = make_class_weight(channels, device=backend.device)
    if channels % 2:
        kwargs["pixel_weight"] = make_pixel_weight(shape, device=backend.device)
    factor = batch * spatial[0] * spatial[1]
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, **in_double(kwargs)), [z.double() for z in exits], "random", factor
    )
    actual = value_and_gradients(
        lambda e: srf.exit_loss_matrix(e, backend=backend.name, **kwargs), exits, "random", factor
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(actual[0], exact[0], RELATIVE[wide], smallest(wide), f"{name}: value")
    for i, (a, e) in enumerate(zip(actual[1:], exact[1:], strict=True)):
        # Rounding where sigma - target cancels, which for one class it does everywhere.
        floor = smallest(dtype) + 64 * torch.finfo(wide).eps / channels
        assert_close(a, e, RELATIVE[dtype], floor, f"{name}: gradient of exit {i}")


def test_a_maximum_that_grows_from_block_to_block(backend: Backend) -> None:
    """Of channels, in float64: more than the 1024 that Triton's interpreter takes at once, the largest at the end."""
    exits = [z + torch.linspace(0, 9, 1100)[:, None] for z in make_exits(2, (1, 1100, 5), dtype=torch.float64)]
    exits = [z.to(backend.device) for z in exits]
    labels = make_labels((1, 5), 1100, ignore_index=-1, device=backend.device)
    kwargs: dict[str, Any] = {"teachers": (0, 1), "temperature": 2, "ignore_index": -1, "label_smoothing": 0.1}
    exact = value_and_gradients(lambda e: reference.exit_loss_matrix(e, labels, **kwargs), exits)
    actual = value_and_gradients(lambda e: srf.exit_loss_matrix(e, labels, backend=backend.name, **kwargs), exits)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, RELATIVE[torch.float64], 1e-15)


def test_sums_over_any_number_of_programs(backend: Backend) -> None:
    """Those of a large image, of which Triton's interpreter would run a program in milliseconds."""
    if backend.name != "triton":
        pytest.skip(f"{backend.name}: its sums have no blocks")
    from selfreg_fast import triton

    for programs in (1, 4096, 4097, 10_000):  # of which 4096 are a block
        partials = torch.rand(6, programs, generator=generator(0)).to(backend.device)
        norms = torch.tensor([0.5, 3.0], dtype=torch.float64, device=backend.device)
        losses = partials.new_empty(2, 3)
        triton._finish(partials, norms, losses, 3)
        exact = partials.double().sum(1).view(2, 3) * norms[:, None]
        assert_close(losses, exact, 1e-6)


@pytest.mark.skipif(srf.backends()["cpu"] != "available", reason="no CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", [(5, 229, 231), (1, 515, 513), (3, 256, 384)], ids=str)
def test_gradients_larger_than_caches(size: tuple[int, int, int], dtype: torch.dtype, threads: None) -> None:
    """Written past the caches on the CPU, they equal bit for bit those of the same exits in small pieces.

    Images that begin anywhere in a line of memory, tiles that lie in two of them, a last tile of 3 pixels.
    """
    exits = make_exits(2, (size[0], 9, *size[1:]), dtype=dtype)
    labels = make_labels(size, 9)

    def gradients(exits: list[torch.Tensor], labels: torch.Tensor) -> list[torch.Tensor]:
        leaves = [z.detach().clone().requires_grad_() for z in exits]
        srf.self_regulation_loss(leaves, labels, reduction="sum", backend="cpu").total.backward()
        return [z.grad for z in leaves]

    torch.set_num_threads(2)
    whole = gradients(exits, labels)
    assert sum(g.numel() for g in whole) >= 1 << 22  # from here on they are
    for image in range(size[0]):
        for rows in torch.arange(size[1]).chunk(5):
            piece = (slice(image, image + 1), ..., rows, slice(None))
            parts = gradients([z[piece] for z in exits], labels[piece])
            assert all(torch.equal(g[piece], part) for g, part in zip(whole, parts, strict=True))


@pytest.mark.skipif(srf.backends()["cpu"] != "available", reason="no CPU kernels")
@pytest.mark.parametrize("lanes", [16, 8], ids=str)
def test_large_gradients_with_channels_between_rows(lanes: int) -> None:
    """As many numbers in a row of all channels as a vector holds: neighbours in memory, but not all of one channel."""
    z = torch.randn(1, 1 << 18, 2, lanes // 2, generator=generator(0)).repeat(1, 16 // lanes, 1, 1).permute(0, 2, 1, 3)
    labels = make_labels((1, *z.shape[2:]), 2)
    run = {"reduction": "sum", "labels": labels}
    expected = value_and_gradients(lambda e: reference.mea_loss(e, **run), [z.double()])
    actual = value_and_gradients(lambda e: srf.mea_loss(e, backend="cpu", **run), [z])
    assert_close(actual[1], expected[1], 1e-5)
