"""Folding affine modules into the convolution or linear layer before them, in an nn.Module.

torch.export gives the data flow without a user's code having to be symbolically traceable. A module is absorbed when all that it computes
is a per-channel affine map of one linear layer's output, which nothing else reads: BatchNorm, torchvision's FrozenBatchNorm2d, a learned
scale … Its parameters are evaluated in float64 along the captured graph; the module becomes nn.Identity.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.errors import NothingToDo
from deploycc.passes._affine import IDENTITY, Affine, batch_norm, fold, per_channel, step

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

LINEAR_OPERATORS = re.compile(r"aten\.(conv[123]d|linear|conv_transpose[123]d)\b")


@dataclass(frozen=True, slots=True)
class Folding:
    """One layer and the modules whose map goes into it."""

    layer: str
    absorbed: tuple[str, ...]
    affine: Affine


def plan(module: torch.nn.Module, tensors: tuple[torch.Tensor, ...]) -> tuple[list[Folding], list[str]]:
    """What can be folded, and (module, reason) for each batch normalization that cannot. Raises NothingToDo when torch.export fails."""
    import torch

    from deploycc.passes._exporters import quiet, reason

    try:
        with quiet():
            program = torch.export.export(module, tensors, strict=False)
    except Exception as error:
        raise NothingToDo(
            f"the data flow of {type(module).__name__} is not known, because torch.export fails: {reason(error)}",
            fix="leave fold-batchnorm out (the ONNX exporter folds too), or rewrite the line that is named",
        ) from error
    return _Planner(module, program).plan()


def rewrite(module: torch.nn.Module, foldings: list[Folding]) -> torch.nn.Module:
    """A copy with every folding done."""
    import torch

    result = copy.deepcopy(module)
    for folding in foldings:
        layer = result.get_submodule(folding.layer)
        transposed = isinstance(layer, torch.nn.ConvTranspose1d | torch.nn.ConvTranspose2d | torch.nn.ConvTranspose3d)
        old, bias = layer.get_parameter("weight"), layer._parameters["bias"]
        weight, shift = fold(
            old.detach().double().numpy(),
            None if bias is None else bias.detach().double().numpy(),
            folding.affine,
            axis=1 if transposed else 0,
            groups=int(getattr(layer, "groups", 1)) if transposed else 1,
        )
        # New parameters, not new values in the old ones: another layer may share them.
        layer.weight = torch.nn.Parameter(torch.from_numpy(weight).to(old.dtype), requires_grad=old.requires_grad)
        layer.bias = torch.nn.Parameter(torch.from_numpy(shift).to(old.dtype), requires_grad=old.requires_grad)
        for path in folding.absorbed:
            _replace(result, result.get_submodule(path), torch.nn.Identity())
    return result


def _replace(root: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Under every name that it has."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


class _Planner:
    """Walks the captured graph once."""

    def __init__(self, module: torch.nn.Module, program: ExportedProgram) -> None:
        signature = program.graph_signature
        self.module = module
        self.nodes: list[Node] = list(program.graph.nodes)
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self.values = {**program.state_dict, **program.constants}
        self.inside: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node.op == "call_function":
                self.inside.setdefault(_path(node), []).append(node)
        self.calls = Counter(_path(node) for node in self.nodes if self._layer(node) is not None)

    def plan(self) -> tuple[list[Folding], list[str]]:
        foldings: list[Folding] = []
        for node in self.nodes:
            if self._layer(node) is None or self.calls[_path(node)] != 1:
                continue
            absorbed, affine = self._follow(node)
            if absorbed:
                foldings.append(Folding(_path(node), absorbed, affine))
        done = {path for folding in foldings for path in folding.absorbed}
        return foldings, [self._obstacle(node) for node in self.nodes if _is_batch_norm(node) and _path(node) not in done]

    def _layer(self, node: Node) -> torch.nn.Module | None:
        """The Conv or Linear module that a node is the call of, if it uses that module's own weight and bias as they are."""
        if node.op != "call_function" or not LINEAR_OPERATORS.match(str(node.target)):
            return None
        layer = self._module(_path(node))
        if layer is None or not isinstance(layer, _layers()):
            return None
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        if "weight" not in layer._parameters or "bias" not in layer._parameters:  # computed by a parametrization
            return None
        own_bias = layer._parameters["bias"] is None if bias is None else self._parameter(bias) is layer._parameters["bias"]
        return layer if own_bias and self._parameter(weight) is layer._parameters["weight"] else None

    def _module(self, path: str) -> torch.nn.Module | None:
        try:
            return self.module.get_submodule(path)
        except AttributeError:  # a path that only the exporter knows
            return None

    def _parameter(self, node: Any) -> torch.nn.Parameter | None:
        name = self.names.get(getattr(node, "name", ""))
        try:
            return self.module.get_parameter(name) if name else None
        except AttributeError:  # a buffer
            return None

    def _follow(self, node: Node) -> tuple[tuple[str, ...], Affine]:
        """The modules after a layer that are affine, one after the other, and their map."""
        absorbed: list[str] = []
        affine, value = IDENTITY, node
        while len(value.users) == 1:
            path = _path(next(iter(value.users)))
            if path == _path(node) or path in absorbed or self._module(path) in (None, self.module):
                break
            found = self._evaluate(self.inside.get(path, []), value, _channel_axis(node))
            if found is None or not found[1].is_finite:
                break
            value, affine = found[0], affine.then(found[1])
            absorbed.append(path)
        return tuple(absorbed), affine

    def _evaluate(self, nodes: list[Node], given: Node, axis: int) -> tuple[Node, Affine] | None:
        """What the nodes of one module make of `given`: their last value and its map; None when they are not an affine map of it."""
        shape = given.meta["val"].shape
        known: dict[Node, Any] = {given: IDENTITY}
        for node in nodes:
            args = [self._constant(item, known) for item in node.args]
            if node.kwargs or any(item is None and other is not None for item, other in zip(args, node.args, strict=True)):
                return None
            value = _apply(node, args, len(shape), axis, shape[axis])
            if value is None:
                return None
            known[node] = value
        made = [node for node in nodes if isinstance(known[node], Affine)]
        if not made or any(user not in known for node in nodes for user in node.users if node is not made[-1]):
            return None
        return made[-1], known[made[-1]]

    def _constant(self, item: Any, known: dict[Node, Any]) -> Any:
        """An argument as a float64 array, a map, or itself; None when it depends on anything else."""
        import torch

        if isinstance(item, list | tuple) and any(isinstance(part, torch.fx.Node) for part in item):
            return None
        if not isinstance(item, torch.fx.Node):
            return item
        if item in known:
            return known[item]
        value = self.values.get(self.names.get(item.name, ""))
        if not isinstance(value, torch.Tensor):
            return None
        return (value.detach().to(torch.float64, copy=True) if value.is_floating_point() else value.detach().clone()).numpy()

    def _obstacle(self, node: Node) -> str:
        source = node.args[0]
        layer = self._layer(source)  # pyright: ignore[reportArgumentType]  (the input of a batch norm is a node)
        if layer is None:
            why = "it does not follow a convolution or linear layer"
        elif self.calls[_path(source)] != 1:  # pyright: ignore[reportArgumentType]
            why = "the layer before it is called more than once"
        elif len(source.users) != 1:  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            why = "something else reads its input too"
        else:
            why = "it is not a module's whole computation, or its statistics are not finite"
        return f"batch normalization in '{_path(node) or type(self.module).__name__}' stays: {why}"


def _path(node: Node) -> str:
    """Path of the innermost module that made a node; '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0]).split("@")[0]


def _layers() -> tuple[type, ...]:
    from torch import nn

    return (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def _is_batch_norm(node: Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("aten.batch_norm")


def _channel_axis(node: Node) -> int:
    """Of a layer's output: the last axis of a linear one, the second of a batched convolution."""
    rank = len(node.meta["val"].shape)
    return rank - 1 if "linear" in str(node.target) else rank - node.args[1].meta["val"].dim() + 1  # pyright: ignore


def _evaluated(operator: Any, args: list[Any]) -> np.ndarray | None:
    """An operator on constants; None when it does not work in float64 or gives no tensor."""
    import torch

    tensors = [torch.from_numpy(item) if isinstance(item, np.ndarray) else item for item in args]
    try:
        result = operator(*tensors)
    except Exception:  # noqa: BLE001  then it is no arithmetic on parameters, and nothing is folded through it
        return None
    return result.numpy() if isinstance(result, torch.Tensor) else None


def _apply(node: Node, args: list[Any], rank: int, axis: int, channels: int) -> Any:
    """One operator on constants or on a map; None when the result would not be a per-channel affine map."""
    if not any(isinstance(item, Affine) for item in args):
        return _evaluated(node.target, args)
    operator = str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
    if operator == "batch_norm":
        given, gamma, beta, mean, variance, training, _, eps, *_ = args
        if not isinstance(given, Affine) or axis != 1 or training or mean is None or variance is None:
            return None
        return given.then(batch_norm(gamma, beta, mean, variance, eps))
    if operator == "rsub":  # number − tensor
        operator, args = "sub", args[::-1]
    if operator not in ("add", "sub", "mul", "div") or len(args) != 2:
        return None
    left, right = args
    if isinstance(left, Affine) and isinstance(right, Affine):
        return None
    swapped = isinstance(right, Affine)
    given, other = (right, left) if swapped else (left, right)
    values = per_channel(np.asarray(other, np.float64), rank, axis, channels)
    found = None if values is None else step(operator, values, swapped=swapped)
    return None if found is None else given.then(found)
