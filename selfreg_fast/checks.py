"""What arguments must be: errors that name the argument, what was expected and what came, and warnings given once."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
_TAU = (1e-15, 1e15)  # float32 has its square and its reciprocal
_RESIZED = (4, 5)  # dimensions of exits that may differ in size

# What other losses call our arguments, where the nearest name is another one.
_ELSEWHERE = {
    "weight": "class_weight",
    "weights": "exit_weights",
    "loss_weight": "mea_weight",
    "ignore_label": "ignore_index",
    "void_label": "ignore_index",
    "tau": "temperature",
    "T": "temperature",
    "targets": "labels",
    "loss_weights": "exit_weights",
    "mode": "target",
}
_warned: set[str] = set()


def named(function: Callable[P, R]) -> Callable[P, R]:
    """`function`; an argument of a name that it does not have is an error with the name it may be."""
    names = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kwargs.keys() <= names:
            _refuse_names(function.__qualname__.removesuffix(".__init__"), kwargs.keys() - names, names)
        return function(*args, **kwargs)

    return call


def _refuse_names(function: str, unknown: set[str], names: frozenset[str]) -> None:
    name = min(unknown)
    close = [_ELSEWHERE.get(name, ""), *(n for n in sorted(names) if len(name) > 3 and (name in n or n in name))]
    close += difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.85)
    hint = next((f"; do you mean {c!r}?" for c in close if c in names), "")
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def warn_once(kind: str, text: str) -> None:
    """A warning, the first time in this process that there is one of this `kind`; none while torch.compile traces."""
    if kind in _warned or torch.compiler.is_compiling():
        return
    _warned.add(kind)
    frame, level = sys._getframe(), 1  # of the user's line: beyond this package, and torch, which calls modules
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (__package__, "torch"):
        frame, level = frame.f_back, level + 1
    silent = f"warnings.filterwarnings('ignore', message='selfreg_fast: .*{kind}')"
    warnings.warn(f"selfreg_fast: {text} (said once; to silence it: {silent})", stacklevel=level)


def is_real(t: Tensor) -> bool:
    """Whether `t` has values to look at.

    Not so while torch.compile traces, on the device meta, in a fake tensor, and under a dispatch mode, which is what
    traces (make_fx), fakes (FakeTensorMode) or counts (MemTracker).
    """
    if torch.compiler.is_compiling() or t.device.type == "meta":
        return False
    return _get_current_dispatch_mode() is None and not hasattr(t, "fake_mode")


def has_values(t: Tensor) -> bool:
    """Whether looking at the values of `t` makes sense and waits for no GPU."""
    return t.device.type == "cpu" and is_real(t)


def shape_of(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


# ---------------------------------------------------------------------------------------------------------- numbers


def number(x: float, name: str) -> float:
    """A finite number of any type that has a float: of Python, of NumPy, a Fraction."""
    value = _as_float(x, name)
    if not -math.inf < value < math.inf:  # NaN, too; torch.compile has no isfinite of a number
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return value


def _as_float(x: float, name: str) -> float:
    if type(x) is float:  # before the slow questions
        return x
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that float64 has, got one larger than 1e308") from None


def is_integer(x: object) -> bool:
    return isinstance(x, (Integral, torch.SymInt)) and not isinstance(x, bool)


def is_sequence(x: object) -> bool:
    """A list, tuple, or what is one by another name (a range, OmegaConf's ListConfig); not a text."""
    return isinstance(x, (list, tuple)) or (isinstance(x, Sequence) and not isinstance(x, str))


def checked_ignore_index(ignore_index: int) -> int:
    if type(ignore_index) is not int and not is_integer(ignore_index):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an integer that int64 has, got {ignore_index}")
    return int(ignore_index)


def check_options(
    *,
    temperature: float,
    target: str,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    **flags: bool,
) -> None:
    """What can be said of the options before there are exits. `flags`: those that are True or False."""
    tau = _as_float(temperature, "temperature")
    if not _TAU[0] <= tau <= _TAU[1]:
        raise ValueError(f"temperature: expected a number > 0, in [{_TAU[0]:g}, {_TAU[1]:g}], got {temperature}")
    _check_choice(target, "target", ("soft", "argmax"))
    _check_choice(reduction, "reduction", ("mean", "sum", "none"))
    if not 0 <= _as_float(label_smoothing, "label_smoothing") <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    checked_ignore_index(ignore_index)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def _check_choice(x: str, name: str, choices: tuple[str, ...]) -> None:
    if not isinstance(x, str) or x not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {x!r}")


def part_weight(x: float | None, name: str) -> float | None:
    """The weight of a part of the objective; None, where the part is left out."""
    return None if x is None else number(x, name)


def exit_weights_of(exit_weights: Sequence[float] | None, n: int | None) -> list[float]:
    """The weights of n exits, each 1 if not given; of any number of them for n = None."""
    if exit_weights is None:
        return [1.0] * (n or 0)
    if not is_sequence(exit_weights):
        raise TypeError(f"exit_weights: expected {n or 'a list of'} numbers, got {type(exit_weights).__name__}")
    if n is not None and len(exit_weights) != n:
        raise ValueError(f"exit_weights: expected one for each of the {n} exits, got {len(exit_weights)}")
    return [number(w, f"exit_weights[{i}]") for i, w in enumerate(exit_weights)]


def check_size(size: Sequence[int] | None) -> None:
    if size is None:
        return
    if not is_sequence(size) or len(size) > 3 or not all(is_integer(d) and d > 0 for d in size):
        raise ValueError(f"size: expected positive integers (H, W), or (D, H, W) of volumes, got {size!r}")


def teachers_of(teachers: Sequence[int], n: int) -> tuple[int, ...]:
    """Distinct indices in [0, n)."""
    if not is_sequence(teachers) or not all(is_integer(t) for t in teachers):
        raise TypeError(f"teachers: expected a sequence of exit indices, got {teachers!r}")
    for t in teachers:
        if not -n <= t < n:
            raise ValueError(f"teachers: expected indices of the {n} exits, in [{-n}, {n}), got {t}")
    counted = tuple(int(t) % n for t in teachers)
    if len(set(counted)) != len(counted):
        raise ValueError(f"teachers: expected distinct exits, got {tuple(teachers)}")
    return counted


# ---------------------------------------------------------------------------------------------------------- tensors


def check_tensor(t: Tensor, name: str, floating: bool = False) -> None:
    if not isinstance(t, Tensor):
        hint = f"; pass torch.tensor({name})" if isinstance(t, (list, tuple)) or hasattr(t, "__array__") else ""
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}{hint}")
    if t.layout != torch.strided or t.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if t.is_nested else t.layout}")
    if floating and not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}; pass {name}.float()")


def check_device(t: Tensor, name: str, first: Tensor, whose: str = "the exits") -> None:
    if t.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} of {whose}, got {t.device}")


def count(exits: Sequence[Tensor], name: str, at_least: int = 1, instead: str = "") -> int:
    """The number of exits. `instead`: what to call where there are too few."""
    if not is_sequence(exits) or hasattr(exits, "logits"):  # the latter is what MultiExit returns
        of_network = isinstance(exits, (Tensor, dict)) or hasattr(exits, "logits")
        hint = "; a MultiExit in evaluation mode returns what its network does: model.all_exits has the exits"
        hint = f"{f'; pass [{name}]' if isinstance(exits, Tensor) else ''}{hint}" if of_network else ""
        hint = "; pass its .logits and .features" if hasattr(exits, "features") else hint
        raise TypeError(f"{name}: expected a list or tuple of tensors, got {type(exits).__name__}{hint}")
    if len(exits) < at_least:
        hint = f"; {instead}" if len(exits) == 1 and instead else ""
        raise ValueError(f"{name}: expected at least {at_least} exit{'s'[: at_least - 1]}, got {len(exits)}{hint}")
    return len(exits)


def check_exits(exits: Sequence[Tensor], name: str) -> None:
    """One dtype, device, B and C; one size where exits are not resized."""
    for i, z in enumerate(exits):
        check_tensor(z, f"{name}[{i}]")
    first = exits[0]
    if first.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}[0]: expected float32, float16, bfloat16 or float64, got {first.dtype}")
    if not 2 <= first.dim() <= 5:
        raise ValueError(f"{name}[0]: expected 2 to 5 dimensions (B, C, ...), got shape {shape_of(first)}")
    if first.shape[1] < 1:
        raise ValueError(f"{name}[0]: expected at least one channel, got shape {shape_of(first)}")
    for i, z in enumerate(exits[1:], 1):
        if z.dtype != first.dtype:
            raise TypeError(f"{name}[{i}]: expected dtype {first.dtype} of {name}[0], got {z.dtype}")
        check_device(z, f"{name}[{i}]", first)
        if z.dim() != first.dim() or z.shape[:2] != first.shape[:2]:
            want = ", ".join(str(d) for d in first.shape[:2]) + ", *" * (first.dim() - 2)
            hint = ""
            if z.dim() == first.dim() and z.shape[0] == first.shape[0] and name == "features":
                hint = "; features of different channels need a projection to common ones, as MultiExit's are"
            raise ValueError(f"{name}[{i}]: expected shape ({want}) like {name}[0], got {shape_of(z)}{hint}")
        if first.dim() not in _RESIZED and z.shape != first.shape:
            raise ValueError(
                f"{name}[{i}]: expected shape {shape_of(first)} of {name}[0] (only exits of 4 or 5 dimensions are "
                f"resized), got {shape_of(z)}"
            )


def check_same_images(features: Tensor, logits: Tensor) -> None:
    """features[0] has batch and rank of the logits; also their sizes, where these are not resized."""
    check_device(features, "features[0]", logits)
    fixed = 1 if logits.dim() in _RESIZED else logits.dim()
    shape, want = ((t.shape[0], "*", *t.shape[2:fixed], *"*" * (t.dim() - fixed - 1)) for t in (features, logits))
    if shape != want:
        raise ValueError(
            f"features[0]: expected shape ({', '.join(map(str, want))}) like the logits, got {shape_of(features)}"
        )


def check_labels(labels: Tensor, first: Tensor | None = None) -> None:
    """A tensor of integers, and of the exits' dimensions without the channels where exits are resized to it."""
    check_tensor(labels, "labels")
    one_hot = first is not None and labels.dim() == first.dim() and labels.shape[1] == first.shape[1] > 1
    if labels.dtype not in LABEL_DTYPES and not one_hot:
        to = "long()" if labels.is_floating_point() else "to(torch.uint8)" if labels.dtype == torch.bool else "int()"
        raise TypeError(f"labels: expected dtype uint8, int32 or int64, got {labels.dtype}; pass labels.{to}")
    if labels.dim() < 1:
        raise ValueError("labels: expected shape (B, ...), got a scalar")
    if first is not None and first.dim() in _RESIZED and labels.dim() != first.dim() - 1:
        hint = "; pass labels.argmax(1)" if one_hot else ""
        if labels.dim() == first.dim() and labels.shape[1] == 1:
            hint = "; pass labels.squeeze(1)"
        want = "(B, H, W)" if first.dim() == 4 else "(B, D, H, W)"
        raise ValueError(f"labels: expected shape {want}, got {shape_of(labels)}{hint}")


def check_label_values(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """ValueError with value and position of the first label that is neither a class nor ignored."""
    labels = labels.long()  # a uint8 tensor compared with 300 is compared with 44
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        label = labels[position].item()
        raise ValueError(
            f"labels: expected classes in [0, {num_classes}) or ignore_index={ignore_index}, got {label} at {position}"
            f"; if {label} is void, pass ignore_index={label}"
        )


def check_map(m: Tensor, name: str, first: Tensor, spatial: tuple[int, ...]) -> None:
    check_device(m, name, first)
    want = (first.shape[0], *spatial)
    if m.shape != want:
        hint = f"; pass {name}.squeeze(1)" if m.dim() == first.dim() and m.shape[1] == 1 else ""
        raise ValueError(f"{name}: expected shape {want}, got {shape_of(m)}{hint}")


def check_class_weight(class_weight: Tensor, first: Tensor | None = None) -> None:
    """(C,) floating, for the exits like `first`."""
    check_tensor(class_weight, "class_weight", floating=True)
    if class_weight.dim() != 1 or (first is not None and class_weight.shape[0] != first.shape[1]):
        want = "(C,)" if first is None else (first.shape[1],)
        raise ValueError(f"class_weight: expected shape {want}, got {shape_of(class_weight)}")
    if first is not None:
        check_device(class_weight, "class_weight", first)


def check_image_logits(image_logits: Sequence[Tensor], at_least: int = 1) -> None:
    count(image_logits, "image_logits", at_least)
    for i, z in enumerate(image_logits):
        check_tensor(z, f"image_logits[{i}]", floating=True)
        check_device(z, f"image_logits[{i}]", image_logits[0], "image_logits[0]")
        if z.dim() != 2 or z.shape != image_logits[0].shape:
            raise ValueError(f"image_logits[{i}]: expected one shape (B, K) for all exits, got {shape_of(z)}")


def check_image_logits_of(image_logits: Sequence[Tensor], logits: Sequence[Tensor]) -> None:
    """One for each exit, of its images and classes."""
    check_image_logits(image_logits)
    first, of_exit = image_logits[0], logits[0]
    if len(image_logits) != len(logits):
        raise ValueError(f"image_logits: expected one for each of the {len(logits)} exits, got {len(image_logits)}")
    check_device(first, "image_logits[0]", of_exit)
    if first.shape[0] != of_exit.shape[0]:
        raise ValueError(f"image_logits[0]: expected {of_exit.shape[0]} images, got {shape_of(first)}")
    if first.shape[1] != of_exit.shape[1]:
        raise ValueError(
            f"image_logits[0]: expected the {of_exit.shape[1]} classes of the logits, got {shape_of(first)}"
        )


# ------------------------------------------------------------------------------------------------------------ sizes


def output_size(
    exits: Sequence[Tensor], labels: Tensor | None, size: Sequence[int] | None, name: str
) -> tuple[int, ...]:
    """The spatial shape at which the losses are computed, to which every exit can be resized."""
    first = exits[0]
    check_size(size)
    if size is not None:
        if len(size) != first.dim() - 2:
            raise ValueError(
                f"size: expected {first.dim() - 2} numbers for {name} of shape {shape_of(first)}, got {size!r}"
            )
        if first.dim() not in _RESIZED and tuple(size) != first.shape[2:]:
            raise ValueError(
                f"size: expected {shape_of(first)[2:]} of {name} (only exits of 4 or 5 dimensions are resized), "
                f"got {size!r}"
            )
        spatial = tuple(size) if any(isinstance(d, torch.SymInt) for d in size) else tuple(int(d) for d in size)
    elif first.dim() not in _RESIZED:
        return shape_of(first)[2:]
    else:
        spatial = shape_of(largest(exits) if labels is None else labels)[(1 if labels is not None else 2) :]
    for i, z in enumerate(exits):
        if z.shape[2:] != spatial:
            if 0 in spatial or 0 in z.shape[2:]:
                raise ValueError(
                    f"{name}[{i}]: cannot be resized from {shape_of(z)[2:]} to {spatial}: one has no pixels"
                )
            _warn_of_swapped_axes(z, f"{name}[{i}]", spatial)
    return spatial


def largest(exits: Sequence[Tensor]) -> Tensor:
    """The first of the exits (B, C, ...) that have most pixels."""
    found = exits[0]
    for z in exits:
        found = z if math.prod(z.shape[2:]) > math.prod(found.shape[2:]) else found
    return found


def _warn_of_swapped_axes(z: Tensor, name: str, spatial: tuple[int, ...]) -> None:
    """Resizing makes any map fit any labels, (B, H, W, C) as well as (B, W, H), and would hide the mistake."""
    if len(spatial) != 2 or torch.compiler.is_compiling() or min(*spatial, *z.shape[2:]) < 8:
        return
    a, b = z.shape[2] * spatial[1], z.shape[3] * spatial[0]
    if 2 * max(a, b) >= 3 * min(a, b):
        warn_once(
            "aspect ratio",
            f"{name} of shape {shape_of(z)} is resized to {spatial}, another aspect ratio: are axes swapped? Exits are "
            "(B, C, H, W), labels (B, H, W)",
        )


def warn_of_one_class(first: Tensor) -> None:
    """The softmax over one channel is 1 whatever the logit, as a binary network with a sigmoid has it."""
    if first.shape[1] == 1:
        warn_once(
            "one channel",
            "logits of one channel have a label loss of 0 always, their softmax being 1; give a binary network's logit "
            "z two channels: torch.cat([torch.zeros_like(z), z], 1)",
        )
