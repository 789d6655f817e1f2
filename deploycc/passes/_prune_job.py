"""One pruning of one artifact: how many channels of which group go, and the model without them.

The rules are in the manual of prune-channels; the coupling in `_coupling`, what a channel is worth in `_importance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.errors import NothingToDo, PassError, PreconditionError

if TYPE_CHECKING:
    import torch

    from deploycc.passes._coupling import Coupling, Group
    from deploycc.passes._shrink import Shrunk

LEVELS = (0.3, 0.6)  # shares of a group that the cost table is measured at
CLOSE = 0.05  # of the latency goal
LEAST_SHARE = 0.2  # of what a group's MACs would cost if all MACs cost the same
ROUNDS = 6  # measurements of candidates
TOGETHER = 12  # models of one interleaved run
SHOWN = 6


class Goals(Protocol):
    """The options of prune-channels that decide what goes."""

    @property
    def ratio(self) -> float | None: ...
    @property
    def macs(self) -> float | None: ...
    @property
    def params(self) -> float | None: ...
    @property
    def latency(self) -> float | None: ...
    @property
    def criterion(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def most(self) -> float: ...
    @property
    def multiple(self) -> int | None: ...
    @property
    def skip(self) -> tuple[str, ...]: ...


class Job:
    """One pruning of one artifact."""

    def __init__(self, options: Goals, artifact: Artifact, context: Context) -> None:
        from deploycc.passes._coupling import Coupling
        from deploycc.passes._importance import importance, sizes

        self.options, self.artifact, self.context = options, artifact, context
        self.example = _example(artifact)
        self.coupling: Coupling = Coupling(_captured(artifact, self.example))
        self.notes: list[str] = []
        self.groups = self._groups()
        scores = importance(options.criterion, self.coupling, self.groups, artifact, context)
        self.order = [np.argsort(values, kind="stable") for values in scores]
        self.scores = [values[ranked] for values, ranked in zip(scores, self.order, strict=True)]
        self.multiple = options.multiple or context.target.quant.channel_multiple
        self.levels = [_levels(len(group.classes), _width(group), self.multiple, options.most) for group in self.groups]
        self.whole = sizes(self.coupling, self.coupling.mask(()))

    def _groups(self) -> list[Group]:
        """What may be pruned. Raises PreconditionError for a skip that names nothing, NothingToDo when nothing is left."""
        names = list(self.coupling.tensors)
        for pattern in self.options.skip:
            if not any(_named(name, pattern) for name in names):
                raise PreconditionError(f"skip={pattern} names no layer", fix=f"the layers are called {', '.join(names[:3])}, …")
        groups = self.coupling.groups(lambda name: any(_named(name, pattern) for pattern in self.options.skip))
        if not groups:
            unknown = ", ".join(self.coupling.unknown) or "its channels all reach an output"
            raise NothingToDo(f"prune-channels finds no channel that could go ({unknown})", fix="leave it out")
        for group in groups:
            self.context.progress("coupled groups", 1, 1, str(group))
        return groups

    def run(self, share: float, whole: tuple[int, int]) -> tuple[Artifact, dict[str, Any]]:
        """Reach `share` of the way to the goal; `whole` are MACs and parameters of the unpruned model."""
        options = self.options
        table: dict[str, Any] = {}
        if options.ratio is not None:
            counts = self._by_ratio(1 - (1 - options.ratio) ** share)
        elif options.latency is not None:
            counts, table = self._by_latency(options.latency)
        else:
            goal = options.macs if options.macs is not None else options.params
            index = 0 if options.macs is not None else 1
            counts = self._by_budget(index, (1 - (1 - (goal or 0.0)) * share) * whole[index])
        pruned, counts = self._removed(counts)
        macs, parameters = self._sizes(counts)
        kept = {group.name: [len(group.classes) - count, len(group.classes)] for group, count in zip(self.groups, counts, strict=True)}
        lost = [f"{name} {left} of {total}" for name, (left, total) in kept.items() if left < total]
        more = f", … and {len(lost) - SHOWN} more groups" if len(lost) > SHOWN else ""
        shares = f"{macs / self.whole[0]:.1%} of the MACs, {parameters / self.whole[1]:.1%} of the parameters"
        self.notes.insert(0, f"kept {', '.join(lost[:SHOWN])}{more}: {shares}")
        if self.coupling.unknown:
            self.notes.append(f"not understood, and so not pruned: {', '.join(self.coupling.unknown)}")
        details = {"groups": [str(group) for group in self.groups], "kept": kept, "macs": [macs, self.whole[0]], "latency": table}
        return pruned, details

    def _sizes(self, counts: Sequence[int]) -> tuple[int, int]:
        from deploycc.passes._importance import chosen, sizes

        return sizes(self.coupling, self.coupling.mask(chosen(self.groups, counts, self.order)))

    def _by_ratio(self, ratio: float) -> list[int]:
        """That share of each group, or of all channels, the least important first."""
        if self.options.scope == "group":
            return [_nearest(levels, ratio * len(group.classes)) for group, levels in zip(self.groups, self.levels, strict=True)]
        widths = [_width(group) for group in self.groups]
        total = sum(len(group.classes) * width for group, width in zip(self.groups, widths, strict=True))
        sequence = self._sequence([1.0] * len(self.groups), press=False)
        counts, gone = [0] * len(self.groups), 0
        for index, count in sequence:
            if gone >= ratio * total:
                break
            gone += (count - counts[index]) * widths[index]
            counts[index] = count
        return counts

    def _sequence(self, worth: Sequence[float], *, press: bool = True) -> list[tuple[int, int]]:
        """(group, classes gone) in the order in which they go: least importance for what a class saves first."""
        prices: list[tuple[float, int, int]] = []
        for index, (levels, scores) in enumerate(zip(self.levels, self.scores, strict=True)):
            if worth[index] <= 0:
                continue
            highest = 0.0
            for before, count in pairwise(levels):
                price = float(scores[before:count].sum()) / (worth[index] * (count - before))
                price /= (1 - before / len(scores)) if press else 1.0
                highest = max(highest, price)  # what comes later in a group never goes first
                prices.append((highest, index, count))
        return [(index, count) for _, index, count in sorted(prices)]

    def _by_budget(self, index: int, budget: float) -> list[int]:
        """As many channels as it takes to come down to `budget` MACs (0) or parameters (1). Raises PreconditionError."""
        options = self.options
        if options.scope == "group":
            steps = [i / 200 for i in range(201)]

            def at(position: int) -> list[int]:
                return [
                    _nearest(levels, steps[position] * options.most * len(group.classes))
                    for group, levels in zip(self.groups, self.levels, strict=True)
                ]
        else:
            worth = [self._saved(number, index) for number in range(len(self.groups))]
            sequence = self._sequence(worth)
            steps = [0.0] * (len(sequence) + 1)

            def at(position: int) -> list[int]:
                return self._prefix(sequence, position)

        smallest = self._sizes(at(len(steps) - 1))[index]
        if smallest > budget:
            what = "MACs" if index == 0 else "parameters"
            least = smallest / self.whole[index]
            raise PreconditionError(
                f"prune-channels cannot come below {least:.3f} of the {what} with at most {options.most:g} of each group gone",
                fix=f"give {'macs' if index == 0 else 'params'}={least + 0.01:.2f} or more, or raise most",
            )
        low, high = 0, len(steps) - 1  # the first position that is within the budget
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._sizes(at(middle))[index] <= budget else (middle + 1, high)
        return self._given_back(at(low), index, budget) if options.scope == "group" else at(low)

    def _given_back(self, counts: Sequence[int], index: int, budget: float) -> list[int]:
        """What rounding all groups at once took too much, group by group while it fits the budget, the hardest pruned first."""
        counts = list(counts)
        may = {number for number, count in enumerate(counts) if count}
        while may:
            number = max(may, key=lambda other: (counts[other] / len(self.groups[other].classes), -other))
            fewer = max(level for level in self.levels[number] if level < counts[number])
            tried = [fewer if other == number else count for other, count in enumerate(counts)]
            if self._sizes(tried)[index] > budget:
                may.remove(number)
            else:
                counts = tried
                may -= set() if fewer else {number}
        return counts

    def _saved(self, number: int, index: int) -> float:
        """What one class of a group costs, measured by taking half of the group away."""
        levels = self.levels[number]
        half = _nearest(levels, len(self.groups[number].classes) / 2) or (levels[1] if len(levels) > 1 else 0)
        if not half:
            return 0.0
        counts = [half if other == number else 0 for other in range(len(self.groups))]
        return (self.whole[index] - self._sizes(counts)[index]) / half

    def _prefix(self, sequence: Sequence[tuple[int, int]], position: int) -> list[int]:
        counts = [0] * len(self.groups)
        for index, count in sequence[:position]:
            counts[index] = max(counts[index], count)
        return counts

    def _by_latency(self, goal: float) -> tuple[list[int], dict[str, Any]]:
        """Counts whose latency is measured to be the goal's share of the parent's, and the cost table. Raises PreconditionError."""
        table = self._cost_table()
        worth = [self._worth(index, rows) for index, rows in enumerate(table)]
        sequence = self._sequence(worth)
        measured: dict[int, float] = {}
        low, high = 0, len(sequence)
        position = self._guess(sequence, worth, goal)
        for number in range(ROUNDS):
            measured[position] = self._share(self._prefix(sequence, position))
            self.context.progress("latency", number + 1, ROUNDS, f"{measured[position]:.3f} of the parent's, {goal:g} asked")
            if abs(measured[position] / goal - 1) <= CLOSE / 2:
                break
            low, high = (position + 1, high) if measured[position] > goal else (low, position - 1)
            if low > high:
                break
            position = _between(measured, goal, low, high)
        best = min(measured, key=lambda item: abs(measured[item] - goal))
        if measured[best] > goal * (1 + 2 * CLOSE):
            raise PreconditionError(
                f"prune-channels comes down to {measured[best]:.2f} of the latency with at most {self.options.most:g} of each group gone",
                fix=f"give latency={measured[best] + 0.02:.2f} or more, or raise most",
            )
        counts = self._prefix(sequence, best)
        macs_alone = self._same_macs(counts)
        facts = {
            "asked": goal,
            "measured": measured[best],
            "rounds": len(measured),
            "table_ms": {group.name: [[count, saved] for count, saved in rows] for group, rows in zip(self.groups, table, strict=True)},
            "by_macs_alone": {
                "kept": {group.name: len(group.classes) - count for group, count in zip(self.groups, macs_alone, strict=True)},
                "measured": self._share(macs_alone),
            },
        }
        self.notes.append(f"measured {measured[best]:.3f} of the parent's latency, {goal:g} asked, after {len(measured)} candidates")
        return counts, facts

    def _worth(self, index: int, rows: Sequence[tuple[int, float]]) -> float:
        """Milliseconds that one class of a group saves: measured, but never less than a part of its share of the MACs.

        A small group's saving drowns in the noise of the clock; left out, it could not help to reach the goal.
        """
        by_macs = self.parent_ms * self._saved(index, 0) / self.whole[0]
        return max(LEAST_SHARE * by_macs, *(saved / count for count, saved in rows))

    def _cost_table(self) -> list[list[tuple[int, float]]]:
        """For every group [(classes gone, milliseconds saved)]."""
        rows: list[list[tuple[int, float]]] = [[] for _ in self.groups]
        wanted = [
            (index, count)
            for index, levels in enumerate(self.levels)
            for count in sorted({_nearest(levels, share * len(self.groups[index].classes)) for share in LEVELS} - {0})
        ]
        for start in range(0, len(wanted), TOGETHER):
            models = {"parent": self.artifact}
            for index, count in wanted[start : start + TOGETHER]:
                pruned = self._try([count if other == index else 0 for other in range(len(self.groups))])
                if pruned is not None:
                    models[f"{index}/{count}"] = pruned
            found = self.context.latency(models)
            for index, count in wanted[start : start + TOGETHER]:
                if f"{index}/{count}" in found:
                    rows[index].append((count, found["parent"] - found[f"{index}/{count}"]))
            self.parent_ms = found["parent"]
            self.context.progress("cost table", min(start + TOGETHER, len(wanted)), len(wanted))
        return rows

    def _guess(self, sequence: Sequence[tuple[int, int]], worth: Sequence[float], goal: float) -> int:
        """Where the table says that the goal is."""
        for position in range(len(sequence) + 1):
            counts = self._prefix(sequence, position)
            if sum(count * each for count, each in zip(counts, worth, strict=True)) >= (1 - goal) * self.parent_ms:
                return position
        return len(sequence)

    def _share(self, counts: Sequence[int]) -> float:
        pruned = self._try(counts)
        if pruned is None:
            return 1.0
        found = self.context.latency({"parent": self.artifact, "pruned": pruned})
        return found["pruned"] / found["parent"]

    def _same_macs(self, counts: Sequence[int]) -> list[int]:
        """What a uniform share with the same MACs would remove."""
        budget = self._sizes(counts)[0]
        for step in range(1001):
            uniform = [_nearest(levels, step / 1000 * len(group.classes)) for group, levels in zip(self.groups, self.levels, strict=True)]
            if self._sizes(uniform)[0] <= budget:
                return self._given_back(uniform, 0, budget)
        return list(counts)

    def _try(self, counts: Sequence[int], *, proven: bool = False) -> Artifact | None:
        """The artifact without these, or None when the model does not run then."""
        from deploycc.passes._importance import chosen
        from deploycc.passes._shrink import shrink

        if not any(counts):
            return self.artifact
        try:
            classes = list(chosen(self.groups, counts, self.order))
            shrunk = shrink(self.artifact.model, self.coupling, self.example, classes, proven=proven)
        except Exception:  # noqa: BLE001  (the model's own forward)
            return None
        return self._evolved(shrunk)

    def _evolved(self, shrunk: Shrunk) -> Artifact:
        before = self.artifact
        edits = None if before.edits is None else (*before.edits, shrunk.edit)
        return before.evolve(shrunk.model.eval(), edits=edits, sparse=before.sparse)

    def _removed(self, counts: list[int]) -> tuple[Artifact, list[int]]:
        """Without `counts`; a group that breaks the model is put back alone. Raises NothingToDo when nothing can go."""
        whole = self._try(counts, proven=True)
        accepted = counts if whole is not None else self._bisected(counts)
        for group, asked, done in zip(self.groups, counts, accepted, strict=True):
            if done < asked:
                self.notes.append(f"put back: {group.name}: the model does not run without its channels")
        if not any(accepted):
            raise NothingToDo(
                "prune-channels removes nothing: the groups are too small for the goal, or break the model", fix="leave it out"
            )
        pruned = whole or self._try(accepted, proven=True)
        if pruned is None:
            raise PassError("prune-channels cannot put its groups together", fix="name the layers that stay whole: skip=…, and report it")
        return pruned, accepted

    def _bisected(self, counts: Sequence[int]) -> list[int]:
        accepted = [0] * len(counts)

        def add(members: Sequence[int]) -> None:
            tried = [count if index in members else accepted[index] for index, count in enumerate(counts)]
            if self._try(tried) is not None:
                accepted[:] = tried
            elif len(members) > 1:
                add(members[: len(members) // 2])
                add(members[len(members) // 2 :])

        add([index for index, count in enumerate(counts) if count])
        return accepted


def _captured(artifact: Artifact, example: tuple[torch.Tensor, ...]) -> Any:
    """The exported graph. Raises PreconditionError."""
    from deploycc.forms._edit_graph import capture

    try:
        return capture(artifact.model, example)[0]
    except Exception as cause:
        line = str(cause).strip().splitlines()
        raise PreconditionError(
            f"prune-channels cannot follow {artifact.source}: torch.export says {type(cause).__name__}: {line[0] if line else ''}",
            fix="take Python branches on a tensor's value out of forward(), or leave prune-channels out",
        ) from cause


def _example(artifact: Artifact) -> tuple[torch.Tensor, ...]:
    """Random inputs with a batch of two."""
    import torch

    from deploycc.forms.module import example_sizes, example_tensors

    tensors = example_tensors(artifact.signature, example_sizes(artifact.model, artifact.signature.inputs))
    return tuple(torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == 1 else tensor for tensor in tensors)


def _named(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def _width(group: Group) -> int:
    """Channels of one class: more than one where positions of several parts go together."""
    return max(1, min(group.places.values()))


def _levels(classes: int, width: int, multiple: int, most: float) -> list[int]:
    """How many classes may be gone, 0 first: what stays is a multiple, unless the group never was."""
    unit = multiple // math.gcd(multiple, width)
    found = [0]
    for gone in range(1, int(most * classes + 1e-9) + 1):
        left = classes - gone
        if left >= 1 and (left % unit == 0 or classes < unit):
            found.append(gone)
    return found


def _nearest(levels: Sequence[int], wanted: float) -> int:
    return min(levels, key=lambda level: (abs(level - wanted), level))


def _between(measured: Mapping[int, float], goal: float, low: int, high: int) -> int:
    """By interpolation between the nearest measured positions, inside [low, high]."""
    above = [(share, position) for position, share in measured.items() if share > goal]
    below = [(share, position) for position, share in measured.items() if share <= goal]
    if above and below:
        (a, p), (b, q) = min(above), max(below)
        guess = p + round((a - goal) / max(a - b, 1e-9) * (q - p))
    else:
        share, position = min(((share, position) for position, share in measured.items()), key=lambda item: abs(item[0] - goal))
        guess = round(position * (1 - goal) / max(1 - share, 1e-3)) if share < 1 else (low + high) // 2
    return min(max(guess, low), high)
