"""ONNX Runtime the way a device runs a bundle: all graph optimizations, one stream, explicit threads; on the CPU, or on an NVIDIA GPU.

On a GPU every operator must be the CUDA provider's: ONNX Runtime gives what it lacks to the CPU, and copies to and fro in every call,
without a word. Here that is an error. Float32 is float32: TF32, with 10 bits of mantissa, is off.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploycc.errors import BundleError, MismatchError
from deploycc.runtime.signature import Feeds, FeedsCheck, Outputs, Signature

# What ONNX Runtime says to a model that is newer than itself: (what is too new, pattern of model's and runtime's value).
TOO_NEW = (
    ("ONNX IR version", re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")),
    ("ONNX opset", re.compile(r"Opset (\d+) is under development.*?is till opset (\d+)", re.DOTALL)),
)


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OPTIONS = {"CPUExecutionProvider": {}, "CUDAExecutionProvider": {"use_tf32": "0"}}
GPU_INSTALL = "pip uninstall onnxruntime; pip install onnxruntime-gpu"


def providers() -> tuple[str, ...]:
    """Execution providers of the installed ONNX Runtime; none where it is not installed."""
    try:
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return ()
    ort: Any = onnxruntime
    return tuple(ort.get_available_providers())


def version() -> str | None:
    """Version of the installed onnxruntime, or None; imports nothing."""
    for package in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def open(model: Path, signature: Signature, runtime: Mapping[str, str], threads: int) -> OrtSession:
    """Load an .onnx file; weights stored beside it are found.

    Raises:
        MismatchError: ONNX Runtime is not installed, is too old for the file (names both versions), or lacks the manifest's provider.
        BundleError: ONNX Runtime cannot load the file, or the file's inputs and outputs are not those of `signature`.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise MismatchError(
            f"{model.name} needs onnxruntime, which does not import here: {error}",
            fix=f"pip install 'onnxruntime>={runtime.get('minimum') or runtime.get('version') or '1.30'}'",
        ) from error
    ort: Any = onnxruntime  # its stubs leave most arguments untyped
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    wanted = PROVIDERS.get(runtime.get("provider", "cpu"), "")
    if wanted not in ort.get_available_providers():
        raise MismatchError(
            f"{model.name} is for the provider '{runtime.get('provider')}', which ONNX Runtime {ort.__version__} does not have here",
            fix=runtime.get("install") or GPU_INSTALL,
        )
    if wanted != PROVIDERS["cpu"]:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        loaded = ort.InferenceSession(str(model), options, providers=[(wanted, OPTIONS[wanted])])
    except Exception as error:
        raise _explained(model, str(error), str(ort.__version__), runtime) from error
    if wanted not in loaded.get_providers():  # a provider that cannot load its libraries is left out, and only logged
        raise MismatchError(
            f"{model.name} would run on {', '.join(loaded.get_providers())}: {wanted} does not start here",
            fix="install the CUDA and cuDNN that this onnxruntime-gpu asks for (its log says which library is missing)",
        )
    for kind, specs, found in (
        ("inputs", signature.inputs, loaded.get_inputs()),
        ("outputs", signature.outputs, loaded.get_outputs()),
    ):
        wanted, names = [spec.name for spec in specs], [item.name for item in found]
        if sorted(wanted) != sorted(names):
            raise BundleError(
                f"{model.name} has the {kind} {', '.join(names)}, but its signature says {', '.join(wanted)}",
                fix="build the bundle again: the model and the manifest do not belong together",
            )
    return OrtSession(loaded, signature)


def _explained(model: Path, message: str, installed: str, runtime: Mapping[str, str]) -> BundleError:
    for what, pattern in TOO_NEW:
        if found := pattern.search(message):
            wanted = runtime.get("minimum") or runtime.get("version")
            newer = f"pip install 'onnxruntime>={wanted}'" if wanted else "install a newer onnxruntime"
            return MismatchError(f"{model.name} has {what} {found[1]}, but ONNX Runtime {installed} reads at most {found[2]}", fix=newer)
    first = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", message.strip().split("\n", 1)[0])
    return BundleError(
        f"ONNX Runtime {installed} cannot load {model.name}: {first}",
        fix="check that the file is a whole ONNX model; `deploycc inspect` lists its operators",
    )


class OrtSession:
    """One loaded model."""

    def __init__(self, loaded: Any, signature: Signature) -> None:
        self.signature = signature
        self._run = loaded.run
        self._outputs = [spec.name for spec in signature.outputs]
        self._check = FeedsCheck(signature)

    def run(self, feeds: Feeds) -> Outputs:
        """One call. Raises SignatureError."""
        self._check(feeds)
        return dict(zip(self._outputs, self._run(self._outputs, feeds), strict=True))

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the model, so that its memory goes."""
        self._run = _closed


def _closed(*_: object) -> Any:
    raise BundleError("this session is closed", fix="open the bundle again")
