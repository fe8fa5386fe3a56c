"""More exits than one launch of a GPU takes: what the passes over some of them give together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import RELATIVE, Backend, assert_close, in_double, make_exits, make_labels, smallest, value_and_gradients

import selfreg_fast as srf
from selfreg_fast import reference

SHAPE = (2, 3, 3, 4)
TEACHERS = {"one": (7,), "ends": (0, -1), "all": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "detached": {"temperature": 2},
    "learning": {"temperature": 3, "detach_teacher": False},
    "maps": {"reduction": "none"},
    "argmax": {"target": "argmax", "mask_soft": True},
}


@pytest.fixture(autouse=True)
def only_kernels(backend: Backend) -> None:
    if backend.interpreted:
        pytest.skip("triton, interpreted: hundreds of losses take minutes")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("teachers", TEACHERS)
@pytest.mark.parametrize("n", [17, 18, 35])
def test_matrix(backend: Backend, n: int, teachers: str, options: str) -> None:
    """Every entry, and the gradients of all exits, of which teachers take part in several passes."""
    exits = make_exits(n, SHAPE, device=backend.device)
    labels = make_labels((2, 3, 4), 3, device=backend.device)
    chosen = TEACHERS[teachers] or tuple(range(n))
    kwargs = {"labels": labels, "teachers": chosen, **OPTIONS[options]}
    exact = value_and_gradients(
        lambda e: reference.exit_loss_matrix(e, **in_double(kwargs)), [z.double() for z in exits], "random", 24
    )
    actual = value_and_gradients(lambda e: srf.exit_loss_matrix(e, backend=backend.name, **kwargs), exits, "random", 24)
    _assert_all_close(actual, exact)


@pytest.mark.parametrize("wanted", ["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_total(backend: Backend, dtype: torch.dtype, wanted: str) -> None:
    """The total of 20 exits, whose gradient the forward passes write (in float32), of all exits or of some."""
    exits = make_exits(20, SHAPE, dtype=dtype, device=backend.device)
    labels = make_labels((2, 3, 4), 3, device=backend.device)
    kwargs: dict[str, Any] = {"temperature": 2, "sr_f_weight": 0.5}

    def total(function: Any, e: list[torch.Tensor], **more: Any) -> torch.Tensor:
        if wanted == "some":
            e = [z if i % 3 else z.detach() for i, z in enumerate(e)]
        value: torch.Tensor = function(e, labels, **kwargs, **more).total
        return value + 0 * sum(z.sum() for z in e)  # so that each exit has a gradient

    exact = value_and_gradients(
        lambda e: total(reference.self_regulation_loss, e), [z.double() for z in exits], "one", 24
    )
    actual = value_and_gradients(lambda e: total(srf.self_regulation_loss, e, backend=backend.name), exits, "one", 24)
    _assert_all_close(actual, exact)


def test_compile_without_graph_breaks(backend: Backend) -> None:
    """The passes are traced too."""
    if not backend.fused:
        pytest.skip("reference: has no passes")
    exits = make_exits(18, SHAPE, device=backend.device)
    labels = make_labels((2, 3, 4), 3, device=backend.device)

    def losses(e: list[torch.Tensor]) -> torch.Tensor:
        return srf.exit_loss_matrix(e, labels, teachers=(0, -1), temperature=2, backend=backend.name)

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    _assert_all_close(value_and_gradients(compiled, exits), value_and_gradients(losses, exits))


def _assert_all_close(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        relative = RELATIVE[a.dtype] if i else RELATIVE[torch.float32]
        assert_close(a, e, relative, smallest(a.dtype), f"gradient of exit {i - 1}" if i else "value")
