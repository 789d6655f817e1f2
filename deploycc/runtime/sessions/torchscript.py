"""TorchScript on the CPU, with PyTorch's own integer engines (FBGEMM, QNNPACK).

Packed weights are unpacked and packed again for whatever engine is set when the file is loaded, and some operators look at the engine
when they run. So the session sets the engine the file was built for, both times, and refuses where PyTorch does not have it.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploycc.errors import BundleError, MismatchError
from deploycc.runtime.signature import Feeds, FeedsCheck, Outputs, Signature


def version() -> str | None:
    """Version of the installed torch, or None; imports nothing."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def using_engine(name: str | None) -> Generator[None]:
    """Run the block with `torch.backends.quantized.engine` = `name` (None: whatever it is), and put the old one back.

    Raises:
        MismatchError: this PyTorch does not have that engine on this CPU.
    """
    torch: Any = _torch({})
    before: str = torch.backends.quantized.engine
    _set_engine(torch, name)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def open(model: Path, signature: Signature, runtime: Mapping[str, str], threads: int) -> TorchScriptSession:
    """Load a TorchScript file.

    Args:
        model: what the fbgemm or qnnpack backend wrote.
        signature: names and order of inputs and outputs.
        runtime: `engine` to load and run with; `optimize` = "load": repack float weights for this CPU while loading.
        threads: of one call.

    Raises:
        MismatchError: torch is not installed, or does not have the engine on this CPU; names both.
        BundleError: torch cannot load the file.
    """
    torch: Any = _torch(runtime)
    engine = runtime.get("engine")
    with using_engine(engine), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
        _hear_out(torch)
        try:
            loaded = torch.jit.load(str(model), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            first = str(error).strip().partition("\n")[0]
            raise BundleError(
                f"PyTorch {torch.__version__} cannot load {model.name}: {first}",
                fix=f"it was made with PyTorch {runtime.get('version', 'of another version')}: build it again, or install that version",
            ) from error
        if runtime.get("optimize") == "load":
            loaded = torch.jit.optimize_for_inference(loaded)
    return TorchScriptSession(loaded, signature, engine, threads)


def _torch(runtime: Mapping[str, str]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MismatchError(
            f"the model needs PyTorch, which does not import here: {error}",
            fix=f"pip install 'torch>={runtime.get('minimum') or runtime.get('version') or '2.11'}'",
        ) from error
    return torch


def _hear_out(torch: Any) -> None:
    """PyTorch warns once per process that quantized tensors will go, in the middle of the first call that makes one: let it be here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*quantized tensor creation functions.*")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def _set_engine(torch: Any, name: str | None) -> None:
    if name is None or torch.backends.quantized.engine == name:
        return
    supported: list[str] = torch.backends.quantized.supported_engines
    if name not in supported:
        raise MismatchError(
            f"the model was built for PyTorch's engine '{name}', but this PyTorch has {', '.join(supported)} on this CPU",
            fix="build it for a target of this machine (`deploycc targets`), or run it on one that has the engine",
        )
    torch.backends.quantized.engine = name


class TorchScriptSession:
    """One loaded model. Sets its engine and threads for every call, since other sessions of the process may have changed them."""

    def __init__(self, loaded: Any, signature: Signature, engine: str | None, threads: int) -> None:
        self.signature = signature
        self._loaded = loaded
        self._engine = engine
        self._threads = threads
        self._torch: Any = _torch({})
        self._inputs = [spec.name for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]
        self._check = FeedsCheck(signature)

    def run(self, feeds: Feeds) -> Outputs:
        """One call. Raises SignatureError."""
        self._check(feeds)
        torch = self._torch
        if torch.backends.quantized.engine != self._engine:
            _set_engine(torch, self._engine)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():  # on copies: a model may work in place on its input
            found = self._loaded(*(torch.from_numpy(feeds[name].copy()) for name in self._inputs))
        return dict(zip(self._outputs, (value.numpy() for value in _flat(found)), strict=True))

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def __enter__(self) -> TorchScriptSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the model, so that its memory goes."""
        self._loaded = _closed


def _flat(found: Any) -> list[Any]:
    """The tensors of a tensor, or of nested tuples, lists and dictionaries, in order."""
    if isinstance(found, dict):
        found = list(found.values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(found, tuple | list):
        items: list[Any] = list(found)  # pyright: ignore[reportUnknownArgumentType]
        return [leaf for item in items for leaf in _flat(item)]
    return [] if found is None else [found]


def _closed(*_: object) -> Any:
    raise BundleError("this session is closed", fix="open the bundle again")
