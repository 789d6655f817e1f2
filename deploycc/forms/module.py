"""A torch.nn.Module in eval mode: hashed by weights, structure and source, run eagerly."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Feeds, ModelStats, Outputs, Signature, TensorSpec
from deploycc.errors import SourceError, StoreError

if TYPE_CHECKING:
    import torch

ARCHITECTURE, WEIGHTS = "architecture.json", "weights.safetensors"
DYNAMIC_EXAMPLE = 2  # size given to a named axis when an example is needed: 0 and 1 are special-cased by exporters
EXAMPLE_SIZES = (DYNAMIC_EXAMPLE, 8, 32, 64, 224)  # tried in turn for named axes other than the first: a picture of 2 × 2 is too small


class ModuleForm:
    """torch.nn.Module."""

    name: ClassVar[str] = "module"

    def digest(self, model: torch.nn.Module) -> str:
        """SHA-256 over weights, module tree with its plain attributes, and the source files of its classes."""
        digest = hashlib.sha256()
        for key, value in _state(model).items():
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
        return ModelStats(bytes=sum(part.nbytes for part in weights), parameters=sum(part.size for part in weights), macs=_macs(artifact))

    def storable(self, artifact: Artifact) -> bool:
        """When its edits tell how the architecture is made of what the source makes. Other passes are repeated on resume."""
        return artifact.edits is not None

    def save(self, artifact: Artifact, folder: Path) -> None:
        """Write architecture.json (source, edits) and weights.safetensors. Raises StoreError when it is not storable."""
        if artifact.edits is None:
            raise StoreError("this nn.Module cannot be stored without pickle", fix="export it first (export-onnx)")
        from safetensors.torch import save_file

        facts = {"source": artifact.source, "edits": list(artifact.edits), "sparse": list(artifact.sparse)}
        (folder / ARCHITECTURE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
        save_file({key: value.detach().clone().contiguous() for key, value in artifact.model.state_dict().items()}, folder / WEIGHTS)

    def load(self, folder: Path, base: Artifact) -> torch.nn.Module:
        """The module anew: a copy of `base` (same source, an earlier state), the edits it lacks, the weights. Raises StoreError."""
        from safetensors.torch import load_file

        from deploycc.forms._edits import apply_edits

        edits = json.loads((folder / ARCHITECTURE).read_text(encoding="utf-8"))["edits"]
        known = list(base.edits or ())
        if edits[: len(known)] != json.loads(json.dumps(known)):
            raise StoreError(f"{folder} does not continue from {base.source}", fix="start from the model that it was made of")
        module = apply_edits(copy.deepcopy(base.model), edits[len(known) :])
        try:
            module.load_state_dict(load_file(folder / WEIGHTS), strict=True)
        except RuntimeError as error:
            raise StoreError(
                f"the weights in {folder} do not fit {base.source}: {str(error).splitlines()[-1].strip()}",
                fix="the model's code changed: use the code it was compiled from",
            ) from error
        return module.eval()

    def open(self, artifact: Artifact, *, threads: int) -> ModuleSession:
        """Eager PyTorch."""
        return ModuleSession(artifact.model, artifact.signature, threads)

    def operators(self, model: torch.nn.Module) -> list[str]:
        """Class names of the leaves."""
        return [type(module).__name__ for module in model.modules() if not list(module.children())]

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

        from deploycc.runtime.sessions.torchscript import using_engine

        self.signature.check(feeds)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        engine = getattr(self._module, "quantized_engine", None)  # of a quantized one
        with using_engine(engine), torch.inference_mode():  # on copies: a module may work in place on its input
            result = self._module(*(torch.from_numpy(feeds[spec.name].copy()) for spec in self.signature.inputs))
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

    if isinstance(result, Mapping) and all(isinstance(value, torch.Tensor) for value in result.values()):
        named = [(str(key), value) for key, value in result.items()]
    else:
        leaves = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
        named = [(f"output_{index}" if len(leaves) > 1 else "output", leaf) for index, leaf in enumerate(leaves)]
    if not named or not all(isinstance(leaf, torch.Tensor) for _, leaf in named):
        kinds = ", ".join(sorted({type(leaf).__name__ for _, leaf in named})) or "nothing"
        raise SourceError(f"the model returns {kinds}, not tensors", fix="wrap it in a module whose forward returns tensors")
    for name, leaf in named:
        if leaf.dtype is torch.bfloat16 or leaf.is_quantized:
            raise SourceError(
                f"the model's output '{name}' is {str(leaf.dtype).removeprefix('torch.')}, which numpy cannot hold",
                fix="convert the model with .float(), or return .float() or .dequantize() of that tensor",
            )
    return named


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

    A named input axis is found in the outputs by running it at two sizes. Raises SourceError, with the model's own error as its cause.
    """
    sizes = example_sizes(module, inputs)
    base = _run(module, inputs, sizes)
    shapes: dict[str, list[int | str]] = {name: list(value.shape) for name, value in base}
    for axis_name, size in sizes.items():
        for name, value in _run(module, inputs, {**sizes, axis_name: size + 1}):
            if value.dim() != len(shapes[name]):
                raise SourceError(
                    f"output '{name}' has {len(shapes[name])} axes when {axis_name} is {size}, and {value.dim()} when it is {size + 1}",
                    fix="give that axis a fixed size with --input NAME:SHAPE",
                )
            for axis, now in enumerate(value.shape):
                if now == size + 1 and shapes[name][axis] == size:
                    shapes[name][axis] = axis_name
                elif isinstance(shapes[name][axis], int) and now != shapes[name][axis]:
                    shapes[name][axis] = f"{name}_{axis}"
    outputs = tuple(TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(shapes[name])) for name, value in base)
    return Signature(inputs, outputs)


def example_sizes(module: torch.nn.Module, inputs: tuple[TensorSpec, ...]) -> dict[str, int]:
    """A size for every named axis with which `module` runs: 2 for a leading one, the smallest of EXAMPLE_SIZES for the others.

    Raises SourceError when it runs with none of them.
    """
    leading = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)}
    names = list(dict.fromkeys(dim for spec in inputs for dim in spec.shape if isinstance(dim, str)))
    if not set(names) - leading:
        return dict.fromkeys(names, DYNAMIC_EXAMPLE)
    for size in EXAMPLE_SIZES:
        sizes = {name: DYNAMIC_EXAMPLE if name in leading else size for name in names}
        try:
            _run(module, inputs, sizes)
        except SourceError:
            if size == EXAMPLE_SIZES[-1]:
                raise
            continue
        break
    return sizes  # pyright: ignore[reportPossiblyUnboundVariable]  (EXAMPLE_SIZES is not empty)


def _run(module: torch.nn.Module, inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]) -> list[tuple[str, torch.Tensor]]:
    import torch

    try:
        with torch.inference_mode():
            return named_outputs(module(*example_tensors(Signature(inputs, ()), sizes)))
    except SourceError:
        raise
    except Exception as cause:
        tried = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise SourceError(
            f"the model does not run on {', '.join(map(str, inputs))}{f' with {tried}' if tried else ''}: {type(cause).__name__}: {cause}",
            fix="give the right shape with --input NAME:SHAPE",
        ) from cause


def _state(model: torch.nn.Module) -> dict[str, Any]:
    """The state dict, and the buffers that are left out of it (persistent=False)."""
    return {**model.state_dict(), **dict(model.named_buffers())}


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
        value = value.contiguous().cpu()
        try:
            yield value.numpy()
        except TypeError:  # bfloat16 and the 8-bit floats: their bits
            yield value.view({1: torch.uint8, 2: torch.int16}[value.itemsize]).numpy()
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
    """For one call with every leading named axis at 1."""
    from deploycc.forms._torch_macs import operator_macs

    leading = {str(spec.shape[0]): 1 for spec in artifact.signature.inputs if spec.shape}
    try:
        sizes = {**example_sizes(artifact.model, artifact.signature.inputs), **leading}
    except SourceError:
        return None
    operators = operator_macs(artifact.model, example_tensors(artifact.signature, sizes))
    return sum(item.macs for item in operators) if operators else None
