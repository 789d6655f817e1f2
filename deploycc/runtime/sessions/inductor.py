"""A package that AOTInductor compiled (model.pt2): machine code for x86 CPUs, run by PyTorch.

It is loaded as torch._inductor.aoti_load_package does, without importing the compiler, which would look for g++ to find out what this
CPU can do. The code runs without checks of its own, so that what it needs is checked here: the CPU's flags, the release of PyTorch
(whose oneDNN must read packed weights), names, types and shapes.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.errors import BundleError, MismatchError
from deploycc.runtime.machine import cpu_flags, cpu_model
from deploycc.runtime.signature import Feeds, FeedsCheck, Outputs, Signature


def version() -> str | None:
    """Version of the installed torch, or None; imports nothing."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def open(model: Path, signature: Signature, runtime: Mapping[str, str], threads: int) -> InductorSession:
    """Load a package; runtime["flags"] is what its code needs, runtime["version"] the PyTorch that it was compiled with.

    runtime["threads"] is how many its weights are packed for: with another number it answers the same, and oneDNN may put them in another
    order at every call, which a warning tells.

    Raises:
        MismatchError: torch is not installed or of another release, or this CPU lacks a flag (the code would crash, or crawl).
        BundleError: torch cannot load the file, or its inputs and outputs are not those of `signature`.
    """
    if missing := [flag for flag in runtime.get("flags", "").split() if flag not in cpu_flags()]:
        raise MismatchError(
            f"{model.name} is machine code for CPUs with {runtime['flags']}; {cpu_model()} lacks {', '.join(missing)}",
            fix="compile for a target that this CPU fits (`deploycc targets`), or run it on such a CPU",
        )
    built = runtime.get("version", "")
    release = ".".join(built.split(".")[:2])
    try:
        import torch as imported
    except ImportError as error:
        raise MismatchError(
            f"{model.name} needs PyTorch, which does not import here: {error}", fix=f"pip install 'torch=={release}.*'"
        ) from error
    torch: Any = imported
    if torch.__version__.split(".")[:2] != built.split(".")[:2]:
        raise MismatchError(
            f"{model.name} was compiled with PyTorch {built}, and this is {torch.__version__}",
            fix=f"pip install 'torch=={release}.*', or compile it again with this PyTorch",
        )
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(model), "model", True, 1, -1)  # one call at a time, one copy, on the CPU
        facts: dict[str, str] = loader.get_metadata()
    except (RuntimeError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"PyTorch {torch.__version__} cannot load {model.name}: {first}", fix="build it again: the file is damaged"
        ) from error
    for kind, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        wanted = ",".join(spec.name for spec in specs)
        if facts.get(kind) != wanted:
            raise BundleError(
                f"{model.name} has the {kind} {facts.get(kind)}, but its signature says {wanted}",
                fix="build the bundle again: the model and the manifest do not belong together",
            )
    if (packed := runtime.get("threads", str(threads))) != str(threads):
        warnings.warn(
            f"{model.name} is packed for {packed} thread(s) and runs with {threads}: the answers are the same, but it may be many times "
            f"slower; compile it with --threads {threads}",
            stacklevel=2,
        )
    return InductorSession(torch, loader, signature, threads)


class InductorSession:
    """One loaded package. Sets its threads for every call, since other sessions of the process may have changed them."""

    def __init__(self, torch: Any, loader: Any, signature: Signature, threads: int) -> None:
        self.signature = signature
        self._torch = torch
        self._loader = loader
        self._threads = threads
        self._check = FeedsCheck(signature)

    def run(self, feeds: Feeds) -> Outputs:
        """One call. Raises SignatureError."""
        self._check(feeds)
        if self._loader is None:
            raise BundleError("this session is closed", fix="open the bundle again")
        torch = self._torch
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        arrays = [_plain(feeds[spec.name]) for spec in self.signature.inputs]
        with torch.inference_mode():
            found = [value.numpy() for value in self._loader.run([torch.from_numpy(array) for array in arrays])]
        kept = (_apart(value, arrays) for value in found)
        return dict(zip((spec.name for spec in self.signature.outputs), kept, strict=True))

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def __enter__(self) -> InductorSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the model, so that its memory goes."""
        self._loader = None


def _plain(array: np.ndarray) -> np.ndarray:
    """In a row, which the code takes for granted, and writable, as torch has no other tensors; a copy only where it is not."""
    return array if array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")


def _apart(value: np.ndarray, arrays: list[np.ndarray]) -> np.ndarray:
    """An answer in memory of its own: an input that is passed on unchanged is copied."""
    return value.copy() if any(np.may_share_memory(value, array) for array in arrays) else value
