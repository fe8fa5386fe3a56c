"""A rehearsal's GPU: torch's names for one, on the CPU, so that the programs for a GPU run as they are.

Tensors "on cuda" lie on the CPU, where the CUDA kernels compute too (tests/on_host.py). A CUDA graph keeps the
operations that torch dispatches while it is captured, and its replay calls them again and copies what they return to
where the first results lie. Streams have no effect, nothing waits, memory is not counted, and profiles are the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.profiler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import REHEARSAL


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


class Graph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor) and id(x) not in self.before:
                    self.before[id(x)] = x, x.clone()
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error: Any) -> None:
        """Puts back what the captured operations have changed: a capture runs nothing."""
        super().__exit__(*error)
        with torch.no_grad():
            for x, before in self.before.values():
                x.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class OnTheCpu(TorchFunctionMode):
    """Creates tensors, and moves them, where there is a device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*(self._there(x) for x in args), **kwargs)

    @staticmethod
    def _there(x: Any) -> Any:
        is_gpu = (isinstance(x, str) and x.startswith("cuda")) or (isinstance(x, torch.device) and x.type == "cuda")
        return "cpu" if is_gpu else x


def _profile_of_cpu(profile: Any, activities: Any = None, **kwargs: Any) -> Any:
    return profile(activities=[torch.profiler.ProfilerActivity.CPU], **kwargs)


def where_there_is_no_gpu() -> None:
    """From now on, this process has the GPU of a rehearsal, if it is one."""
    if REHEARSAL and not torch.cuda.is_available():
        install()


def install() -> None:
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731

    @contextlib.contextmanager
    def same(*_: Any, **__: Any) -> Iterator[None]:
        yield

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "no GPU: a rehearsal",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: mock.Mock(L2_cache_size=0),
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (0, 0),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "current_stream": Stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": same,
        "graph": lambda graph: graph,
        **dict.fromkeys(
            ("_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"), nothing
        ),
    }.items():
        setattr(torch.cuda, name, value)
    torch.cuda.jiterator._create_jit_fn = lambda code: torch.exp  # type: ignore[assignment]

    def on_cpu(function: Any) -> Any:
        return lambda device, *args, **kwargs: function(str(device).replace("cuda", "cpu"), *args, **kwargs)

    torch.profiler.profile = functools.partial(_profile_of_cpu, torch.profiler.profile)  # type: ignore[assignment,misc]
    torch.Generator = Generator  # type: ignore[assignment,misc]
    torch.autocast = on_cpu(torch.autocast)
    torch.amp.GradScaler = on_cpu(torch.amp.GradScaler)
    torch.nn.Module.cuda = lambda module: module  # type: ignore[assignment,method-assign]
    OnTheCpu().__enter__()
