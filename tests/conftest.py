"""Fixtures of every test: the backends, and hypothesis without chance."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import on_host
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

STAND_INS = on_host.stand_in()  # before selfreg_fast is imported

from support import Backend  # noqa: E402

import selfreg_fast as srf  # noqa: E402
from selfreg_fast.backends import TRITON_INTERPRETED, device_of  # noqa: E402

PROFILE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
WITHOUT_TARGET = [phase for phase in Phase if phase != Phase.target]  # which is a search for larger errors
settings.register_profile("ci", max_examples=200, derandomize=True, phases=WITHOUT_TARGET, **PROFILE)
settings.register_profile("long", max_examples=10_000, **PROFILE)
# On a GPU Triton compiles for every other set of options.
settings.register_profile("gpu", settings.get_profile("ci"), max_examples=15)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="fail, rather than skip, where this backend is not available (may be given again)",
    )
    parser.addoption(
        "--all-interpreted", action="store_true", help="on Triton's interpreter, run all cases of a test, not a third"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's interpreter is slow: of the many cases of a test it gets every third."""
    if not TRITON_INTERPRETED or config.getoption("--all-interpreted"):
        return
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        name, _, parameters = item.nodeid.partition("[")
        interpreted = (
            parameters.startswith("triton") and hasattr(item, "fixturenames") and "backend" in item.fixturenames
        )
        seen[name] += interpreted
        (left_out if interpreted and seen[name] % 3 != 1 else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_configure() -> None:
    # Tensors here are small: a second thread gains nothing, and libgomp's threads spin while they wait, which on a busy
    # machine is minutes. Tests of several threads ask for them, with the fixture `threads`.
    torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    return [f"selfreg_fast {srf.__version__}, {name}: {state}" for name, state in srf.backends().items()] + STAND_INS


@pytest.fixture(scope="session", params=("reference", "cpu", "cuda", "triton"))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that there is on this machine; the others are skipped, with the reason."""
    state = srf.backends()[request.param]
    if state != "available":
        say = pytest.fail if request.param in request.config.getoption("--require-backend") else pytest.skip
        say(f"{request.param}: {state}")
    return Backend(request.param, device_of(request.param))


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads, put back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
