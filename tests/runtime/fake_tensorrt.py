"""A stand-in for TensorRT that has the recorded names of one version and nothing else: a name that is not there fails the test.

The names are those of NVIDIA's own bindings, without the underscored ones: `dir()` of the classes that the session uses.
"""

from __future__ import annotations

import ctypes
import json
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

NAMES = json.loads((Path(__file__).parent / "tensorrt_names.json").read_text())
VERSIONS = tuple(NAMES)
DATA_TYPES = {"float32": "FLOAT", "int32": "INT32", "float8": "FP8"}


class Guarded:
    """Has the recorded names of a class only."""

    def __init__(self, kind: str, names: str, **values: Any) -> None:
        object.__setattr__(self, "_names", (kind, set(names.split())))
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        kind, names = self._names
        if name not in names:
            raise AttributeError(f"{kind} of this version has no {name}")
        object.__setattr__(self, name, value)


class Fake:
    """One TensorRT: the module, and what was asked of it (`asked`, in order)."""

    def __init__(
        self, version: str, *, inputs: dict[str, tuple[str, tuple[int, ...]]], outputs: dict[str, tuple[str, tuple[int, ...]]]
    ) -> None:
        self.names = NAMES[version]
        self.inputs, self.outputs = inputs, outputs
        self.asked: list[Any] = []
        self.streams: list[int] = []
        self.refuses, self.fails, self.loads = False, False, True
        self.module: Any = ModuleType("tensorrt")
        self.module.__version__ = version
        for kind in (
            "NetworkDefinitionCreationFlag",
            "BuilderFlag",
            "MemoryPoolType",
            "ProfilingVerbosity",
            "HardwareCompatibilityLevel",
            "TensorIOMode",
        ):
            if kind in self.names:
                members = {name: index for index, name in enumerate(self.names[kind].split())}
                setattr(self.module, kind, SimpleNamespace(**members))
        if "init_libnvinfer_plugins" in self.names["module"].split():
            self.module.init_libnvinfer_plugins = self._note("init_libnvinfer_plugins", True)
        self.module.ILogger = type("ILogger", (), {})
        for kind in ("Builder", "OnnxParser", "Runtime"):
            setattr(self.module, kind, getattr(self, f"_{kind.lower()}"))

    def _made(self, kind: str, **values: Any) -> Guarded:
        return Guarded(kind, self.names[kind], **values)

    def _note(self, name: str, answer: Any = None) -> Any:
        def called(*arguments: Any, **keywords: Any) -> Any:
            self.asked.append((name, *arguments, *keywords.values()))
            return answer

        return called

    def flag(self, name: str) -> int:
        return getattr(self.module.BuilderFlag, name)

    def _builder(self, log: Any) -> Guarded:
        def create_network(flags: int) -> str:
            self.asked.append(("create_network", flags))
            return "network"

        def build(network: Any, config: Any) -> bytes | None:
            self.asked.append("build")
            if self.fails:
                log.log("Severity.ERROR", "out of memory\nmore")
                log.log("Severity.INFO", "not kept")
            return None if self.fails else b"an engine"

        def profile() -> Guarded:
            return self._made("IOptimizationProfile", set_shape=self._note("set_shape"))

        return self._made(
            "Builder", create_network=create_network, create_builder_config=self._config, create_optimization_profile=profile,
            build_serialized_network=build,
        )  # fmt: skip

    def _config(self) -> Guarded:
        cache = self._made("ITimingCache", serialize=lambda: b"timings")
        config = self._made(
            "IBuilderConfig",
            set_flag=self._note("set_flag"),
            clear_flag=self._note("clear_flag"),
            set_memory_pool_limit=self._note("set_memory_pool_limit"),
            create_timing_cache=self._note("create_timing_cache", cache),
            set_timing_cache=self._note("set_timing_cache"),
            get_timing_cache=lambda: cache,
            add_optimization_profile=self._note("add_optimization_profile"),
        )
        for name in ("builder_optimization_level", "hardware_compatibility_level"):
            if name in self.names["IBuilderConfig"].split():
                setattr(config, name, None)
        self.config = config
        return config

    def _onnxparser(self, network: Any, log: Any) -> Guarded:
        says = {"desc": lambda: "no importer", "node_name": lambda: "n7", "node_operator": lambda: "Det"}
        error = self._made("ParserError", **{name: said for name, said in says.items() if name in self.names["ParserError"].split()})
        return self._made("OnnxParser", parse_from_file=lambda path: not self.refuses, num_errors=1, get_error=lambda index: error)

    def _runtime(self, log: Any) -> Guarded:
        def load(engine: bytes) -> Guarded | None:
            self.asked.append(("load", engine))
            if not self.loads:
                log.log("Severity.ERROR", "wrong version")
            return self.engine() if self.loads else None

        return self._made("Runtime", deserialize_cuda_engine=load)

    def engine(self) -> Guarded:
        tensors = {**self.inputs, **self.outputs}
        modes = self.module.TensorIOMode
        return self._made(
            "ICudaEngine",
            num_io_tensors=len(tensors),
            get_tensor_name=lambda index: list(tensors)[index],
            get_tensor_mode=lambda name: modes.INPUT if name in self.inputs else modes.OUTPUT,
            get_tensor_dtype=lambda name: f"DataType.{DATA_TYPES[tensors[name][0]]}",
            create_execution_context=self._context,
        )

    def _context(self) -> Guarded:
        """Its answer is minus the first input, on a GPU whose memory is this process's."""
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, int] = {}

        def set_input_shape(name: str, shape: tuple[int, ...]) -> bool:
            shapes[name] = tuple(shape)
            return shape[0] <= self.inputs[name][1][0]

        def output_shape(name: str) -> tuple[int, ...]:
            return self.outputs[name][1] or next(iter(shapes.values()))

        def execute(stream: int) -> bool:
            self.streams.append(stream)
            first, last = next(iter(self.inputs)), next(iter(self.outputs))
            size = int(np.prod(shapes[first]))
            kind = np.dtype(self.inputs[first][0])
            source = np.frombuffer((ctypes.c_char * (size * kind.itemsize)).from_address(places[first]), kind)
            into = np.frombuffer(
                (ctypes.c_char * (size * np.dtype(self.outputs[last][0]).itemsize)).from_address(places[last]), self.outputs[last][0]
            )
            into[:] = -source
            return not self.fails

        return self._made(
            "IExecutionContext", set_input_shape=set_input_shape, get_tensor_shape=output_shape, execute_async_v3=execute,
            set_tensor_address=places.__setitem__,
        )  # fmt: skip


class Driver:
    """A stand-in for libcuda: one device, whose memory is this process's; `calls` in order, `fails` names a function that does."""

    def __init__(self, devices: int = 1, capability: tuple[int, int] = (8, 9)) -> None:
        self.devices, self.capability = devices, capability
        self.calls: list[str] = []
        self.fails = ""
        self.held: dict[int, Any] = {}
        self._numbers = count(1)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def called(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fails:
                return 2
            handler = getattr(type(self), f"on_{name}", None)
            if handler is not None:
                handler(self, *arguments)
            return 0

        return called

    def on_cuDeviceGetCount(self, number: Any) -> None:
        number._obj.value = self.devices

    def on_cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = b"A GPU"

    def on_cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> None:
        number._obj.value = self.capability[attribute - 75]

    def on_cuDriverGetVersion(self, number: Any) -> None:
        number._obj.value = 13000

    def on_cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        context._obj.value = 7

    def on_cuStreamCreate(self, stream: Any, flags: int) -> None:
        stream._obj.value = 9

    def on_cuMemAlloc_v2(self, address: Any, size: Any) -> None:
        held = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(held)
        self.held[ctypes.addressof(held)] = held

    def on_cuMemFree_v2(self, address: Any) -> None:
        del self.held[address.value]

    def on_cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        ctypes.memmove(target.value, source.value, size.value)

    def on_cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        ctypes.memmove(target.value, source.value, size.value)
