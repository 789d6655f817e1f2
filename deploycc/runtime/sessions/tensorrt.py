"""TensorRT on an NVIDIA GPU: the engine is built here, on the device, from the ONNX file of the bundle, and kept for the next time.

An engine is machine code for one GPU, one TensorRT and one driver. It lies in the cache (DEPLOYCC_CACHE, else ~/.cache/deploycc) under a
key of all of these, the file and the way it was built; beside it is a page with the same facts and its SHA-256, and both are compared
before it is loaded. What the builder timed is kept too, for other models on the same GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from deploycc.errors import BundleError, MismatchError, SignatureError
from deploycc.runtime import cuda
from deploycc.runtime.signature import Feeds, FeedsCheck, Outputs, Signature
from deploycc.runtime.tensorrt_engine import Recipe, build, complaints, logger

MODULE = "tensorrt"
PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")
INSTALL = "install TensorRT as NVIDIA describes it: pip install 'tensorrt>={}', or the packages of JetPack"
ROOT = "DEPLOYCC_CACHE"
TYPES = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64"}


def version() -> str | None:
    """Version of the installed TensorRT, or None; imports nothing where a package says it."""
    for package in PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        return str(importlib.import_module(MODULE).__version__)  # JetPack's, which may have no metadata
    except ImportError:
        return None


def open(model: Path, signature: Signature, runtime: Mapping[str, str], threads: int) -> TensorRtSession:
    """Load the engine of an .onnx file, building it first where there is none for this GPU; `threads` is the GPU's own business.

    Raises:
        MismatchError: TensorRT is not installed, there is no NVIDIA GPU, or a stored engine is not what its page says.
        BundleError: TensorRT does not read the file or builds no engine, or its inputs and outputs are not those of `signature`.
    """
    try:
        trt = importlib.import_module(MODULE)
    except ImportError as error:
        wanted = runtime.get("minimum") or "10.12"
        raise MismatchError(f"{model.name} needs TensorRT, which does not import here: {error}", fix=INSTALL.format(wanted)) from error
    gpu = cuda.gpu()
    if gpu is None:
        raise MismatchError("there is no NVIDIA GPU with a working driver here", fix="run the bundle on its device")
    recipe = Recipe.parse(runtime.get("recipe", ""))
    facts = describe(str(trt.__version__), gpu, model, recipe)
    engine = _engine(trt, model, recipe, facts)
    log = logger(trt)
    trt.init_libnvinfer_plugins(log, "")  # some operators are plug-ins (InstanceNormalization in 8), which only the parser registers
    loader = trt.Runtime(log)
    if recipe.version_compatible:
        loader.engine_host_code_allowed = True  # the engine brings the runtime of its own version
    loaded = loader.deserialize_cuda_engine(engine)
    if loaded is None:
        raise BundleError(
            f"TensorRT {trt.__version__} does not load the engine of {model.name}: {'; '.join(complaints(log)) or 'no reason given'}",
            fix=f"delete {_place(facts)}: it is built anew",
        )
    return TensorRtSession(trt, loaded, signature, keep=(log, loader))


def describe(installed: str, gpu: cuda.Gpu, model: Path, recipe: Recipe) -> dict[str, str]:
    """Everything that an engine depends on."""
    files = [model, *sorted(path for path in model.parent.glob(f"{model.name}.*") if path.suffix == ".data")]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    system = f"{platform.system()} {platform.machine()}"
    return {"model": digest.hexdigest(), "recipe": recipe.text(), "tensorrt": installed, "system": system, **asdict(gpu)}


def key(facts: Mapping[str, str]) -> str:
    """The name of an engine."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:32]


def _folder() -> Path:
    root = os.environ.get(ROOT)
    return (Path(root) if root else Path.home() / ".cache" / "deploycc") / "engines"


def _place(facts: Mapping[str, str]) -> Path:
    return _folder() / f"{key(facts)}.plan"


def _engine(trt: Any, model: Path, recipe: Recipe, facts: Mapping[str, str]) -> bytes:
    """The stored engine, or a new one, which is stored."""
    place = _place(facts)
    if place.is_file():
        return _checked(place, facts)
    place.parent.mkdir(parents=True, exist_ok=True)
    known = place.parent / f"{key({name: facts[name] for name in ('name', 'tensorrt', 'driver')})}.timings"
    plan = build(trt, model, recipe, timings=known.read_bytes() if known.is_file() else b"")
    _write(known, plan.timings)
    page = {"facts": dict(facts), "sha256": hashlib.sha256(plan.engine).hexdigest()}
    _write(place.with_suffix(".json"), json.dumps(page, sort_keys=True, indent=1).encode())
    _write(place, plan.engine)
    return plan.engine


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also when two processes build at once."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_bytes(content)
    work.replace(path)


def _checked(place: Path, facts: Mapping[str, str]) -> bytes:
    """A stored engine. Raises MismatchError, naming both sides, unless it is for this machine and whole."""
    fix = f"delete {place}: it is built anew"
    try:
        page: Any = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        told, wanted = cast("dict[str, str]", page["facts"]), str(page["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"the stored engine {place.name} has no page that says what it is for: {error!r}", fix=fix) from error
    for name, here in facts.items():
        if told.get(name) != here:
            raise MismatchError(f"the stored engine {place.name} is for {name} {told.get(name)}, here it is {here}", fix=fix)
    engine = place.read_bytes()
    found = hashlib.sha256(engine).hexdigest()
    if found != wanted:
        raise MismatchError(f"the stored engine {place.name} was changed: its SHA-256 should be {wanted}, it is {found}", fix=fix)
    return engine


def _numpy_type(name: str, kind: Any) -> np.dtype[Any]:
    """Of a tensor outside the engine; TensorRT's own `nptype` fails in 8.5 with numpy 1.24 and later."""
    found = TYPES.get(str(kind).rpartition(".")[2])
    if found is None:
        raise BundleError(f"'{name}' is {kind}, which numpy has no type for", fix="compile again: bundles take and give plain types")
    return np.dtype(found)


class TensorRtSession:
    """One loaded engine with its buffers."""

    def __init__(self, trt: Any, engine: Any, signature: Signature, *, keep: tuple[Any, ...] = ()) -> None:
        """`keep`: what must outlive the engine."""
        self.signature = signature
        self._keep = (*keep, engine)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for kind, specs in (("INPUT", signature.inputs), ("OUTPUT", signature.outputs)):
            wanted = [spec.name for spec in specs]
            found = [name for name in names if engine.get_tensor_mode(name) == getattr(trt.TensorIOMode, kind)]
            if sorted(wanted) != sorted(found):
                raise BundleError(
                    f"the engine has the {kind.lower()}s {', '.join(found)}, but its signature says {', '.join(wanted)}",
                    fix="build the bundle again: the model and the manifest do not belong together",
                )
        self._types = {name: _numpy_type(name, engine.get_tensor_dtype(name)) for name in names}
        self._device = cuda.Device()
        self._context: Any = engine.create_execution_context()
        self._check = FeedsCheck(signature)
        self._fed = False

    def run(self, feeds: Feeds) -> Outputs:
        """One call, copies to and from the GPU included. Raises SignatureError, also for a shape that the profile does not hold."""
        self._check(feeds)
        if self._context is None:
            raise BundleError("this session is closed", fix="open the bundle again")
        self._device.activate()
        held = [self._feed(name, array) for name, array in feeds.items()]
        outputs: dict[str, np.ndarray] = {}
        for spec in self.signature.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise BundleError(
                    f"how large output '{spec.name}' is depends on the data, which this session does not serve",
                    fix="cut the model before the operator that selects (NonZero, NonMaxSuppression)",
                )
            outputs[spec.name] = np.empty(shape, self._types[spec.name])
            self._context.set_tensor_address(spec.name, self._device.buffer(spec.name, outputs[spec.name].nbytes))
        if not self._context.execute_async_v3(self._device.stream):
            raise BundleError("TensorRT did not run the engine", fix="check the GPU's free memory; `runner.pyz selftest` tries again")
        for name, array in outputs.items():
            self._device.receive(array, self._device.buffer(name, array.nbytes))
        self._device.wait()
        self._fed = True
        del held  # the copies have read them
        types = {spec.name: np.dtype(spec.dtype) for spec in self.signature.outputs}
        return {name: array.astype(types[name], copy=False) for name, array in outputs.items()}

    def _feed(self, name: str, array: np.ndarray) -> np.ndarray:
        """Queue one input; returns what must stay until the copy is done. TensorRT 8 takes int32 where the model says int64."""
        kind = self._types[name]
        if array.dtype != kind and array.dtype.kind == "i" and array.size:
            limits = np.iinfo(kind)
            if array.min() < limits.min or array.max() > limits.max:
                raise SignatureError(
                    f"input '{name}' holds {array.min()} to {array.max()}, which {kind} does not",
                    fix=f"feed values that {kind} holds, in which this TensorRT computes, or use TensorRT 10",
                )
        ready = np.ascontiguousarray(array, kind)
        if not self._context.set_input_shape(name, ready.shape):
            raise SignatureError(
                f"input '{name}' has shape {list(ready.shape)}, which the engine was not built for",
                fix="[engine.axes] of the target says the sizes: give the axis a wider range there, and compile again",
            )
        address = self._device.buffer(name, ready.nbytes)
        self._context.set_tensor_address(name, address)
        self._device.send(address, ready)
        return ready

    def enqueue(self, stream: int) -> None:
        """Queue the engine once more on the inputs of the last `run`, on a CUDA stream and without copies: what a GPU's own clock times.

        Raises BundleError when nothing has run, the session is closed, or TensorRT refuses.
        """
        if self._context is None or not self._fed:
            raise BundleError("there are no inputs on the GPU to run the engine on", fix="call `run` of an open session first")
        if not self._context.execute_async_v3(stream):
            raise BundleError("TensorRT did not run the engine", fix="check the GPU's free memory; `runner.pyz selftest` tries again")

    def synchronize(self) -> None:
        """Nothing is pending: `run` waits for its answer."""

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the engine and give its memory back."""
        self._context = None
        self._keep = ()
        self._device.close()
