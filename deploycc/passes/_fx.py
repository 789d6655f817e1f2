"""A module as a torch.fx graph whose weighted operators are all torch.nn modules, which is what FX quantization fuses and lowers."""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.errors import PreconditionError

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from deploycc.core.artifact import Signature

PACKAGE = str(Path(__file__).parents[1])


def trace(model: nn.Module, signature: Signature) -> fx.GraphModule:
    """`model` (which is not changed; modules are shared) as a graph of its inputs. Raises PreconditionError with the user's line."""
    from torch import fx

    tracer = fx.Tracer()
    try:
        graph = tracer.trace(model, concrete_args=_defaults(model, len(signature.inputs)))
    except Exception as cause:
        raise PreconditionError(
            f"the model cannot be traced as a graph: {_user_line(cause)}{type(cause).__name__}: {str(cause).splitlines()[0]}",
            fix="use an ONNX target such as x86-onnxruntime, whose exporter follows one run of the model; or take the branch on a "
            "tensor's value or shape out of forward()",
        ) from cause
    _drop_constants(graph, len(signature.inputs))
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__).eval()
    _drop_identities(traced)
    return tidy(traced)


def _defaults(model: nn.Module, inputs: int) -> dict[str, Any] | None:
    """Values of the parameters of forward() that the signature does not feed."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    rest = [item for item in parameters[inputs:] if item.default is not inspect.Parameter.empty]
    return {item.name: item.default for item in rest} or None


def _drop_constants(graph: fx.Graph, inputs: int) -> None:
    """Remove the placeholders of constant arguments, and the assertions on them."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]

    def erase(node: fx.Node) -> None:
        for user in list(node.users):
            erase(user)
        graph.erase_node(node)

    for node in placeholders[inputs:]:
        erase(node)


def _drop_identities(graph: fx.GraphModule) -> None:
    """Remove what does nothing in inference but stands between operators that fuse."""
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.modules.dropout import _DropoutNd

    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        dropout = node.op == "call_function" and node.target is F.dropout and not _argument(node, 2, "training", default=True)
        if dropout or isinstance(module, nn.Identity | _DropoutNd):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _argument(node: fx.Node, index: int, name: str, *, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _user_line(error: BaseException) -> str:
    """`file:line `code`: ` of the innermost frame that is neither PyTorch's nor ours."""
    import torch

    library = str(Path(str(torch.__file__)).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((library, PACKAGE, "<"))]
    if not frames:
        return ""
    last = frames[-1]
    code = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{last.filename}:{last.lineno} `{code}`: "


def calls(graph: fx.GraphModule) -> Counter[str]:
    """How often each submodule is called."""
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")


def add_module(graph: fx.GraphModule, wanted: str, module: nn.Module) -> str:
    """Add a submodule under `wanted`, or the first free name after it; returns the name."""
    known = {name for name, _ in graph.named_modules()}
    name, count = wanted, 0
    while name in known or hasattr(graph, name):
        count += 1
        name = f"{wanted}_{count}"
    graph.add_submodule(name, module)
    return name


def replace_node(graph: fx.GraphModule, node: fx.Node, module: nn.Module, wanted: str) -> fx.Node:
    """Call `module` on the node's first input instead."""
    name = add_module(graph, wanted, module)
    with graph.graph.inserting_after(node):
        new = graph.graph.call_module(name, (node.args[0],))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new


def tidy(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph module with only what its graph uses."""
    from torch import fx

    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    return fx.GraphModule(graph, graph.graph, graph._get_name()).eval()


def modules_for_functions(graph: fx.GraphModule) -> fx.GraphModule:
    """Turn F.conv1d/2d/3d and F.linear on the model's own parameters into torch.nn modules.

    A subclass of nn.Conv2d with its own forward (TensorFlow's "same" padding) is traced through to such a call.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    convolutions: dict[Any, type[nn.Module]] = {
        F.conv1d: nn.Conv1d,
        F.conv2d: nn.Conv2d,
        F.conv3d: nn.Conv3d,
        torch.conv1d: nn.Conv1d,
        torch.conv2d: nn.Conv2d,
        torch.conv3d: nn.Conv3d,
    }
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (*convolutions, F.linear):
            continue
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        weight, bias = (_parameter(graph, given.get(key)) for key in ("weight", "bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            continue
        module = _linear(weight) if node.target is F.linear else _conv(convolutions[node.target], weight, given)
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        node.args = (given["input"],)
        node.kwargs = {}
        replace_node(graph, node, module, f"{given['weight'].target.rpartition('.')[0] or 'root'}.{node.target.__name__}")
    return tidy(graph)


def _parameter(graph: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor that a get_attr node names."""
    from torch import fx

    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(path), name)


def _linear(weight: torch.Tensor) -> Any:
    from torch import nn

    return nn.Linear(weight.shape[1], weight.shape[0])


def _conv(kind: Any, weight: torch.Tensor, given: dict[str, Any]) -> Any:
    groups = given.get("groups", 1)
    options = {key: given[key] for key in ("stride", "padding", "dilation") if key in given}
    return kind(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups, **options)
