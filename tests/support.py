"""What the test files share: inputs in every layout, losses with their gradients, comparisons that can fail."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfreg_fast import reference

LAYOUTS = ("contiguous", "channels_last", "transposed", "cropped", "cropped_channels_last", "expanded")


class Backend(NamedTuple):
    """A backend under test and the device its tensors live on."""

    name: str
    device: str

    @property
    def fused(self) -> bool:
        return self.name != "reference"

    def resizes(self, sizes: Iterable[Sequence[int]], size: Sequence[int]) -> bool:
        """Whether it interpolates in float32 or float64, if at all; the reference does in the exits' dtype."""
        return self.fused or all(tuple(s) == tuple(size) for s in sizes)

    @property
    def interpreted(self) -> bool:
        """Triton without a GPU: right, but a thousand times slower."""
        return self.name == "triton" and self.device == "cpu"


# ---------------------------------------------------------------------------------------------------------- inputs


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, C, ...) in memory as `layout` says; "expanded" repeats values, to have strides of 0."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":  # the last two dimensions swapped in memory
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "cropped":  # dense in no dimension, and at an odd offset
        room = x.new_full([d + 1 + i for i, d in enumerate(x.shape)], math.nan)
        view = room[tuple(slice(1, 1 + d) for d in x.shape)]
        return view.copy_(x)
    if layout == "cropped_channels_last":
        return in_layout(x.movedim(1, -1), "cropped").movedim(-1, 1)
    if layout == "expanded":
        one = x[:1] if x.dim() == 2 else x[:1, ..., :1]
        return one.contiguous().expand_as(x) if x.numel() else x
    raise ValueError(layout)


def make_exits(
    n: int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    sizes: Sequence[Sequence[int]] | None = None,
    scale: float = 2.0,
    seed: int = 0,
) -> list[Tensor]:
    """n exits of `shape` (B, C, ...), drawn in float64 from a normal distribution; `sizes`: (h, w) of each exit."""
    g = generator(seed)
    exits = []
    for i in range(n):
        full = (*shape[:2], *sizes[i]) if sizes is not None else shape
        x = scale * torch.randn(*full, dtype=torch.float64, generator=g)
        exits.append(in_layout(x.to(device=device, dtype=dtype), layout))
    return exits


def make_labels(
    shape: Sequence[int],
    num_classes: int,
    *,
    dtype: torch.dtype = torch.int64,
    ignore_index: int = 255,
    device: str = "cpu",
    layout: str = "contiguous",
    seed: int = 1,
) -> Tensor:
    """Labels (B, ...) of all classes, about a fifth of them ignored (where the dtype can say so)."""
    g = generator(seed)
    limits = torch.iinfo(dtype)
    labels = torch.randint(0, min(num_classes, limits.max + 1), tuple(shape), generator=g)
    if limits.min <= ignore_index <= limits.max:
        labels[torch.rand(tuple(shape), generator=g) < 0.2] = ignore_index
    return map_in_layout(labels.to(device=device, dtype=dtype), layout)


def make_pixel_weight(
    shape: Sequence[int], *, device: str = "cpu", layout: str = "contiguous", seed: int = 2
) -> Tensor:
    """Weights (B, ...) in [0, 2), about a third of them 0."""
    g = generator(seed)
    w = 2 * torch.rand(tuple(shape), generator=g)
    w[torch.rand(tuple(shape), generator=g) < 0.3] = 0
    return map_in_layout(w.to(device), layout)


def make_class_weight(num_classes: int, *, device: str = "cpu", seed: int = 3) -> Tensor:
    """(C,) weights in [0.5, 2), one of them 0 where there are more than two classes."""
    w = 0.5 + 1.5 * torch.rand(num_classes, generator=generator(seed))
    if num_classes > 2:
        w[1] = 0
    return w.to(device)


def map_in_layout(m: Tensor, layout: str) -> Tensor:
    """A map (B, ...) that lies in memory like exits of `layout`, as far as that makes sense without channels."""
    if m.dim() < 2 or layout in ("contiguous", "channels_last"):
        return m.contiguous()
    if layout == "expanded":
        return m[..., :1].contiguous().expand_as(m) if m.numel() else m
    if layout == "transposed":
        return m.transpose(0, -1).contiguous().transpose(0, -1)
    room = m.new_zeros([d + 2 for d in m.shape])
    return room[tuple(slice(1, 1 + d) for d in m.shape)].copy_(m)


def pyramid(n: int, size: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes of n exits that differ from each other: smaller than `size` in uneven ratios, one of them larger."""
    h, w = size
    ratios = [(2, 3), (1, 1), (5, 3), (1, 2), (0.75, 0.75), (3, 1), (1, 4), (2, 2)]
    return [(max(1, round(h / ratios[i % 8][0])), max(1, round(w / ratios[i % 8][1]))) for i in range(n)]


def eighth(n: int, size: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes of n exits of an eighth of `size`, as a network's are."""
    return [(-(-size[0] // 8), -(-size[1] // 8))] * n


def upstream(kind: str, out: Tensor, seed: int = 4) -> Tensor:
    """A gradient for `out`: "one"; "random" (of both signs); "expanded" (a stride of 0 everywhere, as after a sum)."""
    if kind == "one":
        return torch.ones_like(out)
    if kind == "random":
        g = torch.randn(out.shape, generator=generator(seed), dtype=torch.float64) - 0.25
        return g.to(device=out.device, dtype=out.dtype)
    return torch.tensor(-0.7, dtype=out.dtype, device=out.device).expand(out.shape)


class Network(nn.Module):
    """Three exits (B, 5, h/stride, w/stride) of images (B, 3, h, w), each a convolution further; without batch norm."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        convolutions = ((3, stride), (8, 1), (8, 1))
        self.stages = nn.ModuleList([nn.Conv2d(c, 8, 3, padding=1, stride=s) for c, s in convolutions])
        self.heads = nn.ModuleList([nn.Conv2d(8, 5, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        exits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x).relu()
            exits.append(head(x))
        return exits


# ------------------------------------------------------------------------------------------------- losses, gradients


def leaves(exits: Sequence[Tensor]) -> list[Tensor]:
    """The exits as leaves of a graph, with their strides."""
    return [z.detach().requires_grad_() for z in exits]


def gradients(out: Tensor, inputs: Sequence[Tensor], grad_output: Tensor | None = None, **kwargs: Any) -> list[Tensor]:
    """d out / d inputs, zeros where `out` does not depend on one."""
    if not out.requires_grad:
        return [torch.zeros_like(z) for z in inputs]
    grads = torch.autograd.grad(out, inputs, grad_output, allow_unused=True, **kwargs)
    return [torch.zeros_like(z) if g is None else g for z, g in zip(inputs, grads, strict=True)]


def value_and_gradients(
    function: Callable[[list[Tensor]], Tensor], exits: Sequence[Tensor], kind: str = "one", factor: float = 1.0
) -> list[Tensor]:
    """[value, gradient of each exit] of function(exits), under the gradient `factor * upstream(kind)` of its value."""
    inputs = leaves(exits)
    out = function(inputs)
    grad_output = upstream(kind, out)
    return [out.detach(), *gradients(out, inputs, grad_output if factor == 1 else factor * grad_output)]


def in_double(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating tensor in float64: exactly what the function was given."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


# -------------------------------------------------------------------------------------------------------- comparison

# Relative errors that a result of this dtype may have against float64 on the same inputs. float32: the promise of the
# package; float64: some hundreds of rounding units, sums over pixels included; halves: two roundings of the result.
RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}


def relative_error(actual: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """The larger of the relative L2 error and the maximal error relative to the maximum, less `floor` per element."""
    error = (actual.double() - exact.double()).abs().sub(floor).clamp_min(0)
    if not error.any():
        return 0.0
    exact = exact.double().abs()
    scale = exact.max()  # a mean gradient is about 1 / (H W): only its error relative to itself says anything
    if scale == 0:
        return math.inf
    return max((error / scale).norm().item() / (exact / scale).norm().item(), (error.max() / scale).item() / 4)


def assert_close(actual: Tensor, exact: Tensor, relative: float, floor: float = 0.0, what: str = "") -> None:
    """`actual` has the shape of `exact`, is not finite where that is not, and elsewhere errs by at most `relative`."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    odd, odd_exact = actual[~finite].double(), exact[~finite].double()
    assert torch.equal(odd.nan_to_num(nan=7.0), odd_exact.nan_to_num(nan=7.0)), f"{what}: {odd}, expected {odd_exact}"
    assert actual[finite].isfinite().all(), f"{what}: not finite where the exact value is"
    error = relative_error(actual[finite], exact[finite], floor)
    assert error <= relative, f"{what}: relative error {error:.2e}, allowed {relative:.2e}"


def smallest(dtype: torch.dtype) -> float:
    """What underflow may cost in a result of `dtype`."""
    info = torch.finfo(dtype)
    return info.smallest_normal if info.bits >= 32 else info.smallest_normal * info.eps


# ------------------------------------------------------------------------------------------------------ error bounds

# How far a result may be from float64, as docs/accuracy.md and the docstring of exit_loss_matrix say:
# the loss of exits of this dtype by `sum`, and an element of their gradient by `sum` and by `result`,
# `sum` being relative to what is added up in it (`magnitudes`), and `result` to the element itself.
ERRORS = {
    torch.float64: {"sum": 1e-14, "result": 0.0},
    torch.float32: {"sum": 2e-6, "result": 0.0},
    torch.float16: {"sum": 2e-6, "result": 2**-10},
    torch.bfloat16: {"sum": 2e-6, "result": 2**-7},
}


def magnitudes(
    exits: Sequence[Tensor],
    grad_losses: Tensor,
    labels: Tensor | None = None,
    *,
    teachers: Sequence[int] = (),
    temperature: float = 1.0,
    renormalize: bool = False,
    target: str = "soft",
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    pixel_weight: Tensor | None = None,
    mask_soft: bool = False,
    reduction: str = "mean",
    detach_teacher: bool = True,
) -> list[Tensor]:
    """What the losses and the exits' gradients add up, in float64: their rounding is relative to it, not to the sum.

    Of a pixel, times its weight and divided as the reduction says:
    - a label loss, and its gradient: the class's weight (a logarithm near 0 is rounded like one near 1);
    - a soft loss: max(tau, tau^2); its gradient: tau P, with P the sum of the target (both 1 for target="argmax");
    - the gradient of a teacher that learns from it: loss / tau + P.

    Args: those of exit_loss_matrix; grad_losses: the gradient of its losses, of their shape.

    Returns: those of the losses, of their shape, and of each exit's gradient, (B, 1, ...).
    """
    n, tau = len(exits), temperature if target == "soft" else 1.0
    resize = {"size": size, "mode": "bilinear", "align_corners": align_corners}
    z = [x.detach().double() for x in exits]
    if size is not None:
        z = [F.interpolate(x, **resize) for x in z]
    weight = torch.ones_like(z[0][:, 0]) if pixel_weight is None else pixel_weight.double()
    valid = torch.ones_like(weight) if labels is None else (labels.long() != ignore_index).double()

    def divided(m: Tensor, by: Tensor) -> Tensor:
        return m if reduction != "mean" else m / by if by > 0 else torch.zeros_like(m)

    rows = [torch.zeros_like(weight)]
    if labels is not None:
        of_class = z[0].new_ones(z[0].shape[1]) if class_weight is None else class_weight.double()
        of_label = of_class[labels.long() * valid.long()]
        smoothed = (1 - label_smoothing) * of_label + label_smoothing * of_class.mean()
        rows = [divided(weight * valid * smoothed, (weight * valid * of_label).sum())]
    soft = weight * valid if mask_soft else weight
    rows += [divided(soft, soft.sum())] * len(teachers)
    learns = not detach_teacher and target == "soft"
    kwargs: dict[str, Any] = {"temperature": tau, "renormalize": renormalize, "reduction": "none"}
    of_pixels = reference.exit_loss_matrix(z, teachers=teachers, **kwargs) if learns else torch.zeros(())

    losses = torch.stack(rows).unsqueeze(1).repeat(1, n, *[1] * weight.dim())
    losses[1:] *= max(tau, tau**2)
    gradients = [torch.zeros_like(weight) for _ in z]
    for r, row in enumerate(rows):
        t, power = n, torch.ones_like(weight)
        if r > 0:
            t = teachers[r - 1] % n
            losses[r, t] = 0
            power = tau * ((z[t].log_softmax(1) / tau).exp().sum(1) if target == "soft" and not renormalize else power)
        for i in range(n):
            given = grad_losses[r, i].double().abs() * row
            if i != t:
                gradients[i] += given * power
            if i != t < n and learns:
                gradients[t] += given * (of_pixels[r, i] + power) / tau
    if reduction != "none":
        losses = losses.flatten(2).sum(2)
    result = [losses]
    for x, m in zip(exits, gradients, strict=True):
        m = m.unsqueeze(1)
        if size is not None:
            small = torch.zeros_like(x[:, :1], dtype=torch.float64).requires_grad_()
            (m,) = torch.autograd.grad(F.interpolate(small, **resize), small, m)
        result.append(m)
    return result


def share_of_bound(
    actual: Sequence[Tensor], exact: Sequence[Tensor], added: Sequence[Tensor], dtype: torch.dtype, times: float = 1.0
) -> float:
    """The largest error of [loss, gradient of each exit] of exits of `dtype`, as a share of what is allowed.

    `added`: their magnitudes; `times`: by how much ERRORS may be exceeded. Infinite where one is not finite, unless it
    is the infinity of a number beyond its dtype's largest.
    """
    worst = 0.0
    for i, (a, e, m) in enumerate(zip(actual, exact, added, strict=True)):
        assert a.shape == e.shape, f"shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        e = e.double()
        bound = ERRORS[dtype]["sum"] * (m + e.abs() if i == 0 else m)
        if i > 0:
            bound = bound + ERRORS[dtype]["result"] * e.abs()
        bound = times * bound + smallest(a.dtype)
        if a.numel():
            overflows = (a == e.sign() * math.inf) & (e.abs() + bound > torch.finfo(a.dtype).max)
            errors = (a.double() - e).abs().masked_fill(overflows, 0)
            worst = max(worst, (errors / bound).nan_to_num(nan=math.inf).max().item())
    return worst


def share_where_rounded(
    exits: Sequence[Tensor],
    actual: Sequence[Tensor],
    exact: Sequence[Tensor],
    added: Sequence[Tensor],
    size: Sequence[int],
    temperature: float,
    positions: bool,
) -> float:
    """share_of_bound with leeway where logits are rounded on their way: divided by tau, or interpolated.

    `positions`: what they are interpolated at is rounded, too, as it is by the reference, relative to itself, so that
    an element beside a pixel may have part in it.
    """
    largest = max((z.abs().max().item() for z in exits if z.numel()), default=0.0)
    if positions:
        largest *= max(*size, *(d for z in exits for d in z.shape[2:]))
        added = [added[0], *(m.amax((2, 3), keepdim=True) if m.numel() else m for m in added[1:])]
    return share_of_bound(actual, exact, added, exits[0].dtype, 1 + largest / 16 * max(1, 1 / temperature))


# ------------------------------------------------------------------------------------------------------ combinations


def pairwise(
    axes: Mapping[str, Sequence[Any]], valid: Callable[[dict[str, Any]], bool], seed: int = 0
) -> list[dict[str, Any]]:
    """A few valid cases in which any two values of any two axes meet, wherever a valid case can be found for them."""
    rng = random.Random(seed)
    names = list(axes)
    missing = {
        (a, i, b, j): None  # a dict, for its order
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    cases = []
    while missing:
        a, i, b, j = next(iter(missing))
        best, most = None, 0
        for _ in range(40):
            choice = {n: rng.randrange(len(axes[n])) for n in names} | {a: i, b: j}
            if not valid({n: axes[n][k] for n, k in choice.items()}):
                continue
            met = sum((c, choice[c], d, choice[d]) in missing for c, d in itertools.combinations(names, 2))
            if met > most:
                best, most = choice, met
        if best is None:
            del missing[a, i, b, j]
            continue
        for c, d in itertools.combinations(names, 2):
            missing.pop((c, best[c], d, best[d]), None)
        cases.append({n: axes[n][k] for n, k in best.items()})
    return cases
