"""MultiExit: exits on any network's stages by name, and a network that is otherwise left as it was."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support import assert_close, make_labels
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import selfreg_fast as srf
from selfreg_fast.exits import tokens_to_map

STAGES = ("stages.0", "stages.1", "stages.2")
WIDTHS = (6, 8, 10)
EXAMPLE = torch.zeros(1, 3, 32, 32)
LABELS = make_labels((2, 32, 48), 5)


@dataclass
class Output:
    logits: Tensor
    size: int = 0


@dataclass(slots=True)
class Slots:
    prediction: Tensor
    size: int = 0


class Pair(NamedTuple):
    last: Tensor
    pooled: Tensor


class Stage(nn.Sequential):
    """A strided conv-BN-ReLU, its result in whatever `wrap` puts it."""

    wrap: Callable[[Tensor], Any] = staticmethod(lambda x: x)
    unwrap: Callable[[Any], Tensor] = staticmethod(lambda x: x)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(inputs, outputs, 3, 2, 1), norm=nn.BatchNorm2d(outputs), relu=nn.ReLU(inplace=True)
            )
        )

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


class Network(nn.Module):
    """Three stages and a classifier of 5 classes; `run(stage, x)` calls a stage, `wrap` makes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(a, b) for a, b in zip((3, *WIDTHS), WIDTHS, strict=False))
        self.idle = nn.Identity()
        self.classifier = nn.Conv2d(WIDTHS[-1], 5, 1)
        self.run: Callable[[nn.Module, Tensor], Any] = _call
        self.wrap: Callable[[Tensor], Any] = _same

    def forward(self, images: Tensor, scale: float = 1.0) -> Any:
        x = images * scale
        for stage in self.stages:
            x = stage.unwrap(self.run(stage, x))
        return self.wrap(self.classifier(x))


def _call(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def _same(x: Tensor) -> Tensor:
    return x


def _small_head(in_channels: int, num_classes: int) -> nn.Module:
    return srf.ExitHead(in_channels, num_classes, hidden_channels=8)


def _network(**attributes: Any) -> Network:
    torch.manual_seed(0)
    network = Network()
    for name, value in attributes.items():
        setattr(network, name, value)
    return network


def _model(network: nn.Module | None = None, stages: Any = STAGES, example: Any = EXAMPLE, **options: Any) -> Any:
    network = _network() if network is None else network
    options = {"feature_channels": 7, "head": _small_head, **options}
    return srf.MultiExit(network, stages, options.pop("num_classes", 5), example, **options)


def _images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def _loss(out: srf.MultiExitOutput) -> Tensor:
    criterion = srf.SelfRegulationLoss(temperature=2.0)
    return criterion(out.logits, LABELS, features=out.features, image_logits=out.image_logits).total


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------ what it gives


def test_the_exits_of_a_network() -> None:
    """Logits shallow to deep, the network's own last; features of common channels; each parameter learns."""
    model, images = _model(), _images()
    out = model(images)
    assert [tuple(z.shape) for z in out.logits] == [(2, 5, 16, 24), (2, 5, 8, 12), (2, 5, 4, 6), (2, 5, 4, 6)]
    assert [tuple(f.shape) for f in out.features] == [(2, 7, 16, 24), (2, 7, 8, 12), (2, 7, 4, 6)]
    assert out.logits[-1] is out.output and out.image_logits is None
    x = images
    with torch.no_grad():
        for stage, stage_exit, f, z in zip(model.network.stages, model.exits, out.features, out.logits, strict=False):
            x = stage(x)
            assert torch.equal(f, stage_exit.projection(x)) and torch.equal(z, stage_exit.head(f))
    _loss(out).backward()
    assert _gradients(model).keys() == dict(model.named_parameters()).keys()


def test_in_evaluation_mode_it_is_the_network() -> None:
    """Same output object, no exit runs; all_exits() gives them there, too; the network's arguments pass through."""
    network = _network(wrap=lambda z: {"out": z})
    model, images = _model(network).eval(), _images()
    runs: list[int] = []
    for i, stage_exit in enumerate(model.exits):
        stage_exit.register_forward_hook(lambda *_, i=i: runs.append(i))
    assert torch.equal(model(images, scale=0.5)["out"], network(images, 0.5)["out"]) and not runs
    out = model.all_exits(images, scale=0.5)
    assert runs == [0, 1, 2] and torch.equal(out.logits[-1], network(images, 0.5)["out"])
    assert model.unwrap() is network and not any(m._forward_hooks for m in network.modules())


def test_a_backbone_without_logits() -> None:
    """own_output=False: the last stage is the deepest exit, also in evaluation mode."""
    model = _model(_network(classifier=nn.Identity()), own_output=False)
    assert [z.shape[2] for z in model(_images()).logits] == [16, 8, 4]
    expected = model.eval().all_exits(_images()).logits[-1]
    for shallower in model.exits[:-1]:
        shallower.register_forward_hook(lambda *_: pytest.fail("evaluation needs the deepest exit alone"))
    assert torch.equal(model(_images()), expected)


def test_without_projections_and_with_any_head() -> None:
    """feature_channels=None: features are the stages' maps; a head is any function of two channel counts."""
    model = _model(feature_channels=None, head=lambda c, k: nn.Conv2d(c, k, 1))
    assert [f.shape[1] for f in model(_images()).features] == list(WIDTHS)
    assert [stage_exit.head.in_channels for stage_exit in model.exits] == list(WIDTHS)


def test_image_level_predictions_serve_the_published_variant() -> None:
    model = _model(image_level=True)
    out = model(_images())
    assert [tuple(z.shape) for z in out.image_logits] == [(2, 5)] * 4
    loss = srf.SelfRegulationLoss.published()(out.logits, LABELS, image_logits=out.image_logits)
    loss.total.backward()
    assert _gradients(model).keys() == dict(model.named_parameters()).keys()


def _as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


WRAPS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda x: (x, x.mean((2, 3))), lambda o: o[0]),
    "namedtuple": (lambda x: Pair(x, x.mean((2, 3))), lambda o: o.last),
    "list": (lambda x: [x], lambda o: o[0]),
    "dict": (lambda x: {"pooled": x.mean((2, 3)), "map": x}, lambda o: o["map"]),
    "dataclass": (Output, lambda o: o.logits),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_outputs_of_any_kind(kind: str) -> None:
    """The one map in what a stage returns, and the logits in what the network returns."""
    wrap, unwrap = WRAPS[kind]
    expected = _model()(_images())
    network = _network(wrap=wrap)
    for stage in network.stages:
        stage.wrap, stage.unwrap = wrap, unwrap
    out = _model(network)(_images())
    for a, e in zip(out.logits + out.features, expected.logits + expected.features, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("example", [EXAMPLE, (EXAMPLE, 2.0), {"images": EXAMPLE}, EXAMPLE.double()])
def test_examples_of_any_kind(example: Any) -> None:
    """A tensor or arguments, in the network's dtype by itself."""
    assert len(_model(example=example)(_images()).logits) == 4


def test_tokens_become_maps() -> None:
    """(B, L, C) with as_map=tokens_to_map, class tokens cut off by the caller."""
    expected = _model()(_images())
    network = _network()
    for i, stage in enumerate(network.stages):
        shape = (WIDTHS[i], -1, 48 // 2 ** (i + 1))

        def as_map(tokens: Tensor, shape: tuple[int, ...] = shape) -> Tensor:
            if tokens.shape[0] == 1:  # the square example
                shape = (shape[0], -1, shape[2] * 2 // 3)
            return tokens[:, 1:].transpose(1, 2).unflatten(2, shape[1:])

        stage.wrap = lambda x: torch.cat([torch.zeros(x.shape[0], 1, x.shape[1]), _as_tokens(x)], 1)
        stage.unwrap = as_map
    out = _model(network, as_map=lambda output, size: tokens_to_map(output[:, 1:], size))(_images())
    for a, e in zip(out.logits + out.features, expected.logits + expected.features, strict=True):
        assert_close(a, e, 1e-5)
    with pytest.raises(ValueError, match=r"stages: .*'stages.0', got a tensor \(1, 257, 6\).*tokens_to_map"):
        _model(network)


@pytest.mark.parametrize("size", [(64, 64), (33, 512), (65, 47), (30, 200)])
@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("up", [False, True])
def test_tokens_find_their_rows(size: tuple[int, int], stride: int, up: bool) -> None:
    """h and w from L and the image's size, for strides that do not divide it, rounded up or down."""
    h, w = ((d + stride - 1) // stride if up else d // stride for d in size)
    x = torch.randn(2, 3, h, w)
    assert torch.equal(tokens_to_map((_as_tokens(x), None), size), x)


@pytest.mark.parametrize(
    ("output", "size"),
    [(torch.zeros(1, 197, 3), (224, 224)), (torch.zeros(1, 196, 3), None), (torch.zeros(1, 3), (8, 8))],
    ids=["class token", "no image", "not tokens"],
)
def test_tokens_that_make_no_map_are_refused(output: Tensor, size: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match="tokens_to_map: expected"):
        tokens_to_map(output, size)


# ---------------------------------------------------------------------------------------------------------- refusals


def _channels_last(network: Network) -> Network:
    for stage in network.stages:
        stage.wrap, stage.unwrap = lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2)
    return network


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "misspelt": (lambda: _model(stages=("stage.0",)), ValueError, r"no module 'stage.0'; do you mean 'stages.\d'"),
    "without the wrapper's name": (
        lambda: _model(nn.Sequential(_network()), ("stages.0",)),
        ValueError,
        r"'stages.0'; do you mean '0.stages.0'",
    ),
    "nothing alike": (lambda: _model(stages=("xyz",)), ValueError, "do you mean 'stages', 'idle', 'classifier'"),
    "misspelt, deeper": (lambda: _model(stages=("stages.9",)), ValueError, r"do you mean ('stages.\d'(, )?)+\?"),
    "one name, no sequence": (
        lambda: _model(stages="stages.0"),
        TypeError,
        r"stages: expected a list of names of modules, got 'stages.0'; pass \['stages.0'\]",
    ),
    "modules, no names": (
        lambda: _model(stages=[nn.Identity()]),
        TypeError,
        r"stages: .*got a list of Identity, as in network.named_modules\(\)",
    ),
    "an example that does not fit": (
        lambda: _model(example=torch.zeros(1, 5, 32, 32)),
        ValueError,
        r"example: the network fails for an input of shape \(1, 5, 32, 32\): ",
    ),
    "none": (lambda: _model(stages=()), ValueError, "stages: expected one or more"),
    "twice the same": (lambda: _model(stages=("stages.0",) * 2), ValueError, "distinct"),
    "not called": (lambda: _model(stages=("idle",)), ValueError, "'idle' was not called"),
    "a container": (lambda: _model(stages=("stages",)), ValueError, "'stages' was not called.*ModuleList"),
    "called twice": (
        lambda: _model(_network(run=lambda stage, x: stage.relu(stage(x))), ("stages.1.relu",)),
        ValueError,
        "'stages.1.relu' was called twice",
    ),
    "deep first": (lambda: _model(stages=STAGES[::-1]), ValueError, r"order.*\('stages.0', 'stages.1', 'stages.2'\)"),
    "changed in place": (lambda: _model(stages=("stages.0.norm",)), ValueError, "'stages.0.norm' is changed in place"),
    "channels last": (lambda: _model(_channels_last(_network())), ValueError, r"\(1, 16, 16, 6\).*permute"),
    "several maps": (
        lambda: _model(nn.Sequential(_network(wrap=lambda z: (z, z)), nn.Identity()), ("1",)),
        ValueError,
        r"one map .*'1', got tuple of \[\(1, 5, 4, 4\), \(1, 5, 4, 4\)\]",
    ),
    "other classes": (lambda: _model(num_classes=4), ValueError, r"network: expected logits \(B, 4, h, w\)"),
    "no logits": (
        lambda: _model(_network(wrap=lambda z: z.mean((2, 3)))),
        ValueError,
        r"got a tensor \(1, 5\); pass as_logits=",
    ),
    "a MultiExit": (lambda: _model(_model()), ValueError, "network: expected one without exits, got a MultiExit"),
    "a MultiExit inside": (
        lambda: _model(nn.Sequential(_model()), ("0.network.stages.0",)),
        ValueError,
        r"network: .*MultiExit.*unwrap\(\)",
    ),
    "a name of another": (
        lambda: _model(classes=5),
        TypeError,
        r"MultiExit\(\) got .*'classes'; do you mean 'num_classes'",
    ),
    "logits under other names": (
        lambda: _model(_network(wrap=lambda z: {"a": z, "b": z}).train()),
        ValueError,
        r"network: .* in evaluation mode, got dict",
    ),
    "no module": (lambda: _model(len), TypeError, "network: expected a torch.nn.Module, got builtin"),
    "no example": (lambda: _model(example=3), TypeError, "example: expected a tensor.*got int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_at_once(case: str) -> None:
    """By name and with the remedy, when the model is made, which leaves no hooks behind."""
    make, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        make()


def test_a_refused_network_has_no_hooks() -> None:
    network = _network()
    with pytest.raises(ValueError, match="logits"):
        _model(network, num_classes=4)
    assert not any(m._forward_hooks for m in network.modules())


def test_a_stage_replaced_later_is_missed_by_name() -> None:
    model = _model()
    model.network.stages[1] = Stage(6, 8)
    with pytest.raises(ValueError, match="'stages.1' was not called.*replaced"):
        model(_images())


# ------------------------------------------------------------------------------------- what it leaves as it was


def test_making_a_model_changes_nothing() -> None:
    """Not the statistics of BatchNorm, nor which modules are frozen, nor the parameters' gradients."""
    network = _network()
    network.stages[1].eval()
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    _model(network)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values(), strict=True))
    assert [m.training for m in network.modules()] == modes and not _gradients(network)


def test_no_stage_output_outlives_its_step() -> None:
    """After the step, after evaluation, after a forward pass that failed, and after the network ran on its own."""
    model, alive = _model(), []
    model.network.stages[0].register_forward_hook(lambda _m, _a, output: alive.append(weakref.ref(output)))

    def fail(_z: Tensor) -> None:
        raise ArithmeticError

    _loss(model(_images())).backward()
    model.network(_images())
    model.network.wrap = fail
    with pytest.raises(ArithmeticError):
        model(_images())
    model.network.wrap = _same
    model.eval()(_images())
    assert len(alive) == 4 and not any(ref() is not None for ref in alive)
    assert len(model.train()(_images()).logits) == 4


def test_checkpoints_of_the_network_and_of_the_model() -> None:
    """The network's keys with or without "network."; a model inside another module; what is missing is named."""
    model, other = _model(), _model(_network())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    images = _images()
    expected = other.eval()(images)
    missing, unexpected = model.load_state_dict(other.network.state_dict(), strict=False)
    assert missing and all(key.startswith("exits.") for key in missing) and not unexpected
    assert torch.equal(model.eval()(images), expected)
    with pytest.raises(RuntimeError, match="Missing key.*exits.0.projection.weight"):
        model.load_state_dict(other.network.state_dict())
    nested = {f"0.{key}": value for key, value in other.network.state_dict().items()}
    outer = nn.Sequential(_model())
    assert not outer.load_state_dict(nested, strict=False).unexpected_keys
    assert torch.equal(outer.eval()(images), expected)
    again = _model()
    again.load_state_dict(other.state_dict())
    assert torch.equal(again.all_exits(images).features[0], other.train().all_exits(images).features[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stand_alone(copied: Callable[[nn.Module], nn.Module]) -> None:
    """A copy listens to its own stages: same loss, gradients in the copy only; it can be unwrapped."""
    model = _model()
    twin = copied(model)
    total = _loss(twin(_images()))
    assert torch.equal(total, _loss(model(_images())))
    total.backward()
    assert _gradients(twin).keys() == dict(twin.named_parameters()).keys() and not _gradients(model)
    assert not any(m._forward_hooks for m in twin.unwrap().modules())
    assert len(model(_images()).logits) == 4


# ------------------------------------------------------------------------------------------------- ways of training


def _checkpointed(module: nn.Module, x: Tensor) -> Any:
    return checkpoint(module, x, use_reentrant=False)


def _checkpointed_reentrant(module: nn.Module, x: Tensor) -> Any:
    return checkpoint(module, x.requires_grad_(), use_reentrant=True)


def test_checkpointed_stages() -> None:
    """Recomputing a stage in the backward changes neither loss nor gradients."""
    plain, model = _model(), _model(_network(run=_checkpointed))
    totals = [_loss(m(_images())) for m in (plain, model)]
    assert torch.equal(*totals)
    for total in totals:
        total.backward()
    expected = _gradients(plain)
    for name, g in _gradients(model).items():
        assert_close(g, expected.pop(name), 1e-5)
    assert not expected


def test_reentrant_checkpoints_are_refused() -> None:
    """They would cut the exits off the stages without a word; frozen stages may run without gradients."""
    model = _model(_network(run=_checkpointed_reentrant))
    with pytest.raises(RuntimeError, match="'stages.0' ran without gradients.*use_reentrant=False"):
        model(_images())
    model.network.stages.requires_grad_(False)
    assert len(model(_images()).logits) == 4


def test_one_model_does_not_run_twice_at_once() -> None:
    network = _network()
    model = _model(network)
    network.wrap = lambda z: model(z)
    with pytest.raises(RuntimeError, match="forward pass began while another"):
        model(_images())


TRAINING_OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a pair": lambda z: (z, z[:, :3]),
    "a list with another of its classes": lambda z: [z, z.detach()],
    "auxiliary first, of other classes": lambda z: (z[:, :3], z),
    "nested": lambda z: (z, [z, z]),
    "out and aux": lambda z: {"aux": z.detach(), "out": z},
    "main and aux": lambda z: {"aux": z.detach(), "main": z},
    "logits of the image, too": lambda z: {"logits": z.mean((2, 3)), "out": z},
    "a dataclass with slots": Slots,
    "logits and a loss": lambda z: {"loss": z.mean(), "logits": z, "hidden": z.detach()},
}


@pytest.mark.parametrize("kind", TRAINING_OUTPUTS)
def test_a_network_that_returns_more_in_training(kind: str) -> None:
    """(z, aux) in training and z in evaluation, and other common forms: its logits are the deepest exit."""
    network = _network()
    model = _model(network)
    expected = model.eval().all_exits(_images()).logits
    network.wrap = TRAINING_OUTPUTS[kind]
    given = model.all_exits(_images()).logits
    assert all(torch.equal(a, e) for a, e in zip(given, expected, strict=True))
    model.train()
    _loss(model(_images())).backward()
    assert _gradients(model)["network.classifier.weight"].any()


@pytest.mark.parametrize(
    "output", [lambda z: (z.mean(), "z"), lambda z: {"a": z, "b": z}, lambda z: z[:, :4], lambda z: None]
)
def test_an_output_without_logits_is_refused_in_training_too(output: Callable[[Tensor], Any]) -> None:
    network = _network()
    model = _model(network).train()
    network.wrap = output
    with pytest.raises(ValueError, match=r"network: expected logits \(B, 5, h, w\) .*training mode.*as_logits="):
        model(_images())


def test_a_criterion_takes_the_models_output() -> None:
    """criterion(out, labels) is criterion(out.logits, labels, features=..., image_logits=...)."""
    out = _model(image_level=True).train()(_images())
    plain, published = srf.SelfRegulationLoss(), srf.SelfRegulationLoss.published()
    predictions = {"image_logits": out.image_logits}
    for criterion, features in ((plain, out.features), (published, None)):  # argmax is of classes: not of features
        expected = criterion(out.logits, LABELS, features=features, **predictions)
        assert all(torch.equal(a, e) for a, e in zip(criterion(out, LABELS), expected, strict=True))
    others = [z[:, :2] for z in out.features]
    assert torch.equal(plain(out, LABELS, features=others).sr_f, srf.sr_f_loss(others, size=(32, 48)))
    one = _model(stages=STAGES[:1]).train()(_images())
    assert torch.equal(plain(one, LABELS).total, plain(one.logits, LABELS).total)


def test_the_exits_have_one_dtype() -> None:
    """Under autocast, and with a network that returns float32 in spite of it."""
    model = _model(_network(wrap=Tensor.float))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(_images())
        assert {z.dtype for z in out.logits} == {torch.float32} and out.features[0].dtype == torch.bfloat16
        assert _loss(out).isfinite()
    assert {z.dtype for z in _model(_network().bfloat16())(_images().bfloat16()).logits} == {torch.bfloat16}


def test_exits_are_made_where_the_network_is() -> None:
    model = _model(_network().to("meta"))
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    """No parameter is unused in any step, neither before nor after the SR terms are switched on."""
    model = _model()
    parallel = DistributedDataParallel(copy.deepcopy(model))
    criterion = srf.SelfRegulationLoss(temperature=2.0)
    for step in range(4):
        criterion.enable_sr(step >= 2)
        for m in (model, parallel):
            m.zero_grad()
            out = m(_images(step))
            criterion(out.logits, LABELS, features=out.features).total.backward()
    expected = _gradients(model)
    for name, g in _gradients(parallel.module).items():
        assert_close(g, expected.pop(name), 1e-6)
    assert not expected


@pytest.mark.parametrize("unused", ["a backbone's end", "image-level layers", "exits in evaluation mode"])
def test_parameters_that_ddp_finds_unused(process_group: None, unused: str) -> None:
    """What the docstring says of them: an error in the second step, and none once they are frozen."""
    options = {"own_output": unused != "a backbone's end", "image_level": unused == "image-level layers"}
    for freeze in (False, True):
        model = _model(**options)
        part = {"a backbone's end": model.network.classifier, "image-level layers": model.image_level}
        if freeze:
            part.get(unused, model.exits).requires_grad_(False)
        parallel = DistributedDataParallel(model.train(unused != "exits in evaluation mode"))

        def step() -> None:
            out = parallel(_images())  # noqa: B023
            (out.sum() if isinstance(out, Tensor) else _loss(out._replace(image_logits=None))).backward()

        step()
        with nullcontext() if freeze else pytest.raises(RuntimeError, match="parameters that were not used"):
            step()


@pytest.mark.parametrize("how", ["model", "model and loss", "network in place"])
def test_compiled(how: str) -> None:
    """fullgraph=True: model, model and loss, or the network alone; and evaluation mode between training steps."""
    torch._dynamo.reset()
    model, plain = _model(), _model()
    counter = CompileCounterWithBackend("aot_eager")
    if how == "model and loss":
        step = torch.compile(lambda images: _loss(model(images)), fullgraph=True, backend=counter)
    elif how == "model":
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        step = lambda images: _loss(compiled(images))  # noqa: E731
    else:
        model.network.compile(fullgraph=True, backend=counter)
        step = lambda images: _loss(model(images))  # noqa: E731
    for seed in range(3):
        total = step(_images(seed))
        total.backward()
        assert_close(total.detach(), _loss(plain(_images(seed))).detach(), 1e-5)
        assert_close(model.eval()(_images()), plain.eval()(_images()), 1e-5)
        model.train(), plain.train()
    assert _gradients(model).keys() == dict(model.named_parameters()).keys()
    assert counter.frame_count <= 2
