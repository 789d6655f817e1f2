"""An ONNX graph as a torch module: every node computed with autograd, so that the very graph that ships can be trained.

The nodes run in the graph's order, one torch function per operator (`_onnx_torch_ops`, `_onnx_torch_shapes`, `_onnx_torch_layers`;
opsets 13 to 24, https://onnx.ai/onnx/operators). A node can be replaced by a module, which is called with the node's inputs: fake
quantization, or learned rounding, in place of QuantizeLinear and DequantizeLinear.

Exported graphs often have a batch of one written into them. Many rows at once then go, in order of preference,

    direct   as one batch, the first entry of constant shapes (Reshape, Expand) taken for the batch
    vmap     through torch.func.vmap, each row a batch of one
    rows     one call each

`Batched` takes the first that gives the rows' own results, found once on real input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from deploycc.errors import UnsupportedError

Operator = Callable[["Call"], Any]
BATCH_TOLERANCE = 1e-3  # of max |output|: sums in another order, and what a step of fake quantization makes of them
BATCH_SHAPES = ("Reshape", "Expand", "ConstantOfShape")


@dataclass(frozen=True, slots=True)
class Call:
    """One node on its way: its inputs as tensors (None where optional and absent), its attributes as Python values."""

    inputs: Sequence[torch.Tensor | None]
    attributes: Mapping[str, Any]
    opset: int
    where: str
    outputs: int = 1
    device: Any = None

    def __getitem__(self, index: int) -> torch.Tensor:
        """A required input."""
        value = self.inputs[index]
        if value is None:
            raise UnsupportedError(f"{self.where} has no input {index}", fix="check the model with onnx.checker")
        return value

    def get(self, index: int) -> torch.Tensor | None:
        """An optional input."""
        return self.inputs[index] if index < len(self.inputs) else None

    def ints(self, index: int) -> list[int] | None:
        """An optional input of whole numbers: axes, a shape, pads."""
        value = self.get(index)
        return None if value is None else [int(item) for item in value.reshape(-1).tolist()]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> UnsupportedError:
        """The error that says what of this operator cannot be computed here."""
        return UnsupportedError(f"{self.where} {what}, which deploycc cannot train through", fix="export the model without it")


def operators() -> dict[str, Operator]:
    """Operator type → function."""
    from deploycc.passes import _onnx_torch_layers, _onnx_torch_ops, _onnx_torch_shapes

    return {**_onnx_torch_ops.OPERATORS, **_onnx_torch_shapes.OPERATORS, **_onnx_torch_layers.OPERATORS}


@dataclass(frozen=True, slots=True)
class Step:
    """One node, ready to run: names of its inputs and outputs, and its function or the name of the module in its place."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    run: Operator | None
    batch_shape: bool  # its shape is a constant that starts with the batch
    last_use: tuple[str, ...]
    where: str


class OnnxModule(nn.Module):
    """Computes an ONNX graph. Inputs in the graph's order (initializers among them left out); gives a tuple of outputs.

    Args:
        model: the graph; not kept.
        replacements: modules by the name of the node they stand for.
        batch: the batch written into the graph; a call with another one takes constant shapes that start with it for the batch.
            None: the graph takes any.

    Raises:
        UnsupportedError: an operator without a function here, naming it and its node.
    """

    def __init__(self, model: ir.Model, replacements: Mapping[str, nn.Module] | None = None, *, batch: int | None = None) -> None:
        super().__init__()
        self.opset = model.opset_imports.get("", 0)
        self.batch = batch
        self.replacements = nn.ModuleDict({_key(name): module for name, module in (replacements or {}).items()})
        graph = model.graph
        self.inputs = tuple(value.name or "" for value in graph.inputs if value.name not in graph.initializers)
        self.outputs = tuple(value.name or "" for value in graph.outputs)
        self.steps = _steps(graph, frozenset(replacements or {}), batch)
        used = {name for step in self.steps for name in step.inputs} | set(self.outputs)
        for name, value in graph.initializers.items():
            if name in used and value.const_value is not None:
                self.register_buffer(_key(name), as_tensor(value.const_value.numpy()), persistent=False)
        self.constants = {name: _key(name) for name in graph.initializers if name in used}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every output, in order."""
        values: dict[str, Any] = {name: getattr(self, key) for name, key in self.constants.items()}
        values |= dict(zip(self.inputs, inputs, strict=True))
        values[""] = None
        size = inputs[0].shape[0] if self.batch is not None and inputs and inputs[0].dim() else None
        device = inputs[0].device if inputs else None
        for step in self.steps:
            found = self._run(step, [values[name] for name in step.inputs], size, device)
            for name, value in zip(step.outputs, found if isinstance(found, tuple | list) else (found,), strict=False):
                values[name] = value
            for name in step.last_use:
                del values[name]
        return tuple(values[name] for name in self.outputs)

    def side_by_side(self, calls: Sequence[Sequence[torch.Tensor]]) -> Iterator[tuple[str, list[Any]]]:
        """Compute every node over all calls before the next one; gives each output's name and its tensor of every call.

        The caller may change those tensors in place: what comes after reads them. Memory is that of all calls' living tensors.
        """
        constants: dict[str, Any] = {name: getattr(self, key) for name, key in self.constants.items()} | {"": None}
        values = [constants | dict(zip(self.inputs, call, strict=True)) for call in calls]
        for step in self.steps:
            for call in values:
                found = self._run(step, [call[name] for name in step.inputs], None, None)
                call |= dict(zip(step.outputs, found if isinstance(found, tuple | list) else (found,), strict=False))
                for name in step.last_use:  # before the next call, so that inputs of all calls never lie beside outputs of all
                    if name not in step.outputs:
                        del call[name]
            for name in step.outputs:
                yield name, [call.get(name) for call in values]
            for name in set(step.outputs).intersection(step.last_use):
                for call in values:
                    del call[name]

    def between(self, given: Mapping[str, torch.Tensor], wanted: str) -> torch.Tensor:
        """One tensor, computed from `given` ones and constants alone."""
        values: dict[str, Any] = {name: getattr(self, key) for name, key in self.constants.items()} | {"": None} | dict(given)
        missing, needed = {wanted} - set(values), list[Step]()
        for step in reversed(self.steps):  # no recursive closure: it would keep every tensor until the collector comes
            if not missing.isdisjoint(step.outputs):
                needed.append(step)
                missing = missing.difference(step.outputs).union(name for name in step.inputs if name not in values)
        for step in reversed(needed):
            found = self._run(step, [values[name] for name in step.inputs], None, None)
            values |= dict(zip(step.outputs, found if isinstance(found, tuple | list) else (found,), strict=False))
        return values[wanted]

    def _run(self, step: Step, inputs: list[Any], size: int | None, device: Any) -> Any:
        if step.run is None:
            return self.replacements[_key(step.name)](*inputs)
        if step.batch_shape and size is not None and size != self.batch:
            place = min(len(inputs) - 1, 1)
            inputs[place] = torch.cat([torch.full_like(inputs[place][:1], size), inputs[place][1:]])
        return step.run(Call(inputs, step.attributes, self.opset, step.where, len(step.outputs), device))


def _steps(graph: ir.Graph, replaced: frozenset[str], batch: int | None) -> list[Step]:
    known = operators()
    kept = {value.name for value in graph.outputs} | set(graph.initializers) | {value.name for value in graph.inputs}
    last: dict[str, int] = {}
    for index, node in enumerate(graph):
        last |= {value.name or "": index for value in (*node.inputs, *node.outputs) if value is not None and value.name not in kept}
    steps: list[Step] = []
    for index, node in enumerate(graph):
        where = f"{node.op_type} '{node.name or (node.outputs[0].name if node.outputs else '')}'"
        stands_in = node.name in replaced
        if not stands_in and (node.domain not in ("", "ai.onnx") or node.op_type not in known):
            kind = f"{node.domain}.{node.op_type}".lstrip(".")
            raise UnsupportedError(
                f"deploycc cannot train through operator {kind} (node '{node.name}')",
                fix="leave the training pass out for this model, or export it without that operator",
            )
        names = tuple((value.name or "") if value is not None else "" for value in node.inputs)
        steps.append(
            Step(
                node.name or "",
                names,
                tuple(value.name or "" for value in node.outputs),
                {} if stands_in else {key: _plain(attribute) for key, attribute in node.attributes.items()},
                None if stands_in else known[node.op_type],
                batch is not None and _starts_with_batch(node, batch),
                tuple(name for name, place in last.items() if place == index and name),
                where,
            )
        )
    return steps


def _starts_with_batch(node: ir.Node, batch: int) -> bool:
    """Whether a node makes a shape from a constant whose first entry is the batch."""
    if node.op_type not in BATCH_SHAPES:
        return False
    shape = node.inputs[0 if node.op_type == "ConstantOfShape" else 1]
    if shape is None or shape.const_value is None:
        return False
    entries = shape.const_value.numpy().reshape(-1)
    return len(entries) > 1 and int(entries[0]) == batch


def _plain(attribute: Any) -> Any:
    value = attribute.value
    if hasattr(value, "numpy"):
        return as_tensor(value.numpy())
    return list(value) if isinstance(value, tuple) else value


def _key(name: str) -> str:
    """A name torch accepts: no dots, none of Module's own attributes."""
    return "v_" + name.replace(".", "·")


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A copy of an array; types torch lacks become wider ones."""
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "int4": np.int8, "uint4": np.uint8}
    array = np.asarray(array)
    return torch.from_numpy(np.array(array.astype(wider.get(array.dtype.name, array.dtype))))


class Batched(nn.Module):
    """Any number of rows through a module whose graph may have a batch of one written into it.

    Attributes:
        how: "direct", "vmap" or "rows", found by `choose`.
    """

    def __init__(self, body: OnnxModule) -> None:
        super().__init__()
        self.body = body
        self.how: Literal["direct", "vmap", "rows"] = "direct"

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs for all rows; the first axis of every input and output is the batch."""
        if self.how == "direct" or inputs[0].shape[0] == self.body.batch:
            return self.body(*inputs)
        size, rows = self.body.batch or 1, inputs[0].shape[0]
        filled = tuple(torch.cat([value, value[-1:].expand(-rows % size, *value.shape[1:])]) for value in inputs)
        groups = tuple(value.unflatten(0, (-1, size)) for value in filled)
        if self.how == "vmap":
            found = torch.func.vmap(self.body)(*groups)
        else:
            each = [self.body(*group) for group in zip(*groups, strict=True)]
            found = tuple(torch.stack(items) for items in zip(*each, strict=True))
        return tuple(value.flatten(0, 1)[:rows] for value in found)

    @torch.no_grad()
    def choose(self, *inputs: torch.Tensor) -> str:
        """Find `how` from two calls' worth of real rows. Raises what the graph raises when even one call fails."""
        size = self.body.batch
        if size is None:
            return self.how
        each = [self.body(*(value[start : start + size] for value in inputs)) for start in range(0, inputs[0].shape[0], size)]
        wanted = tuple(torch.cat(items) for items in zip(*each, strict=True))
        for how in ("direct", "vmap"):
            self.how = how
            try:
                found = self(*inputs)
            except (RuntimeError, ValueError, IndexError):
                continue
            if all(map(_same, found, wanted)):
                return how
        self.how = "rows"
        return self.how


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to rounding: fake quantization turns a last bit into a step, so a few values may be further off."""
    if found.shape != wanted.shape:
        return False
    reach = float(wanted.abs().max()) or 1.0
    return bool((found - wanted).double().pow(2).mean().sqrt() <= BATCH_TOLERANCE * reach * 10)
