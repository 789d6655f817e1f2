"""The edit "resize": {"layers": {module path: {"attributes": {name: value}, "tensors": {name: shape}}}}."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploycc.errors import StoreError

if TYPE_CHECKING:
    import torch
    from torch import nn


def between(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """What differs in plain attributes and tensor shapes. Raises ValueError when the trees differ in more."""
    old, new = dict(before.named_modules()), dict(after.named_modules())
    if list(old) != list(new):
        raise ValueError(f"the modules differ: {', '.join(sorted(set(old) ^ set(new))[:3]) or 'their order'}")
    layers: dict[str, Any] = {}
    for path, module in new.items():
        if type(module) is not type(old[path]):
            raise ValueError(f"'{path}' was a {type(old[path]).__name__} and is a {type(module).__name__}")
        attributes = {key: value for key, value in _plain(module).items() if _plain(old[path]).get(key) != value}
        shapes = _shapes(old[path])
        tensors = {name: shape for name, shape in _shapes(module).items() if shapes.get(name) != shape}
        if attributes or tensors:
            layers[path] = {"attributes": attributes, "tensors": tensors}
    return {"kind": "resize", "layers": layers}


def apply(module: nn.Module, edit: Any) -> nn.Module:
    """Set the attributes and make tensors of the new shapes, in place. Raises StoreError for a path that the module lacks."""
    for path, change in edit["layers"].items():
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            raise StoreError(
                f"the model has no module '{path}', which was resized", fix="the model's code changed: use the code it was compiled from"
            ) from None
        for name, value in change["attributes"].items():
            setattr(layer, name, tuple(value) if isinstance(value, list) else value)
        for name, shape in change["tensors"].items():
            _set_tensor(layer, name, shape)
    return module


def _set_tensor(layer: nn.Module, name: str, shape: list[int]) -> None:
    import torch

    old = getattr(layer, name, None)
    if not isinstance(old, torch.Tensor):
        raise StoreError(
            f"{type(layer).__name__} has no tensor '{name}', which was resized", fix="use the code that the model was compiled from"
        )
    fresh = torch.zeros(shape, dtype=old.dtype)
    if isinstance(old, torch.nn.Parameter):
        fresh = torch.nn.Parameter(fresh, requires_grad=old.requires_grad)
    setattr(layer, name, fresh)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that JSON can hold, tuples as lists."""
    found: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key == "training":
            continue
        if isinstance(value, bool | int | float | str):
            found[key] = value
        elif isinstance(value, tuple | list) and all(isinstance(item, bool | int | float | str) for item in value):
            found[key] = list(value)
    return found


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    """Shapes of the module's own parameters and buffers."""
    own: list[tuple[str, torch.Tensor]] = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: list(tensor.shape) for name, tensor in own}
