"""The GPU's own clock: CUDA events around a call, CUDA graphs, and what a call gives when it is repeated without a pause.

An event is a time stamp that the GPU takes when everything queued before it on the stream is finished, so the time between two of them is
what the call took on the GPU, with the gaps in which it waited for the CPU to launch the next kernel. A replayed graph has no such gaps.
Everything runs on one stream that is not CUDA's default one, because TensorRT synchronizes more on that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deploycc.runtime.measure import Call

CLOCK = "CUDA events"
WARM_CALLS = 3  # before a graph is captured: libraries choose their kernels and take their memory
QUEUED = 32  # calls between two synchronizations of a sustained run

Tensors = Mapping[str, Any]  # by input name, on the GPU
Arrays = Mapping[str, np.ndarray]


class Event(Protocol):
    """What of torch.cuda.Event is used."""

    def record(self) -> None:
        """Queue the time stamp."""
        ...

    def synchronize(self) -> None:
        """Until it is taken."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this one to a later one."""
        ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the rows need of a device, so that tests can stand in for it.

    Attributes:
        device: PyTorch's name of it.
        event: makes an event that takes time stamps.
        synchronize: waits for everything queued.
        capture: runs a call into a CUDA graph: (replay, what the call gave, whose memory each replay fills anew).
        stream: the handle of PyTorch's current stream.
    """

    device: str
    event: Callable[[], Event]
    synchronize: Callable[[], None]
    capture: Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]
    stream: Callable[[], int]


def first_gpu() -> Gpu:
    """The first CUDA device of PyTorch."""
    import torch

    def event() -> Event:
        return torch.cuda.Event(enable_timing=True)

    return Gpu("cuda", event, torch.cuda.synchronize, _capture, lambda: torch.cuda.current_stream().cuda_stream)


def _capture(call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    import torch

    for _ in range(WARM_CALLS):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        given = call()
    return graph.replay, given


@contextmanager
def own_stream() -> Iterator[None]:
    """PyTorch's current stream is one of its own, not CUDA's default one."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        yield


class EventTimer:
    """A Timer (deploycc.runtime.measure) that reads the GPU's clock."""

    def __init__(self, gpu: Gpu) -> None:
        self._begin, self._end = gpu.event(), gpu.event()

    def __call__(self, call: Call, number: int) -> int:
        self._begin.record()
        call(number)
        self._end.record()
        self._end.synchronize()
        return max(1, round(self._begin.elapsed_time(self._end) * 1e6))


class GpuSession(Protocol):
    """A way to run a network: `run` hands the GPU work on tensors that are there already, `answer` takes and gives arrays of the CPU."""

    def run(self, feeds: Tensors) -> object:
        """Queue one call."""
        ...

    def answer(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """One call, finished."""
        ...

    def synchronize(self) -> None:
        """Until the work is finished."""
        ...

    def __enter__(self) -> GpuSession: ...

    def __exit__(self, *exc: object) -> None: ...


class GraphSession:
    """Another session's calls as CUDA graphs: one for each of the feeds that the clock takes turns over, captured when it is opened."""

    def __init__(self, inner: GpuSession, gpu: Gpu, probes: Sequence[Tensors]) -> None:
        self._inner, self._gpu = inner, gpu
        self._own = {name: tensor.clone() for name, tensor in probes[0].items()}  # what `answer` fills
        self._graphs = {id(feeds): gpu.capture(lambda feeds=feeds: inner.run(feeds)) for feeds in (*probes, self._own)}

    def run(self, feeds: Tensors) -> object:
        """Replay. A KeyError means that these feeds were not among the probes."""
        replay, given = self._graphs[id(feeds)]
        replay()
        return given

    def answer(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Of the graph, not of the session behind it."""
        import torch

        for name, array in feeds.items():
            self._own[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        given: Any = self.run(self._own)
        self._gpu.synchronize()
        return arrays(given)

    def synchronize(self) -> None:
        """Until the GPU is idle."""
        self._gpu.synchronize()

    def __enter__(self) -> GraphSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self._graphs.clear()
        self._inner.__exit__(*exc)


def arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """On the CPU, copied."""
    return {name: np.array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}


def tensors(feeds: Iterable[Arrays], device: str) -> list[dict[str, Any]]:
    """On the device."""
    import torch

    return [{name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in call.items()} for call in feeds]


def sustained(session: GpuSession, probes: Sequence[Tensors], seconds: float) -> tuple[int, float]:
    """(calls, seconds they took) without a pause between them; at most QUEUED wait for the GPU."""
    session.synchronize()
    begin, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds or not calls:
        for _ in range(QUEUED):
            session.run(probes[calls % len(probes)])
            calls += 1
        session.synchronize()
    return calls, max(spent, time.perf_counter() - begin)
