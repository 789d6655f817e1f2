"""TensorRT 8 in a Python of its own: `python3.10 _gpu_tensorrt8.py REQUEST.json`. Standard library, deploycc.runtime and `tensorrt` 8 only.

The request names files and how their engines are built (Recipe), the shape and the raw float32 input of each call, and where outputs and
the answer go. Engines are built by deploycc.runtime.tensorrt_engine. TensorRT 8.5 from PyPI comes without cuBLAS 11 and cuDNN 8: with
`own_kernels` only its own are asked for. Times are those of CUDA events of the driver's API, for calls and for replays of a CUDA graph.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from deploycc.runtime.tensorrt_engine import Recipe, build, logger

LIBRARIES = ("libcuda.so.1", "libcuda.so")
OWN = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
WARM = 20
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
FLOAT = 4


class Driver:
    """The driver's library: a context, a stream, memory, events, graphs."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.stream, context, device = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(0)
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(self.stream), 0)
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            self.call("cuEventCreate", ctypes.byref(event), 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError for any status but 0."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    def memory(self, size: int) -> int:
        """Address of `size` bytes."""
        address = ctypes.c_uint64(0)
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def send(self, address: int, content: bytes) -> None:
        """To the GPU."""
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), content, ctypes.c_size_t(len(content)))

    def receive(self, address: int, size: int) -> bytes:
        """From the GPU."""
        held = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", held, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return held.raw

    def wait(self) -> None:
        """Until the stream is idle."""
        self.call("cuStreamSynchronize", self.stream)

    def nanoseconds(self, run: Any, times: int) -> list[int]:
        """Of each call, by the GPU's clock."""
        begin, end = self._events
        found: list[int] = []
        for number in range(WARM + times):
            self.call("cuEventRecord", begin, self.stream)
            run()
            self.call("cuEventRecord", end, self.stream)
            self.call("cuEventSynchronize", end)
            elapsed = ctypes.c_float(0.0)
            self.call("cuEventElapsedTime", ctypes.byref(elapsed), begin, end)
            if number >= WARM:
                found.append(max(1, round(elapsed.value * 1e6)))
        return found

    def graph(self, run: Any) -> Any:
        """A call that replays what `run` queues."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuStreamBeginCapture_v2", self.stream, THREAD_LOCAL)
        run()
        self.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        return lambda: self.call("cuGraphLaunch", ready, self.stream)


class OwnKernels:
    """TensorRT, whose builder configurations ask for kernels of TensorRT's own alone."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)

    def Builder(self, log: Any) -> Any:  # noqa: N802  # TensorRT's name
        """The real one, its configurations prepared."""
        return _Builder(self._trt, self._trt.Builder(log))


class _Builder:
    def __init__(self, trt: Any, builder: Any) -> None:
        self._trt, self._builder = trt, builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def create_builder_config(self) -> Any:
        config = self._builder.create_builder_config()
        sources = [getattr(self._trt.TacticSource, name) for name in OWN if hasattr(self._trt.TacticSource, name)]
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
        return config


def measure(trt: Any, driver: Driver, job: dict[str, Any]) -> dict[str, Any]:
    """Build, answer every call, time: {"build_s", "bytes", "samples_ns", "graph_ns" (or "graph_problem"), "outputs"}."""
    begin = time.perf_counter()
    plan = build(OwnKernels(trt) if job["own_kernels"] else trt, Path(job["model"]), Recipe.parse(job["recipe"]))
    seconds = time.perf_counter() - begin
    log = logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan.engine)
    if engine is None:
        raise RuntimeError("TensorRT does not load the engine that it built")
    context = engine.create_execution_context()
    context.set_input_shape(job["input"], tuple(job["shape"]))
    shapes = {job["input"]: job["shape"], job["output"]: context.get_tensor_shape(job["output"])}
    sizes = {name: FLOAT * math.prod(shape) for name, shape in shapes.items()}
    places = {name: driver.memory(size) for name, size in sizes.items()}
    for name, place in places.items():
        context.set_tensor_address(name, place)

    def run() -> None:
        if not context.execute_async_v3(driver.stream.value or 0):
            raise RuntimeError("TensorRT did not run the engine")

    raw, size = Path(job["calls"]).read_bytes(), sizes[job["input"]]
    with Path(job["outputs"]).open("wb") as file:
        for start in range(0, len(raw), size):
            driver.send(places[job["input"]], raw[start : start + size])
            run()
            driver.wait()
            file.write(driver.receive(places[job["output"]], sizes[job["output"]]))
    found: dict[str, Any] = {"build_s": seconds, "bytes": len(plan.engine), "samples_ns": driver.nanoseconds(run, job["runs"])}
    try:
        found["graph_ns"] = driver.nanoseconds(driver.graph(run), job["runs"])
    except RuntimeError as error:
        found["graph_problem"] = str(error)
    return found


def main() -> None:
    """Every job of the request; the answer is written after each, so that a crash loses one."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    trt = importlib.import_module("tensorrt")
    library = next(ctypes.CDLL(name) for name in LIBRARIES)
    driver, found = Driver(library), dict[str, Any](version=str(trt.__version__), jobs={})
    for name, job in request["jobs"].items():
        try:
            found["jobs"][name] = measure(trt, driver, job)
        except Exception as error:  # noqa: BLE001  # becomes the row's reason
            found["jobs"][name] = {"problem": f"{type(error).__name__}: {error}"}
        Path(request["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
