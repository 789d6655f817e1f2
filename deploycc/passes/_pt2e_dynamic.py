"""Q and DQ of a linear layer whose activations are quantized at run time, row by row, as XNNPACK's partitioner knows them.

torchao's PT2E would put one scale for the whole tensor into the program, where XNNPACK computes one per row: the program would not say what
the device answers.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from deploycc.forms.module import example_tensors
from deploycc.passes._exporters import quiet
from deploycc.passes._pt2e import HIGH, LOW, MOST, attribute, drop_unused
from deploycc.passes._pt2e_placement import LINEAR, layer_name
from deploycc.passes._rounding import quantized_weight
from deploycc.runtime.signature import Signature

importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
decomposed: Any = torch.ops.quantized_decomposed


def quantize_linear(graph: fx.GraphModule, skip: Collection[str], *, per_channel: bool) -> list[str]:
    """Rewrite linear layers with constant weights, in place, but for those called `skip`; returns the names of the others."""
    weights: dict[fx.Node, fx.Node] = {}
    done: list[str] = []
    for node in list(graph.graph.nodes):
        if node.target is not LINEAR or layer_name(node) in skip or node.args[1].op != "get_attr":
            continue
        weight = node.args[1]
        if weight not in weights:
            weights[weight] = _quantized_weight(graph, weight, f"_integers_{len(weights)}", per_channel=per_channel)
        done.append(layer_name(node))
        node.args = (_quantized_rows(graph, node), weights[weight], *node.args[2:])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return done


def _quantized_rows(graph: fx.GraphModule, reader: fx.Node) -> fx.Node:
    """Q and DQ before `reader`, with a scale for every row; for it alone, as XNNPACK's partitioner wants it."""
    call = graph.graph.call_function
    x = reader.args[0]
    with graph.graph.inserting_before(reader):
        chosen = call(decomposed.choose_qparams_per_token_asymmetric.default, (x, torch.int8))
        scale, zero = (call(operator.getitem, (chosen, place)) for place in range(2))
        codes = call(decomposed.quantize_per_token.default, (x, scale, zero, LOW, HIGH, torch.int8))
        return call(decomposed.dequantize_per_token.default, (codes, scale, zero, LOW, HIGH, torch.int8, torch.float32))


def _quantized_weight(graph: fx.GraphModule, weight: fx.Node, name: str, *, per_channel: bool) -> fx.Node:
    """The weight as integers, and DQ behind them."""
    values = attribute(graph, weight).numpy()
    rounded, scales = quantized_weight(values, MOST, per_channel=per_channel, pair_limit=None, keep_sums=False)
    each = np.broadcast_to(scales, len(values)).astype(np.float32)
    codes = np.rint(rounded / each[:, None]).astype(np.int8)
    parts = {"": codes, "_scale": each, "_zero": np.zeros(len(values), np.int64)}
    for key, array in parts.items():
        graph.register_buffer(name + key, torch.from_numpy(array.copy()))
    with graph.graph.inserting_before(weight.next):
        found = [graph.graph.get_attr(name + key) for key in parts]
        return graph.graph.call_function(decomposed.dequantize_per_channel.default, (*found, 0, -MOST, MOST, torch.int8))


def exported(graph: fx.GraphModule, signature: Signature) -> ExportedProgram:
    """The rewritten graph as a program, without the float weights that nothing reads any more."""
    with quiet():
        drop_unused(graph)
        return torch.export.export(graph, tuple(example_tensors(signature)))
