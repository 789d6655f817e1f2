"""TensorRT's rows: deploycc's own backend writes the file, its session builds and loads the engine, and the GPU's clock times that engine.

For every precision one ONNX file; for every batch an engine of its own, built for just that size with no timing cache to start from, so
that its seconds are those of a first build. The row of the CUDA graph loads the kept engine instead. `host_p50_ms` is the bundle's session
as a device runs it, copies to and from the GPU included, by the machine's clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_clock import Arrays, Gpu, GpuSession, Tensors
from _gpu_float8 import Unfit, float8
from _gpu_models import UNUSED, Net, answers
from _gpu_rows import Way, brief
from _gpu_torch import GRAPH, lacking

from deploycc.backends._sixteen_bits import emulated
from deploycc.backends.tensorrt import TensorRt
from deploycc.core.contract import Built
from deploycc.core.target import Target
from deploycc.forms.onnx import read
from deploycc.runtime.sessions import tensorrt as session
from deploycc.runtime.tensorrt_engine import Recipe

BY = "TensorRT"
# row → (what float operators are computed in, whether the file has Q/DQ, the peak it is compared with)
PRECISIONS: Mapping[str, tuple[str, bool, str]] = {
    "f32": ("f32", False, "fp32"),
    "f16": ("f16", False, "fp16"),
    "bf16": ("bf16", False, "bf16"),
    "int8": ("f16", True, "int8"),
    "fp8": ("f16", True, "fp8"),
}
LEAST_FP8 = (8, 9)


@dataclass(frozen=True, slots=True)
class File:
    """What the backend wrote for one precision; `problem` says why there is none."""

    precision: str
    target: Target
    built: Built | None = None
    wanted: Sequence[Arrays] = ()
    problem: str = ""


class EngineSession:
    """An engine on inputs that lie on the GPU, through the session of a bundle (`host`)."""

    def __init__(self, host: session.TensorRtSession, gpu: Gpu, probe: Arrays, details: Mapping[str, Any]) -> None:
        self.host, self.details = host, dict(details)
        self._gpu = gpu
        host.run(probe)  # sets shapes and addresses, which `enqueue` uses again

    def run(self, feeds: Tensors) -> None:
        """Queue the engine once more; what it reads is what the session last copied."""
        self.host.enqueue(self._gpu.stream())

    def answer(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """One call of the bundle's session."""
        return dict(self.host.run(feeds))

    def synchronize(self) -> None:
        """Until the GPU is idle."""
        self._gpu.synchronize()

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.host.__exit__(*exc)


class EngineGraph(EngineSession):
    """The same as one CUDA graph."""

    def __init__(self, host: session.TensorRtSession, gpu: Gpu, probe: Arrays, details: Mapping[str, Any]) -> None:
        super().__init__(host, gpu, probe, details)
        self._replay, _ = gpu.capture(lambda: host.enqueue(gpu.stream()))

    def run(self, feeds: Tensors) -> None:
        """Replay."""
        self._replay()


def target_of(net: Net, precision: str, capability: tuple[int, int]) -> Target:
    """The network's target, for this very GPU and this precision of float operators."""
    return net.target.model_copy(
        update={
            "runtime": net.target.runtime.model_copy(update={"precision": PRECISIONS[precision][0]}),
            "hardware": net.target.hardware.model_copy(update={"compute_capability": ".".join(map(str, capability))}),
        }
    )


def files(
    net: Net, folder: Path, capability: tuple[int, int], only: Sequence[str] = tuple(PRECISIONS), *, used: bool = True
) -> dict[str, File]:
    """One for each precision, with what ONNX Runtime on the CPU answers to it; none are written where nothing here would use them."""
    found: dict[str, File] = {}
    if not used:
        return {precision: File(precision, target_of(net, precision, capability)) for precision in only}
    for precision in only:
        place = folder / precision
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        target = target_of(net, precision, capability)
        problem = _lacking(net, precision, capability)
        if problem:
            found[precision] = File(precision, target, problem=problem)
            continue
        try:
            artifact = net.quantized if PRECISIONS[precision][1] else net.graph
            assert artifact is not None  # a problem otherwise
            built = TensorRt().build(artifact, target, place)
            if precision == "fp8":
                float8(place / built.files[0])
            model = read(place / built.files[0])
            wanted = answers(net, emulated(model) if precision == "bf16" else model)
            found[precision] = File(precision, target, built, wanted)
        except Exception as error:  # noqa: BLE001  # becomes the row's reason
            found[precision] = File(precision, target, problem=str(error) if isinstance(error, Unfit) else brief(error))
    return found


def _lacking(net: Net, precision: str, capability: tuple[int, int]) -> str:
    if PRECISIONS[precision][1] and net.quantized is None:
        return f"it could not be quantized: {net.problem}"
    if precision == "fp8" and capability < LEAST_FP8:
        return f"fp8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return lacking(precision, capability)


def ways(net: Net, written: Mapping[str, File], batch: int, folder: Path, gpu: Gpu) -> list[Way]:
    """An engine and its CUDA graph for each file; where TensorRT is not here, why."""
    found: list[Way] = []
    for precision, file in written.items():
        problem = file.problem or TensorRt().absent(file.target) or ("" if file.built else UNUSED)
        place = folder / "engines" / f"{precision}-{batch}"
        for plain in (True, False):
            name = f"TensorRT {precision}" + ("" if plain else f", {GRAPH}")
            opened = None if problem else partial(_open, net, file, batch, place, gpu, plain)
            found.append(Way(name, BY, PRECISIONS[precision][2], opened, problem, file.wanted or None))
    return found


def _open(net: Net, file: File, batch: int, cache: Path, gpu: Gpu, plain: bool, probes: Sequence[Tensors]) -> GpuSession:
    assert file.built is not None  # a problem otherwise
    recipe = Recipe.parse(str(file.built.runtime["recipe"]))
    sized = {name: tuple((batch, *shape[1:]) for shape in shapes) for name, shapes in recipe.profiles.items()}
    profiles: Any = {name: (shapes[0], shapes[1], shapes[2]) for name, shapes in sized.items()}
    runtime = {**file.built.runtime, "recipe": replace(recipe, profiles=profiles).text()}
    if plain:
        for old in cache.glob("engines/*"):
            old.unlink()
    begin = time.perf_counter()
    with environment(session.ROOT, str(cache)):
        host = TensorRt().open(replace(file.built, runtime=runtime), file.target, threads=1)
    if not isinstance(host, session.TensorRtSession):
        raise RuntimeError("the backend opened ONNX Runtime on the CPU instead of an engine")
    details: dict[str, Any] = {"build_s" if plain else "load_s": time.perf_counter() - begin}
    details["engine_mb"] = sum(path.stat().st_size for path in cache.glob("engines/*.plan")) / 1e6
    details["tensorrt"] = session.version()
    return (EngineSession if plain else EngineGraph)(host, gpu, net.probes(batch)[0], details)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, as before afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
