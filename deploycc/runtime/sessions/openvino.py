"""OpenVINO on the CPU, the way a device runs a bundle: explicit threads, the precision and the streams that the manifest names.

With the hint "latency" there is one stream: all threads compute a call together. With "throughput" every thread is a stream of its own, and
the samples of a call are divided among them.

Where DEPLOYCC_CACHE names a folder, what OpenVINO compiles for this CPU is kept there, and loaded the next time (EfficientNet-Lite2: in
0.1 s instead of 0.45 s); OpenVINO itself checks that its version, the CPU and the model are the same.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.errors import BundleError, MismatchError
from deploycc.runtime.signature import Feeds, FeedsCheck, Outputs, Signature

CACHE = "DEPLOYCC_CACHE"
FLOAT32, THROUGHPUT = "f32", "throughput"
CAPABILITIES = {"bf16": "BF16", "f16": "FP16"}  # precision → what the plug-in says of a CPU that computes in it


def version() -> str | None:
    """Version of the installed openvino, or None; imports nothing."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None


def open(model: Path, signature: Signature, runtime: Mapping[str, str], threads: int) -> OpenVinoSession:
    """Load an .xml file with the .bin file beside it; runtime["precision"] is what float operators are computed in.

    Raises:
        MismatchError: OpenVINO is not installed, or this CPU does not compute in the precision (the plug-in would use float32, silently).
        BundleError: OpenVINO cannot load the file, or its inputs and outputs are not those of `signature`.
    """
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MismatchError(
            f"{model.name} needs openvino, which does not import here: {error}",
            fix=f"pip install 'openvino>={runtime.get('minimum') or runtime.get('version') or '2025.0'}'",
        ) from error
    ov: Any = openvino  # its types are the C++ library's
    core, precision = ov.Core(), runtime.get("precision", FLOAT32)
    if precision in CAPABILITIES and CAPABILITIES[precision] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise MismatchError(
            f"{model.name} is to be computed in {precision}, which OpenVINO does not do on this CPU",
            fix="use the bundle of a float32 or int8 target, or a CPU with AVX512_BF16 or AMX",
        )
    streams = threads if runtime.get("hint") == THROUGHPUT else 1
    how = settings(precision, threads, streams) | kept()
    try:
        loaded = core.compile_model(str(model), "CPU", how)
    except Exception as error:
        raise BundleError(
            f"OpenVINO {version()} cannot load {model.name}: {_first(str(error))}",
            fix="check that the .xml and its .bin are whole; a file of a newer OpenVINO needs `pip install -U openvino`",
        ) from error
    for kind, specs, ports in (("inputs", signature.inputs, loaded.inputs), ("outputs", signature.outputs, loaded.outputs)):
        wanted, names = [spec.name for spec in specs], [port.get_names() for port in ports]  # a tensor may have several
        if len(wanted) != len(names) or not all(any(name in known for known in names) for name in wanted):
            found = ", ".join(" = ".join(sorted(known)) for known in names)
            raise BundleError(
                f"{model.name} has the {kind} {found}, but its signature says {', '.join(wanted)}",
                fix="build the bundle again: the model and the manifest do not belong together",
            )
    return OpenVinoSession(loaded, signature, loaded.get_property("NUM_STREAMS"))  # no more than cores


def settings(precision: str, threads: int, streams: int = 1) -> dict[str, Any]:
    """Of the CPU plug-in, for one call at a time, whose samples `streams` share."""
    hint = "LATENCY" if streams == 1 else "THROUGHPUT"
    return {"PERFORMANCE_HINT": hint, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}


def kept() -> dict[str, str]:
    """Where compiled models are kept: DEPLOYCC_CACHE/openvino. Raises BundleError where that cannot be written."""
    root = os.environ.get(CACHE)
    if not root:
        return {}
    folder = Path(root) / "openvino"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(
            f"{CACHE} is {root}, where no folder can be made: {error.strerror}", fix=f"set {CACHE} to a folder that can be written"
        ) from None
    return {"CACHE_DIR": str(folder)}


def _first(message: str) -> str:
    """The line of its message that says what is wrong: the ones before it name source files."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith(("Exception from", "Check '"))), "no reason given")


class OpenVinoSession:
    """One loaded model, with a request for each stream."""

    def __init__(self, loaded: Any, signature: Signature, streams: int = 1) -> None:
        self.signature = signature
        self._requests: list[Any] = [loaded.create_infer_request() for _ in range(streams)]
        self._outputs = [(spec.name, loaded.output(spec.name)) for spec in signature.outputs]
        self._check = FeedsCheck(signature)

    def run(self, feeds: Feeds) -> Outputs:
        """One call. Raises SignatureError."""
        self._check(feeds)
        if not self._requests:
            raise BundleError("this session is closed", fix="open the bundle again")
        whole = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        samples = next(iter(whole.values())).shape[0] if len(self._requests) > 1 else 1
        if samples == 1:
            found = self._requests[0].infer(whole, share_inputs=True)
            return {name: found[port] for name, port in self._outputs}
        return self._divided(whole, samples)

    def _divided(self, feeds: Feeds, samples: int) -> Outputs:
        """The answers of streams that have a part of the samples each."""
        used = min(samples, len(self._requests))
        bounds = [samples * place // used for place in range(used + 1)]
        parts = [{name: array[low:high] for name, array in feeds.items()} for low, high in pairwise(bounds)]
        working = list(zip(self._requests, parts, strict=False))
        for request, part in working:
            request.start_async(part, share_inputs=True)
        for request, _ in working:
            request.wait()
        return {name: np.concatenate([request.get_tensor(port).data for request, _ in working]) for name, port in self._outputs}

    def synchronize(self) -> None:
        """Nothing is pending: `run` returns when the answer is there."""

    def __enter__(self) -> OpenVinoSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the model, so that its memory goes."""
        self._requests, self._outputs = [], []
