"""The same graph, said in one way: no dead code, no trace of the machine that made it, every node and value with a name of its own.

Exporters write stack traces with the user's paths, and names from counters. Names here come from what the user knows: the module tree
(`layer1.0.conv1`, `layer1.0/Add`); a graph that came as .onnx keeps the names it has.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from deploycc.forms._macs import is_heavy
from deploycc.forms.onnx import graphs

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCER = "deploycc"
SCOPES = "pkg.torch.onnx.name_scopes"  # the dynamo exporter's list of module paths, the ATen operator last
COUNTED = re.compile(r"val_\d+|onnx::\w+|\w*lifted\w*|\d+|_?\w*constant\w*|.*_folded(_\d+)?")  # initializers that exporters number


def tidy(model: ir.Model) -> None:
    """Remove dead code and descriptions, and give a name to whatever has none or shares one. In place."""
    _remove_dead(model)
    _describe_nothing(model)
    complete_names(model)


def name_by_module(model: ir.Model) -> None:
    """Name nodes after the modules they come from, values after their nodes, numbered weights after their first reader. In place.

    Reads what the exporter wrote, so it comes before `tidy`. Inputs and outputs keep their names.
    """
    kept = {value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)}
    taken = kept | {name for graph in model.graphs() for name in graph.initializers if not COUNTED.fullmatch(name)}
    labels: set[str] = set()
    for node in _nodes(model):
        node.name = _unused(_label(node), labels)
    for graph in model.graphs():
        for name in [name for name in graph.initializers if COUNTED.fullmatch(name) and name not in kept]:
            graph.initializers[name].name = f"\0{name}"  # out of the way, so that the new names cannot meet the old ones
    for node in _nodes(model):
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and (value.name or "").startswith("\0"):
                part = {1: "weight", 2: "bias"}.get(index, f"const{index}") if is_heavy(node.op_type) else f"const{index}"
                value.name = _unused(f"{node.name}.{part}", taken)
        for index, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = _unused(f"{node.name}_out{index or ''}", taken)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in graphs(model):
        yield from graph


def _label(node: ir.Node) -> str:
    weight = node.inputs[1].name if is_heavy(node.op_type) and len(node.inputs) > 1 and node.inputs[1] is not None else None
    if weight and weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    if SCOPES not in node.metadata_props:
        return (node.name or node.op_type).strip("/")
    scopes = ast.literal_eval(node.metadata_props[SCOPES])
    paths = [scope for scope in scopes[:-1] if scope]
    return f"{paths[-1]}/{node.op_type}" if paths else node.op_type


def _unused(wanted: str, taken: set[str]) -> str:
    """`wanted`, or with the first free number behind it; then it is taken."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def _remove_dead(model: ir.Model) -> None:
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.OutputFixPass()(model)


def _describe_nothing(model: ir.Model) -> None:
    model.producer_name, model.producer_version, model.doc_string, model.domain, model.model_version = PRODUCER, None, None, None, None
    model.metadata_props.clear()
    for graph in graphs(model):
        graph.doc_string = None
        graph.metadata_props.clear()
        initializers = getattr(graph, "initializers", {})  # a function has none
        for value in (*graph.inputs, *initializers.values()):
            _describe_value(value)
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                _describe_value(value)
    model.graph.name = "main"


def _describe_value(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()


def complete_names(model: ir.Model) -> None:
    """Fill in missing names, and make shared ones different; those that are there and unique stay. In place."""
    taken = {value.name or "" for graph in graphs(model) for value in (*graph.inputs, *graph.outputs)}
    taken |= {name for graph in model.graphs() for name in graph.initializers}
    labels: set[str] = set()
    for node in _nodes(model):
        node.name = _unused(node.name or node.op_type, labels)
    for node in _nodes(model):
        for index, value in enumerate(node.outputs):
            if value.name == "" or (value.name and value.is_graph_output()):  # "" is an optional output that is left out
                continue
            if value.name is None or value.name in taken:
                value.name = _unused(f"{node.name}_out{index or ''}", taken)
            taken.add(value.name)
