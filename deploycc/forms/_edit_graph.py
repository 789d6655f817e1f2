"""The edit "graph": a module rebuilt from its exported graph, with the constants of the graph and the sizes of the tensors changed.

    {"kind": "graph", "inputs": [[shape, dtype], …], "dynamic": true, "rewrites": [[node, {argument: value}], …],
     "layers": {module path: {attribute: value}}, "tensors": {name: shape}}

`value` is JSON, or {"symbol": argument index, "times": n, "over": d} inside a shape for a size that grows with the batch. Exporting is
deterministic, so that the names of nodes are the same each time. Layers of torch.nn that cover one operator stay modules under their
own names: keys of the state dict stay, and batch normalization and dropout still have a train mode. Regions (a disabled autocast, no_grad),
which the exporter keeps as graphs inside the graph, are put in line.
Source: torch.export, non-strict, training IR (https://docs.pytorch.org/docs/stable/export.html).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

REGIONS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}  # where their body is among the arguments


def capture(module: nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[fx.GraphModule, bool]:
    """The exported graph of `module` in eval mode, and whether its batch axis is dynamic. Raises what the exporter raises."""
    import torch

    batch = tuple({0: torch.export.Dim.AUTO} for _ in example)
    with torch.enable_grad():  # attention's fast path, which is one opaque operator, is for inference without gradients only
        try:
            program = torch.export.export(module, example, dynamic_shapes=batch, strict=False)
            dynamic = True
        except Exception:  # noqa: BLE001  (whatever a dynamic axis breaks, the fixed one decides)
            program = torch.export.export(module, example, strict=False)
            dynamic = False
    graph: Any = program.module(check_guards=False)
    inline_regions(graph)
    return graph, dynamic


def inline_regions(graph: fx.GraphModule) -> None:
    """Put the body of every region in place of its call, in place; an enabled autocast, which changes types, stays one call."""
    import torch

    for node in list(graph.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in REGIONS or (name == "wrap_with_autocast" and node.args[2]):
            continue
        holder, inputs = node.args[REGIONS[name]], node.args[REGIONS[name] + 1 :]
        body: Any = graph.get_submodule(holder.target)
        inline_regions(body)
        if any(inner.op == "get_attr" for inner in body.graph.nodes):
            continue
        inside: dict[Any, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        results: list[Any] = []
        with graph.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "output":
                    results = [inside[item] for item in inner.args[0]]
                elif inner.op != "placeholder":
                    inside[inner] = graph.graph.node_copy(inner, inside.__getitem__)
            if name == "wrap_with_set_grad_enabled" and not node.args[0]:
                results = [_detached(graph, item, torch.ops.aten.detach.default) for item in results]
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        if not holder.users:
            graph.graph.erase_node(holder)
    graph.recompile()


def _detached(graph: fx.GraphModule, node: fx.Node, detach: Any) -> fx.Node:
    """What no_grad makes carries no gradient."""
    made = graph.graph.call_function(detach, (node,))
    made.meta.update(node.meta)
    return made


def build(module: nn.Module, example: tuple[torch.Tensor, ...], edit: Mapping[str, Any]) -> fx.GraphModule:
    """The graph of `module` with `edit` applied; parameters keep their values where their shape does not change."""
    from torch import fx

    graph, _ = capture(module, example)
    changes = dict(edit["rewrites"])
    for node in list(graph.graph.nodes):
        if node.name in changes:
            _rewrite(node, changes[node.name])
        if node.op == "call_function" and "assert" in str(node.target):
            graph.graph.erase_node(node)
    root = _root(module, graph)
    _layers(graph, root, module)
    graph.graph.eliminate_dead_code()
    built = fx.GraphModule(root, graph.graph, type(module).__name__)
    set_attributes(built, edit["layers"])
    resize(built, edit["tensors"])
    return built.eval()


def set_attributes(module: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell layers their new sizes."""
    for path, attributes in layers.items():
        for name, value in attributes.items():
            setattr(module.get_submodule(path), name, tuple(value) if isinstance(value, list) else value)


def apply(module: nn.Module, edit: Mapping[str, Any]) -> nn.Module:
    """Rebuild from the JSON of an edit; the caller loads the state."""
    import torch

    example = tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in edit["inputs"])
    return build(module.eval(), example, edit)


def resize(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Give parameters and buffers new shapes; their values are zeros."""
    import torch

    for name, shape in tensors.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner: Any = module.get_submodule(path)
            old = getattr(owner, leaf)
        except AttributeError:
            continue  # the graph does not use it
        new = torch.zeros(list(shape), dtype=old.dtype)
        if isinstance(old, torch.nn.Parameter):
            setattr(owner, leaf, torch.nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            owner._buffers[leaf] = new


def _rewrite(node: fx.Node, values: Mapping[str, Any]) -> None:
    import operator

    import torch

    for key, value in values.items():
        if key == "target":
            node.target = getattr(getattr(torch.ops.aten, value[0]), value[1])
        elif isinstance(value, list):
            sizes: list[Any] = []
            for item in value:
                if not isinstance(item, Mapping):
                    sizes.append(item)
                    continue
                old: Any = node.args[1][item["symbol"]]  # pyright: ignore[reportOptionalSubscript, reportArgumentType, reportIndexIssue]
                with node.graph.inserting_before(node):
                    scaled = node.graph.call_function(operator.mul, (old, item["times"]))
                    sizes.append(node.graph.call_function(operator.floordiv, (scaled, item["over"])) if item["over"] != 1 else scaled)
            node.update_arg(int(key), sizes) if key.isdigit() else node.update_kwarg(key, sizes)
        elif key.isdigit():
            arguments = list(node.args) + [None] * (int(key) + 1 - len(node.args))
            arguments[int(key)] = value
            node.args = tuple(arguments)
        else:
            node.update_kwarg(key, value)


def _root(module: nn.Module, graph: fx.GraphModule) -> nn.Module:
    """A module with the tensors that the graph names."""
    import torch

    root = torch.nn.Module()
    shared: dict[int, Any] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        path, _, leaf = str(node.target).rpartition(".")
        value: Any = graph.get_submodule(path)
        value = getattr(value, leaf)
        if isinstance(value, torch.nn.Module):  # a region's body
            root.add_module(leaf, copy.deepcopy(value))
            continue
        owner = root
        for part in path.split(".") if path else ():
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        clone = shared.setdefault(id(value), copy.deepcopy(value) if isinstance(value, torch.nn.Parameter) else value.detach().clone())
        if isinstance(clone, torch.nn.Parameter):
            owner.register_parameter(leaf, clone)
        else:
            owner.register_buffer(leaf, clone)
    return root


def _layers(graph: fx.GraphModule, root: nn.Module, module: nn.Module) -> None:
    """Call convolutions, linear layers, batch normalization and dropout as modules again, where they cover one operator."""
    from torch import nn

    calls = layer_calls(graph)
    for node in list(graph.graph.nodes):
        made: Any = None
        path = ""
        if node.op == "call_function" and "batch_norm" in str(node.target) and getattr(node.args[3], "op", "") == "get_attr":
            path = str(node.args[3].target).rpartition(".")[0]
            made = _batch_norm(node, root.get_submodule(path)) if path and not list(root.get_submodule(path).children()) else None
        else:
            stack = node.meta.get("nn_module_stack") or {}
            key = next(reversed(stack), "")
            path = stack[key][0] if key and len(calls[key]) == 1 else ""
            original = _submodule(module, path) if path else None
            if isinstance(original, nn.modules.conv._ConvNd | nn.Linear) and original.__class__.__module__.startswith("torch.nn.modules"):
                made = _with_tensors(original, root.get_submodule(path))
            elif isinstance(original, nn.modules.dropout._DropoutNd):
                made = copy.copy(original)
        if made is None or node.op != "call_function":
            continue
        if not isinstance(_submodule(root, path), type(made)):
            root_of, _, leaf = path.rpartition(".")
            owner = root
            for part in root_of.split(".") if root_of else ():
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.add_module(leaf, made)
        graph.add_submodule(path, _submodule(root, path))
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(path, (node.args[0],))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _submodule(module: nn.Module, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _batch_norm(node: fx.Node, holder: nn.Module) -> nn.Module:
    from torch import nn

    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if isinstance(holder, nn.modules.batchnorm._BatchNorm):
        return holder
    args: Any = node.args
    made = kinds[len(node.meta["val"].shape)](holder.running_mean.shape[0], args[7], args[6], affine=args[1] is not None)  # pyright: ignore
    return _with_tensors(made, holder)


def _with_tensors(layer: Any, holder: nn.Module) -> nn.Module:
    """A copy of `layer` with the tensors of `holder`."""
    made = copy.copy(layer)
    made._parameters = {**dict.fromkeys(layer._parameters), **holder._parameters}
    made._buffers = {**layer._buffers, **holder._buffers}
    return made


def layer_calls(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The operators inside each module, by path and call."""
    found: dict[str, list[Any]] = defaultdict(list)
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if node.op == "call_function" and stack:
            found[next(reversed(stack))].append(node)
    return found
