"""A .pte file on the CPU, through ExecuTorch's Python binding: XNNPACK's kernels, and ExecuTorch's own for what XNNPACK does not have.

The binding is loaded without the package that builds .pte files, which takes seconds to import. It passes torch tensors, so that it needs
the PyTorch it was built with; a device without PyTorch uses a C++ runner on the same file.

XNNPACK's threads are one pool per process, and a loaded program holds on to the pool of its time. A session that finds another number of
threads makes the pool anew and counts; one whose program is of an older pool loads it again before it runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.errors import BundleError, MismatchError
from deploycc.runtime.signature import Feeds, FeedsCheck, Outputs, Signature

BINDING = "executorch.extension.pybindings._C"
METHOD = "forward"
TYPES = {
    "float32": 6, "float64": 7, "float16": 5, "int64": 4, "int32": 3, "int16": 2, "int8": 1, "uint8": 0, "bool": 11,
}  # fmt: skip  # numpy's names → ExecuTorch's ScalarType
_pool = {"made": 0}  # how often this process has made the pool of threads anew


def version() -> str | None:
    """Version of the installed executorch, or None; imports nothing."""
    try:
        return importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        return None


def open(model: Path, signature: Signature, runtime: Mapping[str, str], threads: int) -> ExecuTorchSession:
    """Load a .pte file.

    Raises:
        MismatchError: executorch or its PyTorch is not installed, or the two do not belong together.
        BundleError: ExecuTorch cannot load the file, or its inputs and outputs are not those of `signature`.
    """
    return ExecuTorchSession(_binding(model, runtime), model, signature, threads)


def _binding(model: Path, runtime: Mapping[str, str]) -> Any:
    try:
        importlib.import_module("torch")  # which loads the libraries that the binding is linked to
        with _hushed():
            binding: Any = importlib.import_module(BINDING)
            binding._threadpool_get_thread_count()  # looks at the CPU, once, and tells
            return binding
    except ImportError as error:
        wanted = runtime.get("minimum") or runtime.get("version") or "1.5"
        raise MismatchError(
            f"{model.name} needs ExecuTorch {wanted} and the PyTorch it was built with, and they do not import here: {error}",
            fix=f"pip install --no-deps 'executorch>={wanted}' beside that PyTorch, or use the C++ runner, which needs neither",
        ) from error


class ExecuTorchSession:
    """One loaded program."""

    def __init__(self, binding: Any, model: Path, signature: Signature, threads: int) -> None:
        self.signature = signature
        self._torch: Any = importlib.import_module("torch")
        self._binding = binding
        self._model = model
        self._threads = threads
        self._made = -1
        self._program: Any = None
        self._method: Any = None
        self._closed = False
        self._inputs = [spec.name for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]
        self._check = FeedsCheck(signature)
        self._ready()
        self._compare(self._method.method_meta())

    def run(self, feeds: Feeds) -> Outputs:
        """One call. Raises SignatureError."""
        self._check(feeds)
        if self._closed:
            raise BundleError("this session is closed", fix="open the bundle again")
        self._ready()
        found = self._method([self._torch.from_numpy(_plain(feeds[name])) for name in self._inputs])
        return dict(zip(self._outputs, (value.numpy() for value in found), strict=True))

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def __enter__(self) -> ExecuTorchSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the program, so that its memory goes."""
        self._closed = True
        self._method = self._program = None

    def _ready(self) -> None:
        """This session's number of threads, and a program that uses them."""
        binding = self._binding
        if binding._threadpool_get_thread_count() != self._threads:
            with _hushed():
                binding._unsafe_reset_threadpool(self._threads)
            _pool["made"] += 1
        if self._made == _pool["made"]:
            return
        self._method = self._program = None
        with _hushed() as said:
            try:
                self._program = binding._load_program(str(self._model), False, 0, binding.Verification.InternalConsistency, None)
                self._method = self._program.load_method(METHOD)
            except RuntimeError as error:
                raise BundleError(
                    f"ExecuTorch {version()} cannot load {self._model.name}: {said() or str(error)}",
                    fix="build the bundle again: the file is damaged, or of a newer ExecuTorch",
                ) from error
        self._made = _pool["made"]

    def _compare(self, meta: Any) -> None:
        """The file's inputs and outputs against the signature. Raises BundleError."""
        for kind, specs, count, tensor in (
            ("input", self.signature.inputs, meta.num_inputs(), meta.input_tensor_meta),
            ("output", self.signature.outputs, meta.num_outputs(), meta.output_tensor_meta),
        ):
            found = [(tensor(index).dtype(), tuple(tensor(index).sizes())) for index in range(count)]
            wanted = [(TYPES.get(spec.dtype), spec.shape) for spec in specs]
            if found != wanted:
                shapes = ", ".join(str(list(shape)) for _, shape in found)
                raise BundleError(
                    f"{self._model.name} has {kind}s of shape {shapes}, but its signature says {', '.join(map(str, specs))}",
                    fix="build the bundle again: the model and the manifest do not belong together",
                )


def _plain(array: np.ndarray) -> np.ndarray:
    """In a row and writable, as torch takes them; a copy only where it is not."""
    return array if array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")


@contextmanager
def _hushed() -> Generator[Callable[[], str]]:
    """Take what ExecuTorch's C++ writes to stderr; gives a function that returns its last line, without the place in the source."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def said() -> str:
            file.seek(0)
            lines = file.read().decode(errors="replace").strip().splitlines()
            return lines[-1].rpartition("] ")[2] if lines else ""

        try:
            os.dup2(file.fileno(), 2)
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
