"""Which channels must be removed together: labels pushed through the exported graph, classes by union-find.

Every tensor of the graph carries *factors*: integer arrays with its number of axes, of size 1 along every axis they do not depend on.
An element of the tensor is gone when any factor holds a removed label there. Parameters start with one fresh label for each position of
each axis; the rules (`_coupling_rules`) carry labels through operators and unite those that must go together.

    0 is the label that is never removed. An axis of size > 1 without a factor is never shortened.
    rectangular: at the end every factor varies along one axis only, so that what is left of a tensor is a tensor. A factor that
        varies along several axes keeps the axis that leaves the most classes, and labels are united along the others; repeated to a
        fixed point.
    sound: an operator without a rule freezes (unites with 0) every label that reaches it, and is named in `unknown`.

A *group* is a set of classes that occupy the same axes of the same parameters equally often: any subset of them can go.

Idea: DepGraph (Fang et al. 2023, arXiv:2301.12900), with dependencies between single positions instead of layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.passes._coupling_rules import RULES
from deploycc.passes._coupling_values import Factor, Value, attribute, blank, collapse, is_node, operator, varied
from deploycc.passes._coupling_values import arguments as arguments  # for who reads the same graph

if TYPE_CHECKING:
    from torch import fx

FROZEN = 0
CONSTANTS = ("lifted_tensor_", "_tensor_constant")  # the exporter's: written in forward, so the module has none of that name


class Labels:
    """A union-find over labels; the smallest label of a class is its root."""

    def __init__(self) -> None:
        self.parent = np.zeros(1, np.int64)

    def fresh(self, count: int) -> np.ndarray:
        """`count` new labels."""
        start = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(start, start + count)])
        return self.parent[start:].copy()

    def roots(self, labels: Factor) -> Factor:
        """The root of every entry."""
        found = self.parent[labels]
        while True:
            above = self.parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def unite(self, left: Factor, right: Factor | int) -> None:
        """Entry by entry, with broadcasting."""
        a, b = np.broadcast_arrays(self.roots(left), self.roots(np.asarray(right)))
        pairs = np.unique(np.stack([np.minimum(a, b).ravel(), np.maximum(a, b).ravel()]), axis=1)
        parent = self.parent
        for low, high in pairs[:, pairs[0] != pairs[1]].T.tolist():
            while parent[low] != low:
                low = parent[low]
            while parent[high] != high:
                high = parent[high]
            parent[max(low, high)] = min(low, high)

    def freeze(self, *factors: Factor) -> None:
        """Never remove these."""
        for factor in factors:
            self.unite(factor, FROZEN)

    def project(self, factor: Factor, axes: Sequence[int]) -> Factor:
        """Unite along every axis but `axes`; the factor that is left."""
        first = factor[tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(factor.ndim))]
        if first.shape != factor.shape:
            self.unite(factor, first)
        return first


@dataclass(frozen=True, slots=True)
class Place:
    """An axis of a parameter or buffer."""

    tensor: str
    axis: int


@dataclass(frozen=True, slots=True)
class Group:
    """Interchangeable classes.

    Attributes:
        name: the first weight whose outputs they are, without ".weight".
        classes: roots, in the order of their first position.
        places: how many positions of which axes one class takes.
    """

    name: str
    classes: tuple[int, ...]
    places: Mapping[Place, int]

    def __str__(self) -> str:
        shown = ", ".join(f"{place.tensor}[{place.axis}]" + (f"×{count}" if count > 1 else "") for place, count in self.places.items())
        return f"{self.name}: {len(self.classes)} of {shown}"


class Coupling:
    """The labels of a graph module made by `forms._edit_graph.capture`."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.labels = Labels()
        self.values: dict[fx.Node, Any] = {}
        self.tensors: dict[str, Value] = {}  # by name of the parameter or buffer
        self.names: dict[int, str] = {}  # id of a tensor → its first name: tied tensors share their labels
        self.unknown: Counter[str] = Counter()
        self.joint: list[Factor] = []
        self.used: set[str] = set()
        for node in graph.graph.nodes:
            self._visit(node)
        for name in self.tensors.keys() - self.used:  # a head for training only: nothing says what it goes with
            self.labels.freeze(*self.tensors[name].factors)
        self._make_rectangular()

    # What the rules use

    def value(self, item: Any) -> Value | None:
        """Of a node that is a tensor; None for numbers, None and symbols."""
        found = self.values.get(item) if is_node(item) else None
        return found if isinstance(found, Value) else None

    def known(self, item: Any) -> Value:
        """`value` of what must be a tensor; a scalar without labels for anything else."""
        return self.value(item) or Value(())

    def unknown_operator(self, node: fx.Node) -> None:
        """Freeze every label that goes in."""
        reached = [value for value in map(self.value, node.all_input_nodes) if value is not None]
        for source in node.all_input_nodes:
            if isinstance(self.values.get(source), list):
                reached += self.values[source]
        if any(value.factors for value in reached):
            self.unknown[operator(node)] += 1
        for value in reached:
            self.labels.freeze(*value.factors)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "get_attr" and not hasattr(attribute(self.graph, str(node.target)), "shape"):
            self.values[node] = None  # the body of a region that stays one call
        elif node.op == "get_attr":
            self.values[node] = self._parameter(str(node.target))
            if node.users:
                self.used.add(self.names[id(attribute(self.graph, str(node.target)))])
            if str(node.target).rpartition(".")[2].startswith(CONSTANTS):
                self.labels.freeze(*self.values[node].factors)
        elif node.op == "placeholder":
            self.values[node] = blank(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                self.labels.freeze(*(factor for value in _flat(self.values.get(source)) for factor in value.factors))
        elif node.op == "call_function":
            result = self._call(node)
            self.values[node] = result
            for value in _flat(result):
                value.factors = _distinct(value.factors)
                self.joint += [factor for factor in value.factors if len(varied(factor)) > 1]

    def _parameter(self, name: str) -> Value | None:
        tensor = attribute(self.graph, name)
        first = self.names.setdefault(id(tensor), name)
        if first not in self.tensors:
            shape = tuple(tensor.shape)
            value = Value(shape)
            for axis, size in enumerate(shape):
                if size > 1:
                    value.factors.append(self.labels.fresh(size).reshape([size if i == axis else 1 for i in range(len(shape))]))
            self.tensors[first] = value
        known = self.tensors[first]
        return Value(known.shape, list(known.factors))

    def _call(self, node: fx.Node) -> Any:
        name = operator(node)
        if name == "getitem":
            source = self.values.get(node.args[0])  # pyright: ignore[reportArgumentType]
            index: Any = node.args[1]
            return source[index] if isinstance(source, list) else None
        blank_result = blank(node)
        if blank_result is None:
            return None
        rule: Callable[..., Any] | None = RULES.get(name)
        if rule is None:
            self.unknown_operator(node)
            return blank_result
        try:
            result = rule(self, node)
        except (ValueError, TypeError, LookupError, RuntimeError):  # a use that the rule was not written for
            result = None
        if result is None:
            self.unknown_operator(node)
            return blank_result
        return result

    # What follows the walk

    def _make_rectangular(self) -> None:
        pending = self.joint
        while pending:
            changed = False
            still: list[Factor] = []
            for factor in pending:
                roots = collapse(self.labels.roots(factor))
                axes = varied(roots)
                if len(axes) < 2:
                    still.append(factor)
                    continue
                best = max(axes, key=lambda axis: (self._classes_if_kept(roots, axis), roots.shape[axis]))
                self.labels.project(roots, [best])
                changed = True
                still.append(factor)
            if not changed:
                return
            pending = still

    def _classes_if_kept(self, roots: Factor, axis: int) -> int:
        """How many classes that can be removed are left when labels are united along all axes but one."""
        rows = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
        parent: dict[int, int] = {}

        def find(label: int) -> int:
            while parent.setdefault(label, label) != label:
                label = parent[label]
            return label

        for row in rows:
            distinct = np.unique(row).tolist()
            low = find(distinct[0])
            for label in distinct[1:]:
                other = find(label)
                low, high = min(low, other), max(low, other)
                parent[high] = low
        return len({find(label) for label in parent} - {FROZEN})

    def groups(self, skip: Callable[[str], bool] = lambda name: False) -> list[Group]:
        """Every set of interchangeable classes that no skipped tensor takes part in, in the order of the graph."""
        places: dict[int, Counter[Place]] = defaultdict(Counter)
        blocked: set[int] = {FROZEN}
        for name, value in self.tensors.items():
            for factor in value.factors:
                axes = varied(collapse(self.labels.roots(factor))) or varied(factor)
                roots = self.labels.roots(factor).ravel()
                if skip(name):
                    blocked.update(roots.tolist())
                for root, count in zip(*(part.tolist() for part in np.unique(roots, return_counts=True)), strict=True):
                    places[root][Place(name, axes[0])] += count
        grouped: dict[tuple[tuple[Place, int], ...], list[int]] = defaultdict(list)
        for root in sorted(places.keys() - blocked):
            grouped[tuple(places[root].items())].append(root)
        found = [Group(_title(key), tuple(classes), dict(key)) for key, classes in grouped.items() if len(classes) > 1]
        return _named_apart([group for group in found if _carries(group, self.tensors)])

    def kept(self, value: Value, axis: int, removed: np.ndarray) -> np.ndarray:
        """Which positions of an axis are left; `removed` is a mask over roots."""
        keep = np.ones(value.shape[axis], bool)
        for factor in value.factors:
            roots = collapse(self.labels.roots(factor))
            if varied(roots) == (axis,) or (not varied(roots) and varied(factor) == (axis,)):
                keep &= ~removed[np.broadcast_to(roots, [n if i == axis else 1 for i, n in enumerate(factor.shape)]).ravel()]
        return keep

    def mask(self, classes: Iterable[int]) -> np.ndarray:
        """Classes to remove as a mask over labels."""
        removed = np.zeros(len(self.labels.parent), bool)
        removed[list(classes)] = True
        removed[FROZEN] = False
        return removed


def _title(key: tuple[tuple[Place, int], ...]) -> str:
    outputs = [place.tensor for place, _ in key if place.axis == 0 and place.tensor.endswith("weight")] or [key[0][0].tensor]
    return outputs[0].removesuffix(".weight")


def _named_apart(groups: list[Group]) -> list[Group]:
    seen: Counter[str] = Counter()
    result: list[Group] = []
    for group in groups:
        seen[group.name] += 1
        name = group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}"
        result.append(Group(name, group.classes, group.places))
    return result


def _carries(group: Group, tensors: Mapping[str, Value]) -> bool:
    """Whether a weight matrix or kernel shrinks: vectors alone are not channels of a layer."""
    return any(len(tensors[place.tensor].shape) > 1 for place in group.places)


def _distinct(factors: list[Factor]) -> list[Factor]:
    """Without repeats, and without factors that vary nowhere or hold only the frozen label."""
    result: list[Factor] = []
    for factor in factors:
        if not varied(factor) or not factor.any():
            continue
        if not any(factor.shape == other.shape and np.array_equal(factor, other) for other in result):
            result.append(factor)
    return result


def _flat(result: Any) -> list[Value]:
    if isinstance(result, list):
        return [value for item in result for value in _flat(item)]
    return [result] if isinstance(result, Value) else []
