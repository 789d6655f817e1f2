"""Outputs against labels, for the reference and the candidate at once; the metrics are torchmetrics'.

A sample with several accepted classes counts as the accepted class that the model itself scores highest: with that, top-k of one
target is exactly "any accepted class is among the best k".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import numpy as np

from deploycc.bench.result import Metric
from deploycc.errors import BenchError, DataError

CLASS_METRICS = ("top1", "top5", "f1")
FLUSH_ROWS = 256  # rows handed to torchmetrics at once: its call costs as much as a small model's

Label = tuple[int, ...] | np.ndarray


class Judge(ABC):
    """Scores of both sides against labels of one kind. `metric` is None when labels and output do not go together."""

    metric: Metric | None = None
    kind: type = object

    def __init__(self) -> None:
        self.labelled = 0

    def add(self, want: np.ndarray, got: np.ndarray, label: Label, name: str) -> None:
        """Add one sample: what each side's first output says about it. Raises DataError."""
        if not isinstance(label, self.kind):
            raise DataError(
                f"{name} has another kind of label than the samples before it", fix="label all samples with classes, or all with arrays"
            )
        self.labelled += 1
        self._judge(want, got, label, name)

    @abstractmethod
    def _judge(self, want: np.ndarray, got: np.ndarray, label: Label, name: str) -> None: ...

    @abstractmethod
    def values(self) -> tuple[float, float]:
        """The metric of (reference, candidate)."""


class Uncounted(Judge):
    """Class labels for an output that is no row of scores."""

    kind = tuple

    def _judge(self, want: np.ndarray, got: np.ndarray, label: Label, name: str) -> None:
        pass

    def values(self) -> tuple[float, float]:
        """There are none."""
        raise BenchError("class labels cannot judge an output that is no row of class scores", fix="use --metric sqnr")


class _Side:
    """One side's metric, fed in groups of rows."""

    def __init__(self, metric: Metric, classes: int) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        self._metric: Any = (
            MulticlassF1Score(classes, average="macro", validate_args=False)
            if metric == "f1"
            else MulticlassAccuracy(classes, top_k=min(5, classes) if metric == "top5" else 1, average="micro", validate_args=False)
        )
        self._rows: list[np.ndarray] = []
        self._targets: list[int] = []

    def add(self, scores: np.ndarray, accepted: np.ndarray) -> bool:
        """Count a row of scores; whether its best class is accepted. NaN counts as the lowest score."""
        row = np.nan_to_num(scores.astype(np.float32), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        self._rows.append(row)
        self._targets.append(int(accepted[np.argmax(row[accepted])]))
        if len(self._rows) == FLUSH_ROWS:
            self._flush()
        return bool(np.argmax(row) in accepted)

    def value(self) -> float:
        """The metric over all rows."""
        self._flush()
        return float(self._metric.compute())

    def _flush(self) -> None:
        import torch

        if self._rows:
            self._metric.update(torch.as_tensor(np.stack(self._rows)), torch.as_tensor(self._targets))
            self._rows, self._targets = [], []


class Classes(Judge):
    """Class labels against rows of scores; counts samples that turned right or wrong."""

    kind = tuple

    def __init__(self, metric: Metric, classes: int) -> None:
        super().__init__()
        self.metric = metric
        self.right_to_wrong = 0
        self.wrong_to_right = 0
        self._classes = classes
        self._reference, self._candidate = _Side(metric, classes), _Side(metric, classes)

    def _judge(self, want: np.ndarray, got: np.ndarray, label: Label, name: str) -> None:
        accepted = np.asarray(label, np.int64)
        if not accepted.size or accepted.min() < 0 or accepted.max() >= self._classes:
            given = ", ".join(map(str, accepted.tolist())) or "nothing"
            raise DataError(
                f"{name} has the label {given}, but the model's classes are 0 to {self._classes - 1}",
                fix="label the data with the class indices that the model was trained with",
            )
        right = self._reference.add(want.reshape(-1), accepted), self._candidate.add(got.reshape(-1), accepted)
        self.right_to_wrong += right == (True, False)
        self.wrong_to_right += right == (False, True)

    def values(self) -> tuple[float, float]:
        """The metric of (reference, candidate)."""
        return self._reference.value(), self._candidate.value()


class Arrays(Judge):
    """Array labels against the first output: mean squared error."""

    metric = "mse"
    kind = np.ndarray

    def __init__(self) -> None:
        from torchmetrics import MeanSquaredError

        super().__init__()
        self._reference: Any = MeanSquaredError()
        self._candidate: Any = MeanSquaredError()

    def _judge(self, want: np.ndarray, got: np.ndarray, label: Label, name: str) -> None:
        import torch

        array = np.asarray(label)
        if array.size != want.size:
            raise DataError(
                f"{name} has a label of shape {list(array.shape)}, but the output is {list(want.shape)} per sample",
                fix="give labels in the shape of the model's first output",
            )
        target = torch.as_tensor(array.reshape(-1).astype(np.float32))
        for metric, row in ((self._reference, want), (self._candidate, got)):
            metric.update(torch.as_tensor(row.reshape(-1).astype(np.float32)), target)

    def values(self) -> tuple[float, float]:
        """The error of (reference, candidate)."""
        return float(self._reference.compute()), float(self._candidate.compute())


def judge_for(metric: str, label: Label, row: np.ndarray, name: str) -> Judge:
    """What judges labels like this one, against output rows like this one. Raises BenchError when `metric` does not fit them."""
    if isinstance(label, np.ndarray):
        if metric in CLASS_METRICS:
            raise BenchError(
                f"the metric {metric} needs class labels, but {name} has an array", fix="use --metric mse, or label the data with classes"
            )
        return Arrays()
    if metric == "mse":
        raise BenchError(f"the metric mse needs array labels, but {name} has a class", fix="use --metric top1, or label with arrays")
    if row.ndim == 1 and row.size >= 2 and row.dtype.kind == "f":
        return Classes(cast(Metric, metric) if metric in CLASS_METRICS else "top1", row.size)
    if metric in CLASS_METRICS:
        raise BenchError(
            f"the metric {metric} needs a row of class scores per sample, but the first output gives {row.dtype}{list(row.shape)}",
            fix="use --metric sqnr, or a model that returns class scores first",
        )
    return Uncounted()
