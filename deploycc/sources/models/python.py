"""A model that the user's own code makes: `file.py:factory` or `package.module:factory`.

The factory returns an nn.Module, or (module, example) with a tensor, a tuple of tensors or a dict from parameter of `forward` to
tensor. Input shapes come from --input, else the example, else the module's `example_input`, else the transform's size. The transform
is the module's `transform`, else the file's `TRANSFORM`: a deploycc Transform, its dict, or torchvision's `weights.transforms()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from deploycc.core.artifact import Artifact, Form, TensorSpec
from deploycc.core.contract import ModelRequest
from deploycc.core.registry import MODELS, suggest
from deploycc.errors import DataError, SourceError
from deploycc.runtime.audio import AnyTransform
from deploycc.runtime.audio import declared as transform_of
from deploycc.sources._factory import make, names_factory
from deploycc.sources.models._capture import DEFAULT_INPUT, capture, made_by, override_shapes
from deploycc.sources.models._preset import from_preset, is_preset
from deploycc.sources.models._weights import load_state, read_state, seeded

if TYPE_CHECKING:
    import torch


class PythonModel:
    """A module made by a function of the user's."""

    name: ClassVar[str] = "python"
    syntax: ClassVar[str] = "file.py:factory or package.module:factory"
    gives: ClassVar = Form.MODULE

    def matches(self, text: str) -> bool:
        """A Python file or a module, a colon and a name; not another source's prefix."""
        return names_factory(text, MODELS.names())

    def load(self, request: ModelRequest) -> Artifact:
        """Call the factory and capture what it makes. Raises SourceError, with the user's exception as its cause."""
        if request.random_weights:
            raise SourceError(
                f"--random-weights cannot be used with {request.text}: the factory makes its own weights", fix="leave --random-weights out"
            )
        with seeded(request.seed):
            made = make(request.text, SourceError)
        return self.capture(made.value, made.module, request)

    def capture(self, value: Any, file: ModuleType | None, request: ModelRequest) -> Artifact:
        """What a factory made (or a module given in Python) as an artifact; `file` may hold TRANSFORM. Raises SourceError."""
        module, example = _parted(value, request.text)
        if request.weights:
            load_state(module, read_state(request.weights), str(request.weights))
        transform = _transform(module, file, request.text)
        inputs = _inputs(module, example, transform, request)
        return capture(module.cpu(), inputs, source=request.text, transform=transform)


def _parted(value: Any, text: str) -> tuple[torch.nn.Module, Any]:
    """The module, and the example or None."""
    import torch

    if isinstance(value, torch.nn.Module):
        return value, None
    if isinstance(value, tuple):
        pair = cast("tuple[Any, ...]", value)
        if len(pair) == 2 and isinstance(pair[0], torch.nn.Module):
            return pair[0], pair[1]
    raise SourceError(
        f"{text} returned a {type(value).__name__}, not a torch.nn.Module", fix="return the module, or (module, example input)"
    )


def _transform(module: torch.nn.Module, file: ModuleType | None, text: str) -> AnyTransform | None:
    declared = getattr(module, "transform", None)
    if declared is None or (callable(declared) and not is_preset(declared)):  # a layer or method of that name declares nothing
        declared = getattr(file, "TRANSFORM", None)
    if declared is None or isinstance(declared, AnyTransform):
        return declared
    try:
        if is_preset(declared):
            return from_preset(declared)
        if isinstance(declared, Mapping):
            return transform_of(cast("Mapping[str, Any]", declared))
    except DataError as error:
        raise SourceError(f"{text}: {error.what}", fix=error.fix) from error
    raise SourceError(
        f"{text}: its transform is a {type(declared).__name__}",
        fix="declare a Transform or AudioTransform of deploycc.runtime, a dict of its fields, or torchvision's weights.transforms()",
    )


def _inputs(module: torch.nn.Module, example: Any, transform: AnyTransform | None, request: ModelRequest) -> tuple[TensorSpec, ...]:
    example = getattr(module, "example_input", None) if example is None else example
    if example is not None:
        known = _specs_of(example, module, request.text)
    elif made := made_by(transform):
        known = (made,)
    else:
        known = tuple(TensorSpec(name, "float32", shape) for name, shape in request.inputs.items())
        known = _in_order(known, module, request.text)
    if not known:
        raise SourceError(
            f"nothing says which inputs {request.text} takes",
            fix="give them with --input NAME:SHAPE (--input input:1x3x224x224), or return (module, example) from the factory",
        )
    if len(known) == 1 and len(request.inputs) == 1:  # one input: its name is the user's to choose
        known = (TensorSpec(next(iter(request.inputs)), known[0].dtype, known[0].shape),)
    return override_shapes(known, request.inputs)


def _specs_of(example: Any, module: torch.nn.Module, text: str) -> tuple[TensorSpec, ...]:
    if isinstance(example, Mapping):
        arrays = cast("Mapping[str, Any]", example)
        return _in_order(tuple(_spec(str(name), value, text) for name, value in arrays.items()), module, text)
    if not isinstance(example, tuple | list):
        return (_spec(DEFAULT_INPUT, example, text),)
    items = cast("tuple[Any, ...]", example)
    if len(items) == 1:
        return (_spec(DEFAULT_INPUT, items[0], text),)
    names = [*_parameters(module), *(f"{DEFAULT_INPUT}_{index}" for index in range(len(items)))]
    return tuple(_spec(name, value, text) for name, value in zip(names, items, strict=False))


def _spec(name: str, value: Any, text: str) -> TensorSpec:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise SourceError(
            f"{text}: the example for input '{name}' is a {type(value).__name__}, not a tensor",
            fix="give a tensor, a tuple of tensors, or a dict from parameter name to tensor",
        )
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(int(dim) for dim in value.shape))


def _in_order(specs: tuple[TensorSpec, ...], module: torch.nn.Module, text: str) -> tuple[TensorSpec, ...]:
    """Several named inputs in the order in which `forward` takes them, which is how they will be passed."""
    parameters = _parameters(module)
    if len(specs) < 2 or not parameters:
        return specs
    for spec in specs:
        if spec.name not in parameters:
            raise SourceError(
                f"{text}: forward() has no parameter '{spec.name}'", fix=suggest(spec.name, parameters, listing="its signature")
            )
    ordered = tuple(sorted(specs, key=lambda spec: parameters.index(spec.name)))
    if [spec.name for spec in ordered] != parameters[: len(ordered)]:
        raise SourceError(
            f"{text}: forward() takes {', '.join(parameters)}, but only {', '.join(spec.name for spec in ordered)} are given",
            fix="give an input for every parameter before the last one given",
        )
    return ordered


def _parameters(module: torch.nn.Module) -> list[str]:
    """Names of `forward`'s positional parameters; empty when it takes *args or cannot be looked into."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return []
    return [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
