"""A torch.nn.Module in eval mode: hashed by weights, structure and source, run eagerly."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Feeds, ModelStats, Outputs, Signature, TensorSpec
from deploycc.errors import SourceError, StoreError

if TYPE_CHECKING:
    import torch

DYNAMIC_EXAMPLE = 2  # size given to a named axis when an example is needed: 0 and 1 are special-cased by exporters


class ModuleForm:
    """torch.nn.Module."""

    name: ClassVar[str] = "module"

    def digest(self, model: torch.nn.Module) -> str:
        """SHA-256 over weights, module tree with its plain attributes, and the source files of its classes."""
        digest = hashlib.sha256()
        for key, value in model.state_dict().items():
            digest.update(key.encode())
            for part in _tensors(value):
                digest.update(f"{part.dtype}{part.shape}".encode())
                digest.update(part.tobytes())
        for path, module in model.named_modules():
            facts = {key: value for key, value in vars(module).items() if _plain(value)}
            digest.update(f"{path}:{type(module).__qualname__}:{sorted(facts.items(), key=lambda item: item[0])}".encode())
        for source in sorted(_sources(model)):
            digest.update(source.encode())
        return digest.hexdigest()

    def stats(self, artifact: Artifact) -> ModelStats:
        """Bytes and count of the weights; MACs counted by running once (torch's own operator formulas, halved)."""
        weights = [part for value in artifact.model.state_dict().values() for part in _tensors(value)]
        return ModelStats(
            bytes=sum(part.nbytes for part in weights), parameters=sum(part.size for part in weights), macs=_macs(artifact)
        )

    def storable(self, model: torch.nn.Module) -> bool:
        """Never: a module's structure only unpickles. Passes on modules are repeated when a compile resumes."""
        return False

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Refused, see `storable`."""
        raise StoreError("an nn.Module cannot be stored without pickle", fix="export it first (export-onnx)")

    def load(self, folder: Path) -> torch.nn.Module:
        """Refused, see `storable`."""
        raise StoreError("an nn.Module cannot be stored without pickle", fix="export it first (export-onnx)")

    def open(self, artifact: Artifact, *, threads: int) -> ModuleSession:
        """Eager PyTorch."""
        return ModuleSession(artifact.model, artifact.signature, threads)

    def describe(self, model: torch.nn.Module) -> str:
        """The module tree, and the code of a traced one."""
        code = getattr(model, "code", "")
        return f"{model}\n{code}\n"


class ModuleSession:
    """Eager calls, inputs in the signature's order."""

    def __init__(self, module: torch.nn.Module, signature: Signature, threads: int) -> None:
        self.signature = signature
        self._module = module
        self._threads = threads

    def run(self, feeds: Feeds) -> Outputs:
        """One eager call. Raises SignatureError."""
        import torch

        self.signature.check(feeds)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            result = self._module(*(torch.from_numpy(feeds[spec.name]) for spec in self.signature.inputs))
        return {name: value.numpy() for name, value in named_outputs(result)}

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def __enter__(self) -> ModuleSession:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def named_outputs(result: Any) -> list[tuple[str, torch.Tensor]]:
    """Tensors in what a forward returned: "output" for a single one, keys of a mapping, else "output_0", … Raises SourceError."""
    import torch
    from torch.utils import _pytree as pytree

    if isinstance(result, torch.Tensor):
        return [("output", result)]
    if isinstance(result, Mapping) and all(isinstance(value, torch.Tensor) for value in result.values()):
        return [(str(key), value) for key, value in result.items()]
    leaves = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
        raise SourceError(f"the model returns {kinds}, not tensors", fix="wrap it in a module whose forward returns tensors")
    return [(f"output_{index}" if len(leaves) > 1 else "output", leaf) for index, leaf in enumerate(leaves)]


def example_feeds(signature: Signature, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Random feeds that fit `signature`: normal floats, zeros for whole numbers; named axes take `sizes`, else 2."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for spec in signature.inputs:
        shape = [dim if isinstance(dim, int) else (sizes or {}).get(dim, DYNAMIC_EXAMPLE) for dim in spec.shape]
        kind = np.dtype(spec.dtype)
        feeds[spec.name] = rng.standard_normal(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
    return feeds


def example_tensors(signature: Signature, sizes: Mapping[str, int] | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """`example_feeds` as tensors in the signature's order."""
    import torch

    feeds = example_feeds(signature, sizes, seed)
    return tuple(torch.from_numpy(feeds[spec.name]) for spec in signature.inputs)


def capture_signature(module: torch.nn.Module, inputs: tuple[TensorSpec, ...]) -> Signature:
    """Run `module` on random input of those specs and read its outputs.

    A named input axis is found in the outputs by running two sizes. Raises SourceError, with the model's own error as its cause.
    """
    import torch

    partial = Signature(inputs, ())

    def shapes(size: int) -> list[tuple[str, torch.Tensor]]:
        names = {dim: size for spec in inputs for dim in spec.shape if isinstance(dim, str)}
        try:
            with torch.inference_mode():
                return named_outputs(module(*example_tensors(partial, names)))
        except SourceError:
            raise
        except Exception as cause:
            listed = ", ".join(map(str, inputs))
            raise SourceError(
                f"the model does not run on {listed}: {type(cause).__name__}: {cause}", fix="give the right shape with --input NAME:SHAPE"
            ) from cause

    first = shapes(DYNAMIC_EXAMPLE)
    dynamic = [dim for spec in inputs for dim in spec.shape if isinstance(dim, str)]
    second = shapes(DYNAMIC_EXAMPLE + 1) if dynamic else first
    outputs: list[TensorSpec] = []
    for (name, small), (_, large) in zip(first, second, strict=True):
        shape = tuple(a if a == b else (dynamic[0] if len(set(dynamic)) == 1 else f"{name}_{axis}") for axis, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)))
        outputs.append(TensorSpec(name, str(small.dtype).removeprefix("torch."), shape))
    return Signature(inputs, tuple(outputs))


def _tensors(value: Any) -> Iterator[np.ndarray]:
    """The arrays in an entry of a state dict: quantized tensors as integers with scales, packed parameters unpacked."""
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.is_quantized:
            yield value.int_repr().numpy()
            per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
            yield value.q_per_channel_scales().numpy() if per_channel else np.array(value.q_scale())
            return
        yield value.view(torch.int16).numpy() if value.dtype is torch.bfloat16 else value.contiguous().numpy()
    elif isinstance(value, torch.ScriptObject) and hasattr(value, "__getstate__"):
        yield from _tensors(value.__getstate__())
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, bool | int | float):
        yield np.array(value)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _sources(model: torch.nn.Module) -> set[str]:
    """Code of the classes in the tree: the whole file for the user's, the module's name for an installed package's."""
    found = {getattr(model, "code", "")}
    for module in model.modules():
        try:
            path = Path(inspect.getfile(type(module)))
        except (TypeError, OSError):
            continue
        installed = "site-packages" in path.parts or not path.is_file()
        found.add(type(module).__module__ if installed else path.read_text(encoding="utf-8", errors="replace"))
    return found


def _macs(artifact: Artifact) -> int | None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            artifact.model(*example_tensors(artifact.signature))
    except Exception:  # noqa: BLE001  a model that cannot run under the counter has no count; that is not an error
        return None
    return counter.get_total_flops() // 2 or None
