"""Fixtures of every test: the backends, and hypothesis without chance."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
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
        "--all-interpreted", action="store_true", help="on Triton's interpreter, run all cases of a test, not a part"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leaves cases out on Triton's interpreter, which is slow; and begins with what takes long, not to wait for it."""
    if TRITON_INTERPRETED and not config.getoption("--all-interpreted"):
        tests = defaultdict(list)
        for item in items:
            callspec = getattr(item, "callspec", None)
            chooses = "not_all" in getattr(item, "fixturenames", ())
            if callspec is not None and callspec.params.get("backend") == "triton" and not chooses:
                tests[item.function].append(item)
        left_out = {item for cases in tests.values() for item in cases} - {
            item for cases in tests.values() for item in _some(cases)
        }
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def _some(cases: list[pytest.Function]) -> list[pytest.Function]:
    """Every third where there is one parameter; else as many, up to a third, as it takes for all pairs of values."""
    parameters = [[(k, repr(v)) for k, v in case.callspec.params.items() if k != "backend"] for case in cases]
    if len(dict(parameters[0])) < 2:
        return cases[::3]
    pairs = [set(itertools.combinations(p, 2)) for p in parameters]
    missing, chosen = set().union(*pairs), []
    while missing and 3 * len(chosen) < len(cases):
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(cases[best])
    return chosen


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
def not_all(backend: Backend, request: pytest.FixtureRequest) -> bool:
    """Whether a test is to choose among its cases by itself: Triton's interpreter takes seconds for one."""
    return backend.interpreted and not request.config.getoption("--all-interpreted")


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads, put back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
