"""A smaller model from classes to remove: tensors sliced, constants of the graph rewritten, layers told their new sizes.

Two forms. The original module with sliced tensors, when it runs and gives what the graph gives; else the exported graph
(`forms._edit_graph`), whose views, splits, slices and group counts are rewritten from the labels of their results.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.passes._coupling import Coupling
from deploycc.passes._coupling_values import Value, arguments, attribute, concrete, operator

if TYPE_CHECKING:
    import torch
    from torch import nn

VIEWS = {"view", "reshape", "_unsafe_view", "expand"}
SPLITS = {"split", "split_with_sizes", "chunk"}


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A pruned model and the edit that rebuilds its structure from the module it came from."""

    model: nn.Module
    edit: dict[str, Any]


def shrink(
    module: nn.Module, coupling: Coupling, example: tuple[torch.Tensor, ...], classes: Iterable[int], *, proven: bool = False
) -> Shrunk:
    """`module` without `classes`; the module itself is not changed. Raises what a forward that does not run raises.

    With `proven` the resized module is only taken when it answers as the graph does, and runs in train mode if the module did (heads that
    only training uses are not in the graph).
    """
    import torch

    removed = coupling.mask(classes)
    kept = _indices(coupling, removed)
    rewrites, layers = _rewrites(coupling, removed)
    graph_edit = {
        "kind": "graph",
        "inputs": [[list(item.shape), str(item.dtype).removeprefix("torch.")] for item in example],
        "rewrites": rewrites,
        "layers": {},
        "tensors": {name: [len(index) for index in axes] for name, axes in kept.items()},
    }
    with torch.no_grad():
        expected = _outputs(module(*example))
    resized = _resized(module, kept, layers, example)
    if resized is not None and [item.shape for item in resized[1]] == [item.shape for item in expected]:
        small = Shrunk(resized[0], {"kind": "resize", "layers": _described(module, resized[0])})
        if not proven:
            return small
        trains = _trains(resized[0], example) or not _trains(module, example)
        if trains and _alike(resized[1], _as_graph(module, kept, layers, graph_edit, example, expected)):
            return small
    return _as_graph(module, kept, layers, graph_edit, example, expected)[0]


def _trains(module: nn.Module, example: tuple[torch.Tensor, ...]) -> bool:
    """Whether a copy runs in train mode."""
    import torch

    try:
        with torch.no_grad():
            copy.deepcopy(module).train()(*example)
    except Exception:  # noqa: BLE001  (the user's own forward)
        return False
    return True


def _alike(resized: list[torch.Tensor], graph: tuple[Shrunk, list[torch.Tensor]]) -> bool:
    import torch

    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-6)) for a, b in zip(resized, graph[1], strict=True))


def _as_graph(
    module: nn.Module,
    kept: Mapping[str, list[np.ndarray]],
    layers: Mapping[str, Mapping[str, Any]],
    graph_edit: dict[str, Any],
    example: tuple[torch.Tensor, ...],
    expected: list[torch.Tensor],
) -> tuple[Shrunk, list[torch.Tensor]]:
    """The graph form and its outputs. Raises what a graph that does not run raises."""
    import torch

    from deploycc.forms._edit_graph import build, set_attributes

    graph = build(module, example, graph_edit)
    graph_edit["layers"] = {path: values for path, values in layers.items() if _has(graph, path)}
    set_attributes(graph, graph_edit["layers"])
    fill(graph, module, kept)
    with torch.no_grad():
        actual = _outputs(graph(*example))
    if [item.shape for item in actual] != [item.shape for item in expected] or not all(bool(item.isfinite().all()) for item in actual):
        raise ValueError("the pruned model's outputs have another shape or are not finite")
    return Shrunk(graph, graph_edit), actual


def fill(target: nn.Module, source: nn.Module, kept: Mapping[str, list[np.ndarray]]) -> None:
    """Copy the kept positions of `source`'s tensors into `target`."""
    import torch

    tensors = {**dict(source.named_parameters(remove_duplicate=False)), **dict(source.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for name, tensor in {**dict(target.named_parameters()), **dict(target.named_buffers())}.items():
            if name in tensors:
                tensor.copy_(_sliced(tensors[name], kept[name]) if name in kept else tensors[name])


def _sliced(tensor: torch.Tensor, axes: list[np.ndarray]) -> torch.Tensor:
    import torch

    for axis, index in enumerate(axes):
        if len(index) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.from_numpy(index))
    return tensor


def _indices(coupling: Coupling, removed: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Kept positions along every axis of the tensors that shrink."""
    found: dict[str, list[np.ndarray]] = {}
    for name, value in coupling.tensors.items():
        axes = [np.flatnonzero(coupling.kept(value, axis, removed)) for axis in range(len(value.shape))]
        if tuple(len(index) for index in axes) != value.shape:
            found[name] = axes
    return found


def _rewrites(coupling: Coupling, removed: np.ndarray) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """New arguments by node, and new attributes by layer."""
    found: list[Any] = []
    layers: dict[str, dict[str, Any]] = {}

    def sizes(value: Value) -> list[int]:
        return [int(coupling.kept(value, axis, removed).sum()) for axis in range(len(value.shape))]

    for node in coupling.graph.graph.nodes:
        made = coupling.values.get(node)
        if node.op != "call_function" or made is None:
            continue
        name = operator(node)
        first = coupling.value(node.args[0]) if node.args else None
        change: dict[str, Any] = {}
        if name in VIEWS:
            change = _view(node, made, sizes(made), 1, 0)
        elif name == "unflatten":
            change = _view(node, made, sizes(made), 2, node.args[1] % len(coupling.known(node.args[0]).shape))
        elif name in SPLITS and first is not None:
            axis = arguments(node)["dim"] % len(first.shape)
            pieces = [sizes(item)[axis] for item in made]
            if pieces != [item.shape[axis] for item in made]:
                change = {"target": ["split_with_sizes", "default"], "1": pieces}
        elif name in ("slice", "narrow") and first is not None:
            change = _cut(coupling, node, name, first, removed)
        elif name in ("pad", "constant_pad_nd") and first is not None:
            change = _padding(coupling, node, made, first, removed)
        elif name.startswith("conv"):
            change = _convolution(coupling, node, sizes, layers)
        elif name in ("layer_norm", "rms_norm"):
            count = len(node.args[1])
            if sizes(made)[-count:] != list(made.shape[-count:]):
                change = {"1": sizes(made)[-count:]}
                _attributes(layers, node.args[2] if len(node.args) > 2 else None, normalized_shape=change["1"])
        elif name == "scaled_dot_product_attention" and arguments(node)["scale"] is None:
            query = coupling.known(node.args[0])
            change = {"scale": 1 / math.sqrt(query.shape[-1])} if sizes(query)[-1] != query.shape[-1] else {}
        elif name == "group_norm" and sizes(made)[1] != made.shape[1]:
            _attributes(layers, arguments(node)["weight"], num_channels=sizes(made)[1])
        elif name == "linear":
            weight = coupling.known(node.args[1])
            if sizes(weight) != list(weight.shape):
                _attributes(layers, node.args[1], out_features=sizes(weight)[0], in_features=sizes(weight)[1])
        elif name == "batch_norm" and sizes(made)[1] != made.shape[1]:
            _attributes(layers, node.args[3], num_features=sizes(made)[1])
        elif name == "embedding":
            _attributes(layers, node.args[0], embedding_dim=sizes(made)[-1])
        if change:
            found.append([node.name, change])
    return found, layers


def _view(node: Any, made: Value, new: list[int], place: int, start: int) -> dict[str, Any]:
    given = list(node.args[place])
    offset = start if place == 2 else len(made.shape) - len(given)
    changed = False
    for index, item in enumerate(given):
        old, now = made.shape[index + offset], new[index + offset]
        if old == now or item == -1:
            continue
        changed = True
        common = math.gcd(old, now)
        given[index] = now if isinstance(item, int) else {"symbol": index, "times": now // common, "over": old // common}
    if not changed:
        return {}
    return {str(place): [item if isinstance(item, int | dict) else {"symbol": i, "times": 1, "over": 1} for i, item in enumerate(given)]}


def _cut(coupling: Coupling, node: Any, name: str, first: Value, removed: np.ndarray) -> dict[str, Any]:
    given = arguments(node)
    axis = given["dim"] % len(first.shape)
    keep = coupling.kept(first, axis, removed)
    if keep.all():
        return {}
    start = concrete(given["start"]) or 0
    end = start + concrete(given["length"]) if name == "narrow" else concrete(given["end"])
    low, high, _ = slice(start, end).indices(len(keep))
    before, inside = int(keep[:low].sum()), int(keep[low:high].sum())
    return {"2": before, "3": inside if name == "narrow" else before + inside}


def _padding(coupling: Coupling, node: Any, made: Value, first: Value, removed: np.ndarray) -> dict[str, Any]:
    amounts = list(concrete(node.args[1]))
    new = list(amounts)
    for index in range(0, len(amounts), 2):
        axis = len(first.shape) - 1 - index // 2
        keep = coupling.kept(made, axis, removed)
        if not keep.all():
            new[index] = int(keep[: amounts[index]].sum())
            new[index + 1] = int(keep[len(keep) - amounts[index + 1] :].sum())
    return {"1": new} if new != amounts else {}


def _convolution(coupling: Coupling, node: Any, sizes: Any, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    given = arguments(node)
    x, weight, made = (coupling.value(item) for item in (given["input"], given["weight"], node))
    if x is None or weight is None or made is None or (sizes(weight) == list(weight.shape) and sizes(x) == list(x.shape)):
        return {}
    transposed, groups = "transpose" in str(node.target), given["groups"]
    if groups > 1:
        groups = groups * sizes(weight)[0] // weight.shape[0] if transposed else sizes(x)[1] // sizes(weight)[1]
    _attributes(layers, given["weight"], in_channels=sizes(x)[1], out_channels=sizes(made)[1], groups=groups)
    return {"6": groups} if groups != given["groups"] else {}


def _attributes(layers: dict[str, dict[str, Any]], tensor: Any, **values: Any) -> None:
    if getattr(tensor, "op", "") == "get_attr":
        layers.setdefault(str(tensor.target).rpartition(".")[0], {}).update(values)


def _has(graph: nn.Module, path: str) -> bool:
    try:
        return any(hasattr(graph.get_submodule(path), name) for name in ("in_channels", "in_features", "num_features", "embedding_dim"))
    except AttributeError:
        return False


def _resized(
    module: nn.Module, kept: Mapping[str, list[np.ndarray]], layers: Mapping[str, Mapping[str, Any]], example: tuple[torch.Tensor, ...]
) -> Any:
    """(the module with sliced tensors, its outputs), or None when it does not run."""
    import torch

    if any(not hasattr(module.get_submodule(path), name) for path, values in layers.items() for name in values):
        return None
    small = copy.deepcopy(module)
    tied: dict[int, Any] = {}
    first = {id(attribute(module, name)): name for name in kept}
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in first:
            continue
        path, _, leaf = name.rpartition(".")
        owner: Any = small.get_submodule(path)
        if id(tensor) not in tied:
            new = _sliced(tensor.detach(), kept[first[id(tensor)]]).clone()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            tied[id(tensor)] = torch.nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        setattr(owner, leaf, tied[id(tensor)])
    for path, values in layers.items():
        for name, value in values.items():
            setattr(small.get_submodule(path), name, tuple(value) if isinstance(value, list) else value)
    try:
        with torch.no_grad():
            return small, _outputs(small(*example))
    except Exception:  # noqa: BLE001  (the user's own forward; the graph form takes over)
        return None


def _described(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """What a "resize" edit says: attributes and shapes that differ, by layer."""
    old = dict(before.named_modules())
    found: dict[str, Any] = {}
    for path, layer in after.named_modules():
        pairs = [*layer._parameters.items(), *layer._buffers.items()]
        tensors = {n: list(t.shape) for n, t in pairs if t is not None and t.shape != getattr(old[path], n).shape}
        plain = {n: v for n, v in vars(layer).items() if isinstance(v, int | tuple) and v != getattr(old[path], n)}
        if tensors or plain:
            found[path] = {"attributes": {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items()}, "tensors": tensors}
    return found


def _outputs(result: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    return [item for item in pytree.tree_leaves(result) if hasattr(item, "shape")]
