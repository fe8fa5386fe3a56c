"""Exits for a network: the published head, and `MultiExit`, which adds exits to a network that has none.

`MultiExit` listens to the stages with forward hooks instead of rewriting the network with torch.fx: a hook works in
every network, be its control flow as it may, leaves the network's modules, parameters and checkpoints as they are, and
is inlined by torch.compile. Its hooks only note what a stage returns; heads run after the network, outside whatever it
wraps its stages in (gradient checkpointing, FSDP).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checks import named

__all__ = ["ExitHead", "MultiExit", "MultiExitOutput", "tokens_to_map"]


class ExitHead(nn.Sequential):
    """The published exit: two 3x3 conv-BatchNorm-ReLU and a 1x1 conv to class logits.

    Called with features (B, in_channels, H, W), it returns logits (B, num_classes, H, W).

    Args:
        in_channels: channels of the stage's features (B, in_channels, H, W).
        num_classes: channels of the logits (B, num_classes, H, W).
        hidden_channels: channels in between; default 256, the published code's.

    Source: the published code of Zhang et al., ICCV 2021.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden_channels: int = 256) -> None:
        super().__init__(
            *_conv_bn_relu(in_channels, hidden_channels),
            *_conv_bn_relu(hidden_channels, hidden_channels),
            nn.Conv2d(hidden_channels, num_classes, 1),
        )


class MultiExitOutput(NamedTuple):
    """What `MultiExit` returns in training: the arguments of `SelfRegulationLoss`.

    Attributes:
        logits: the exits (B, num_classes, h, w), shallow to deep, of one dtype.
        features: the stages' maps (B, feature_channels, h, w), shallow to deep: those SR-F compares.
        image_logits: one (B, num_classes) for each exit; None without `image_level=True`.
        output: what the network itself returned, whatever it is.
    """

    logits: list[Tensor]
    features: list[Tensor]
    image_logits: list[Tensor] | None
    output: Any


class MultiExit(nn.Module):
    r"""A network with exits at its stages, so that Self-Regulation can train it:

        model = srf.MultiExit(net, stages=("layer1", "layer2", "layer3"), num_classes=19,
                              example=torch.zeros(1, 3, 64, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # not net.parameters(): the exits have their own
        criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1)
        criterion(model(images), labels).total.backward()

    (`criterion(out, labels)` takes out.logits, out.features and out.image_logits, which other losses want one by one.)

    An exit is a 1x1 conv to `feature_channels`, whose result is the exit's feature map, and a head on that map. The
    default is lean; the published exit, at strides 4 and 8, costs more than a small network does: for that one,
    `feature_channels=256, head=srf.ExitHead`. (The heads stand on the projections, not beside them, so that the
    projections learn to be useful even where they teach, and have a gradient in every step, SR-F or not: in training
    DDP finds no exit unused.)

    In evaluation mode the model is the network: same output, no exit computed; `all_exits` computes them there,
    too. `unwrap` removes all traces. `state_dict` has the network's keys after "network."; `load_state_dict`
    takes them without it, too, so that checkpoints of the network alone can be loaded (`strict=False`: its exits are
    missing).

    Args:
        network: any module. It is used as it is, not copied.
        stages: names of the modules (as in `network.named_modules()`) that get an exit, in the order in which the
            network calls them: shallow to deep. Each must be called exactly once in a forward pass.
        num_classes: channels of the logits.
        example: an input of the network, a tensor or a tuple or dict of arguments, for one forward pass in evaluation
            mode that finds the stages' channels. It is moved to the network's device and dtype; values are irrelevant.
        feature_channels: channels of `features`; None: no projection, features are the stages' own maps, which SR-F can
            compare only if they have the same number of channels.
        head: called as `head(in_channels, num_classes)` for each exit, returns a module that turns (B, in_channels, h,
            w) into logits; default `ExitHead` with as many channels in between, at most 256.
        as_map: called as `as_map(output, size)` with what a stage returned and the (H, W) of the network's input (its
            first 4-d tensor, else None); returns the stage's map (B, C, h, w). Default: the one 4-d tensor in it, be it
            a tensor, tuple, list, dict or dataclass. For tokens (B, L, C): `tokens_to_map`.
        as_logits: called with what the network returned, in training and in evaluation mode, where it may be something
            else; returns its logits (B, num_classes, h, w), the deepest exit. Default: the tensor itself, its "logits",
            "out" or "main" (item or attribute), else the one 4-d tensor in it, else the first of a tuple or list that
            has `num_classes` channels: for a network that returns (auxiliary, main) in training, pass another.
        own_output: False: the network returns no logits (a backbone), the last stage is the deepest exit. What the
            network has after that stage gets no gradient.
        image_level: True: also image-level predictions, as the published code makes them: a linear layer on each
            exit's logits averaged over the image.

    Raises:
        TypeError, ValueError: no such module (similar names are given), a stage that is not called, called twice or out
            of order, or whose output is changed in place later; outputs in which there is no map, or no logits of
            `num_classes` channels (also from a forward pass in training); a network with a MultiExit in it.

    With several processes, wrap the model (not the network), in training call the wrapper, and give the loss its
    `process_group`. DDP wants a gradient for every parameter in every step: where there is none, freeze it with
    `requires_grad_(False)` or pass `find_unused_parameters=True`. That is so for what a network has after its last
    stage (`own_output=False`), for the image-level layers if the loss does not get `image_logits`, and for all exits if
    the model is trained in evaluation mode.

    A second forward pass of the model while one is running (nn.DataParallel; DDP is fine) and reentrant checkpoints
    around a stage (`use_reentrant=False` is fine) are errors that say so.
    """

    @named
    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[str],
        num_classes: int,
        example: Tensor | tuple[Any, ...] | dict[str, Any],
        *,
        feature_channels: int | None = 64,
        head: Callable[[int, int], nn.Module] | None = None,
        as_map: Callable[[Any, tuple[int, int] | None], Tensor] | None = None,
        as_logits: Callable[[Any], Tensor] | None = None,
        own_output: bool = True,
        image_level: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: expected a torch.nn.Module, got {type(network).__name__}")
        if any(isinstance(m, MultiExit) for m in network.modules()):
            raise ValueError(
                "network: expected one without exits, got a MultiExit or one with it inside; name all stages in one "
                "MultiExit, or take the network out with unwrap()"
            )
        self.network = network
        self.num_classes = num_classes
        self.stages = _check_stages(network, stages)
        self.as_map = _only_map if as_map is None else as_map
        self.as_logits = functools.partial(_find_logits, num_classes) if as_logits is None else as_logits
        self.own_output = own_output
        self._captured = _Captured()
        self._hooks = [_hook(network, name, functools.partial(self._captured.note, name)) for name in self.stages]
        try:
            maps = self._dry_run(example)
        except BaseException:
            self.unwrap()
            raise
        self.exits = nn.ModuleList(_Exit(m, feature_channels, num_classes, head or _lean_head) for m in maps)
        self.image_level: nn.ModuleList | None = None
        if image_level:
            linears = (nn.Linear(num_classes, num_classes) for _ in range(len(maps) + own_output))
            self.image_level = nn.ModuleList(linears).to(maps[-1])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In training `all_exits`; in evaluation mode what the network returns, or for `own_output=False` the last
        exit's logits, of which alone the head is computed. The arguments are the network's."""
        if self.training:
            return self.all_exits(*args, **kwargs)
        if self.own_output:
            return self.network(*args, **kwargs)
        maps, _ = self._stage_maps(args, kwargs)
        return self.exits[-1](maps[-1])[1]

    def all_exits(self, *args: Any, **kwargs: Any) -> MultiExitOutput:
        """The network's forward pass and all exits, in either mode: in evaluation mode, to validate each exit."""
        maps, output = self._stage_maps(args, kwargs)
        features, logits = [], []
        for stage_exit, stage_map in zip(self.exits, maps, strict=True):
            feature, exit_logits = stage_exit(stage_map)
            features.append(feature)
            logits.append(exit_logits)
        if self.own_output:
            logits.append(self._network_logits(output, "training" if self.training else "evaluation"))
        dtype = functools.reduce(torch.promote_types, (z.dtype for z in logits))  # networks that end in .float()
        logits = [z.to(dtype) for z in logits]
        image_logits = None
        if self.image_level is not None:
            image_logits = [layer(z.mean((2, 3))) for layer, z in zip(self.image_level, logits, strict=True)]
        return MultiExitOutput(logits, features, image_logits, output)

    def unwrap(self) -> nn.Module:
        """Takes the hooks off and returns the network as it was given; its exits are gone for good."""
        for hook in self._hooks:
            hook.remove()
        return self.network

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the network's keys as the network alone saves them, too."""
        own = self.state_dict().keys()
        for key in self.network.state_dict():
            if prefix + key in state_dict and key not in own:
                state_dict.setdefault(f"{prefix}network.{key}", state_dict.pop(prefix + key))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"stages={self.stages!r}"

    def _stage_maps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
        """The stages' maps (B, C, h, w) and the network's output."""
        outputs, output = self._captured.run(self.network, args, kwargs)
        size = _image_size(args, kwargs)
        maps = []
        for name in self.stages:
            if name not in outputs:
                raise ValueError(
                    f"stages: {name!r} was not called in the forward pass (a container like ModuleList never is: name "
                    "a module in it), or was replaced since"
                )
            stage_map = self.as_map(outputs[name], size)
            if not _is_map(stage_map):
                raise ValueError(
                    f"stages: expected one map (B, C, h, w) from {name!r}, got {_describe(outputs[name])}; pass as_map="
                    " to turn it into one (selfreg_fast.exits.tokens_to_map for tokens (B, L, C))"
                )
            maps.append(stage_map)
        return maps, output

    def _network_logits(self, output: Any, mode: str) -> Tensor:
        """The logits (B, num_classes, h, w) in what the network returned in this mode."""
        logits = self.as_logits(output)
        if not _is_map(logits) or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"network: expected logits (B, {self.num_classes}, h, w) in its output in {mode} mode, got "
                f"{_describe(output)}; pass as_logits= to find them, or own_output=False for a network without"
            )
        return logits

    def _dry_run(self, example: Any) -> list[Tensor]:
        """The stages' maps for `example`; all that one pass can tell is checked here."""
        args, kwargs = _arguments(example, self.network)
        noted: list[tuple[str, Tensor, int]] = []  # with the versions in-place operations count up

        def note(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            noted.extend((name, t, t._version) for t in _tensors(output))

        hooks = [_hook(self.network, name, functools.partial(note, name)) for name in self.stages]
        try:
            with _evaluating(self.network), torch.no_grad():
                maps, output = self._stage_maps(args, kwargs)
        except (RuntimeError, TypeError) as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            raise ValueError(f"example: the network fails for an input of shape {shapes or '?'}: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        order = tuple(dict.fromkeys(name for name, _, _ in noted))
        if order != self.stages:
            raise ValueError(f"stages: expected the order in which they are called, {order!r}, got {self.stages!r}")
        for name, t, version in noted:
            if t._version != version:
                raise ValueError(
                    f"stages: the output of {name!r} is changed in place later (by a ReLU(inplace=True), say); name "
                    "the module that does it, or the one around both"
                )
        size = _image_size(args, kwargs)
        for name, m in zip(self.stages, maps, strict=True):
            if size is not None and not _aligned(m.shape[2:], size) and _aligned(m.shape[1:3], size):
                raise ValueError(
                    f"stages: expected a map (B, C, h, w) from {name!r}, got {tuple(m.shape)}, which looks like (B, h, "
                    "w, C); pass as_map=lambda output, size: output.permute(0, 3, 1, 2)"
                )
        if self.own_output:
            self._network_logits(output, "evaluation")
        return maps


def _lean_head(in_channels: int, num_classes: int) -> nn.Module:
    return ExitHead(in_channels, num_classes, hidden_channels=min(in_channels, 256))


class _Exit(nn.Module):
    """A stage's map to (features, logits)."""

    def __init__(
        self, stage_map: Tensor, feature_channels: int | None, num_classes: int, head: Callable[[int, int], nn.Module]
    ) -> None:
        super().__init__()
        channels = stage_map.shape[1]
        self.projection = nn.Identity() if feature_channels is None else nn.Conv2d(channels, feature_channels, 1)
        self.head = head(feature_channels or channels, num_classes)
        self.to(stage_map)

    def forward(self, stage_map: Tensor) -> tuple[Tensor, Tensor]:
        features = self.projection(stage_map)
        return features, self.head(features)


class _Captured:
    """What the stages return in one forward pass; empty between passes, so that no tensor outlives its step."""

    def __init__(self) -> None:
        self.outputs: dict[str, Any] | None = None
        self.with_grad = False

    def run(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The stages' outputs by name, and the network's."""
        if self.outputs is not None:
            raise RuntimeError(
                "MultiExit: a forward pass began while another of the same model was running; use one model a thread, "
                "and DistributedDataParallel instead of DataParallel"
            )
        outputs: dict[str, Any] = {}
        self.outputs, self.with_grad = outputs, torch.is_grad_enabled()
        try:
            return outputs, network(*args, **kwargs)
        finally:
            self.outputs = None

    def note(self, name: str, module: nn.Module, _args: Any, output: Any) -> None:
        """The forward hook of the stage `name`."""
        if self.outputs is None:  # the network on its own, or checkpointing that recomputes in the backward
            return
        if name in self.outputs:
            raise ValueError(
                f"stages: {name!r} was called twice in one forward pass; name a module that is called once, for "
                "example the one around it"
            )
        if self.with_grad and not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise RuntimeError(
                f"stages: {name!r} ran without gradients, so that its exit could not train it: pass "
                "use_reentrant=False to checkpoint(), or freeze its parameters with requires_grad_(False)"
            )
        self.outputs[name] = output


def tokens_to_map(output: Any, size: tuple[int, int] | None) -> Tensor:
    """For `as_map`: the tokens (B, L, C) of a transformer's stage as a map (B, C, h, w).

    Args:
        output: what the stage returned: tokens, or a tuple, list, dict or dataclass with one such tensor in it. Class
            tokens must be gone: `lambda output, size: tokens_to_map(output[:, 1:], size)`.
        size: (H, W) of the image; h and w are H and W over one stride, both rounded up or both down, with h * w = L.

    Raises:
        ValueError: no (or several) tensors of three dimensions, or no (or several) such h and w.
    """
    tokens = [t for t in _tensors(output) if t.dim() == 3]
    if len(tokens) != 1 or size is None:
        raise ValueError(
            f"tokens_to_map: expected one tensor (B, L, C) of a network of images, got {_describe(output)}"
        )
    (batch, length, channels), (height, width) = tokens[0].shape, size
    fits = {
        shape
        for stride in range(1, max(size) + 1)
        for shape in ((-(-height // stride), -(-width // stride)), (height // stride, width // stride))
        if shape[0] * shape[1] == length
    }
    if len(fits) != 1:
        raise ValueError(
            f"tokens_to_map: expected one stride of the image {size} that makes {length} tokens, found for (h, w): "
            f"{sorted(fits) or 'none'}; are there class tokens?"
        )
    return tokens[0].transpose(1, 2).reshape(batch, channels, *fits.pop())


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _hook(network: nn.Module, name: str, hook: Callable[..., None]) -> RemovableHandle:
    return network.get_submodule(name).register_forward_hook(hook)


def _check_stages(network: nn.Module, stages: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stages, (str, nn.Module)) or not all(isinstance(name, str) for name in stages):
        hint = f"; pass [{stages!r}]" if isinstance(stages, str) else ", as in network.named_modules()"
        raise TypeError(f"stages: expected a list of names of modules, got {_kind(stages)}{hint}")
    if not stages or len(set(stages)) != len(stages):
        raise ValueError(f"stages: expected one or more distinct module names, got {stages!r}")
    known = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    for name in stages:
        if name not in known:
            inside = [k for k in known if k.endswith("." + name)]  # of a network wrapped by DDP or torch.compile
            beside = [k for k in known if k.count(".") == name.count(".")]
            near = [k for names in (beside, known) for k in difflib.get_close_matches(name, names, n=3)]
            close = list(dict.fromkeys(inside + near))[:3]
            close = close or [k for k in known if "." not in k]
            raise ValueError(
                f"stages: the network has no module {name!r}; do you mean {', '.join(map(repr, close)) or 'another'}?"
            )
    return tuple(stages)


def _kind(stages: Any) -> str:
    """What was given for the stages, in a few words: the text of a module has many lines."""
    if isinstance(stages, (str, nn.Module)):
        return repr(stages) if isinstance(stages, str) else f"the module {type(stages).__name__}"
    return f"a {type(stages).__name__} of " + ", ".join(sorted({type(name).__name__ for name in stages}))


def _arguments(example: Any, network: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments in `example`, where the network's parameters are and in their dtype."""
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    args = (args,) if isinstance(args, Tensor) else args
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"example: expected a tensor, or a tuple or dict of arguments, got {type(example).__name__}")
    like = next((p for p in network.parameters() if p.is_floating_point()), None)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or like is None:
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    return tuple(moved(a) for a in args), {k: moved(a) for k, a in kwargs.items()}


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in its own mode again (frozen BatchNorm stays frozen)."""
    training = [m for m in network.modules() if m.training]
    network.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _image_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    return next(((t.shape[2], t.shape[3]) for t in (*args, *kwargs.values()) if _is_map(t)), None)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _aligned(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether both sides of `shape` are those of the image `size` over one stride, to a pixel."""
    return abs(shape[0] * size[1] - shape[1] * size[0]) <= size[0] + size[1]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in a module's output: a tensor, tuple, list, dict or dataclass."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, (tuple, list)):
        values = list(output)
    else:
        values = [getattr(output, f.name, None) for f in fields(output)] if is_dataclass(output) else []
    return [v for v in values if isinstance(v, Tensor)]


def _only_map(output: Any, _size: tuple[int, int] | None = None) -> Any:
    """The one 4-d tensor in `output`; else `output`, for the caller to refuse."""
    maps = [t for t in _tensors(output) if t.dim() == 4]
    return maps[0] if len(maps) == 1 else output


def _find_logits(num_classes: int, output: Any) -> Any:
    """The logits in a network's `output`, as `as_logits` says; else `output`, for the caller to refuse."""
    items = output.get if isinstance(output, Mapping) else functools.partial(getattr, output)
    named_so = [items(name, None) for name in ("logits", "out", "main")]
    if tensors := [t for t in named_so if isinstance(t, Tensor)]:
        return next((t for t in tensors if _is_map(t) and t.shape[1] == num_classes), tensors[0])
    only = _only_map(output)
    if only is output and isinstance(output, (tuple, list)):
        return next((t for t in _tensors(output) if _is_map(t) and t.shape[1] == num_classes), output)
    return only


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    return f"{type(output).__name__} of {[tuple(t.shape) for t in _tensors(output)]}"
