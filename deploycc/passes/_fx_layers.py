"""What FX quantization needs to know of, and rewritten in, a float graph before it inserts observers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from deploycc.errors import PreconditionError
from deploycc.passes import _engines, _fx

if TYPE_CHECKING:
    from torch import fx


def output_layers(graph: fx.GraphModule) -> set[str]:
    """Names of the linear layers whose result is an output of the model and nothing else."""
    from torch import nn

    return {
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_module"
        and isinstance(graph.get_submodule(str(node.target)), nn.Linear)
        and all(user.op == "output" for user in node.users)
    }


def weighted_modules(graph: fx.GraphModule) -> Iterator[tuple[str, Any, _engines.Convolution | None]]:
    """(name, module, its geometry when it is a convolution) of everything that FX can lower with integer weights."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    called = _fx.calls(graph)
    for name, module in graph.named_modules():
        if name not in called:
            continue
        if isinstance(module, _ConvNd) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            transposed = isinstance(module, _ConvTransposeNd)
            geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
            yield name, module, _engines.Convolution(module.in_channels, module.out_channels, module.groups, *geometry, transposed)
        elif isinstance(module, nn.Linear):
            yield name, module, None


def part_shared(graph: fx.GraphModule) -> None:
    """Give every call of a layer a layer of its own: FX would give them one output scale, the first call's."""
    seen: set[str] = set()
    for node in list(graph.graph.nodes):
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if layer is None or not list(layer.parameters(recurse=False)):
            continue
        if node.target in seen:
            node.target = _fx.add_module(graph, f"{node.target}_again", copy.deepcopy(layer))
        seen.add(str(node.target))
    graph.recompile()


def require_folded(graph: fx.GraphModule) -> None:
    """Weight scales are chosen here, so batch normalization must be in the weights already. Raises PreconditionError."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), _BatchNorm):
            continue
        source = node.args[0]
        if source.op == "call_module" and isinstance(graph.get_submodule(str(source.target)), nn.modules.conv._ConvNd | nn.Linear):
            raise PreconditionError(
                f"batch normalization '{node.target}' after '{source.target}' is not folded into its weights",
                fix="put 'fold-batchnorm' before the pass that quantizes",
            )


def float_layers(graph: fx.GraphModule, engine: str) -> dict[str, str]:
    """The convolutions for which `engine` has no fast and right integer kernel, and why."""
    reasons = {name: _engines.float_reason(engine, conv) for name, _, conv in weighted_modules(graph) if conv is not None}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def clips_to_relu(graph: fx.GraphModule, spared: Collection[str]) -> dict[str, float]:
    """Replace clips to [0, c] right after a layer that will saturate by itself by ReLU; returns c by that layer's name.

    The layers named in `spared` stay in float and keep their clip.
    """
    from torch import nn

    called = _fx.calls(graph)
    ceilings: dict[str, float] = {}
    for node in list(graph.graph.nodes):
        ceiling = _ceiling(graph, node)
        source = node.args[0] if ceiling is not None else None
        if ceiling is None or source is None or source.op != "call_module" or called[str(source.target)] != 1 or len(source.users) != 1:
            continue
        layer = graph.get_submodule(str(source.target))
        if source.target not in spared and isinstance(
            layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
        ):  # FX fuses no ReLU into a transposed convolution
            node.args, node.kwargs = (source,), {}
            _fx.replace_node(graph, node, nn.ReLU(), f"{source.target}_relu")
            ceilings[str(source.target)] = ceiling
    graph.recompile()
    return ceilings


def _ceiling(graph: fx.GraphModule, node: fx.Node) -> float | None:
    """c, when `node` computes min(max(x, 0), c)."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return float(module.max_val) if isinstance(module, nn.Hardtanh) and module.min_val == 0 else None
    if node.op == "call_function" and node.target is F.relu6:
        return 6.0
    clamp = node.target in (torch.clamp, torch.clip, F.hardtanh) if node.op == "call_function" else node.target in ("clamp", "clip")
    if node.op not in ("call_function", "call_method") or not clamp:
        return None
    names = ("input", "min_val", "max_val") if node.target is F.hardtanh else ("input", "min", "max")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    low, high = given.get(names[1]), given.get(names[2])
    return float(high) if low == 0 and isinstance(high, int | float) and high > 0 else None
