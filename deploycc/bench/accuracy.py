"""The gate's numbers, from the real artifact in its real runtime on real samples, paired with the float reference.

    top1, top5   share of samples with an accepted class among the best 1 or 5          (torchmetrics MulticlassAccuracy, micro)
    f1           macro F1 over the classes                                              (torchmetrics MulticlassF1Score)
    mse          mean squared error against array labels, on the first output           (torchmetrics MeanSquaredError)
    agreement    share of samples where both have the same best class
    cosine       mean over samples of r·x / (‖r‖ ‖x‖), on the first output: for embeddings, whose best class means nothing
    sqnr         10·log10(Σ r² / Σ (r − x)²) over all outputs

A sample may have several accepted classes; it counts as the accepted class that the model itself scores highest. With that, top-k of
one target is exactly "any accepted class is among the best k".

The rule of the gate: a share may drop by `max_drop` at most; mse may grow by `max_drop` of the reference's at most; without labels,
agreement, cosine and SQNR have floors of their own in the target's limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast, get_args

import numpy as np

from deploycc.bench.labels import Classes, Judge, judge_for
from deploycc.bench.result import Accuracy, Metric, Verdict
from deploycc.core.artifact import Outputs
from deploycc.core.compare import is_scores
from deploycc.core.contract import Progress, Session, silent
from deploycc.core.data import Batch
from deploycc.core.target import Limits
from deploycc.errors import BenchError, UsageError

ROUNDING = 1e-6  # torchmetrics divides in float32: a drop of exactly the limit passes


def evaluate(
    reference: Session,
    candidate: Session,
    pairs: Iterable[tuple[Batch, Batch]],
    *,
    metric: str = "auto",
    progress: Progress = silent,
) -> Accuracy:
    """Run both on the same samples; memory does not grow with their number.

    Args:
        reference: the float model.
        candidate: the artifact.
        pairs: (reference's batch, candidate's batch) of the same samples; feeds may differ in form.
        metric: a Metric, or "auto": top1 for class labels, mse for array labels, else agreement, else sqnr.
        progress: told the number of samples done.

    Raises:
        UsageError: an unknown metric.
        BenchError: no samples, a metric that the labels or outputs do not allow, outputs that do not match, NaN from the reference.
        DataError: a label outside the classes, or of another shape than the output.
    """
    if metric not in ("auto", *get_args(Metric)):
        raise UsageError(f"there is no metric '{metric}'", fix=f"use one of auto, {', '.join(get_args(Metric))}")
    differences = _Differences()
    judge: Judge | None = None
    for want_batch, got_batch in pairs:
        if want_batch.ids != got_batch.ids:
            raise BenchError(
                f"the reference is given {', '.join(want_batch.ids[:3])}, the candidate {', '.join(got_batch.ids[:3])}",
                fix="give both the same samples in the same batches (a fixed batch size must be equal)",
            )
        want = _real_rows(reference.run(want_batch.feeds), want_batch)
        got = _real_rows(candidate.run(got_batch.feeds), got_batch)
        differences.add(want, got, want_batch.ids)
        for row, (label, name) in enumerate(zip(want_batch.labels, want_batch.ids, strict=True)):
            if label is not None:
                first, other = _row(want, row, len(want_batch.ids)), _row(got, row, len(want_batch.ids))
                judge = judge or judge_for(metric, label, first, name)
                judge.add(first, other, label, name)
        progress("judging", differences.samples, None)
    return _conclude(metric, differences, judge)


def _conclude(metric: str, differences: _Differences, judge: Judge | None) -> Accuracy:
    if differences.samples == 0:
        raise BenchError("there are no samples to judge the artifact with", fix="give data with --data")
    agreement, sqnr = differences.agreement(), differences.sqnr_db()
    chosen, want, got = ("cosine", 1.0, differences.cosine()) if metric == "cosine" else _chosen(metric, agreement, sqnr, judge)
    paired = judge if isinstance(judge, Classes) else None
    return Accuracy(
        metric=chosen,
        reference=want,
        candidate=got,
        agreement=agreement,
        right_to_wrong=paired.right_to_wrong if paired else None,
        wrong_to_right=paired.wrong_to_right if paired else None,
        sqnr_db=sqnr,
        max_abs=differences.max_abs,
        samples=differences.samples,
        labelled=judge.labelled if judge else 0,
        broken=differences.broken,
    )


def _chosen(metric: str, agreement: float | None, sqnr: float, judge: Judge | None) -> tuple[Metric, float | None, float]:
    """(metric, the reference's value, the candidate's)."""
    if metric in ("auto", "agreement", "sqnr"):
        if judge is not None and metric == "auto" and judge.metric is not None:
            return (judge.metric, *judge.values())
        if agreement is not None and metric != "sqnr":
            return "agreement", 1.0, agreement
        if metric == "agreement":
            raise BenchError("agreement needs rows of class scores, and the first output has none", fix="use --metric sqnr")
        return "sqnr", None, sqnr
    if judge is None:
        raise BenchError(f"the metric {metric} needs labels, and no sample has one", fix="give labelled data, or use --metric auto")
    return (cast(Metric, metric), *judge.values())


def gate(accuracy: Accuracy, limits: Limits, max_drop: float | None = None) -> Verdict:
    """Judge `accuracy`; `max_drop` replaces the target's `accuracy_drop`."""
    drop = limits.accuracy_drop if max_drop is None else max_drop
    got, want = accuracy.candidate, accuracy.reference
    if accuracy.broken:
        reason = f"the artifact gives NaN or Inf on {accuracy.broken} of {accuracy.samples} samples"
        return Verdict(passed=False, rule="outputs are numbers", reason=reason)
    if accuracy.metric == "agreement":
        rule, reason = f"agreement ≥ {limits.agreement:.1%}", f"{got:.1%} of {accuracy.samples} samples agree"
        return Verdict(passed=got + ROUNDING >= limits.agreement, rule=rule, reason=reason)
    if accuracy.metric == "cosine":
        rule, reason = f"cosine ≥ {limits.cosine:g}", f"{got:.5f} on average over {accuracy.samples} samples"
        return Verdict(passed=got + ROUNDING >= limits.cosine, rule=rule, reason=reason)
    if accuracy.metric == "sqnr" or want is None:
        rule, reason = f"SQNR ≥ {limits.sqnr_db:g} dB", f"{got:.1f} dB on {accuracy.samples} samples"
        return Verdict(passed=got >= limits.sqnr_db, rule=rule, reason=reason)
    if accuracy.metric == "mse":
        growth = (got - want) / want if want > 0 else (0.0 if got == 0 else math.inf)
        rule, reason = f"mse grows by at most {drop:.1%}", f"{want:.6g} → {got:.6g} ({growth:+.2%}) on {accuracy.labelled} samples"
        return Verdict(passed=growth <= drop + ROUNDING, rule=rule, reason=reason)
    rule = f"{accuracy.metric} drops by at most {drop:.2%}"
    reason = f"{want:.2%} → {got:.2%} ({got - want:+.2%}) on {accuracy.labelled} samples, one is worth {1 / accuracy.labelled:.2%}"
    return Verdict(passed=want - got <= drop + ROUNDING, rule=rule, reason=reason)


def _first(outputs: Outputs) -> np.ndarray:
    return next(iter(outputs.values()))


def _row(outputs: Outputs, row: int, count: int) -> np.ndarray:
    """The part of the first output that belongs to sample `row` of `count`."""
    first = _first(outputs)
    if first.ndim and len(first) == count:
        return first[row]
    if count == 1:
        return first
    raise BenchError(
        f"the first output has shape {list(first.shape)} for {count} samples: labels cannot be matched to its rows",
        fix="capture the model with batch size 1, or give data without labels",
    )


def _real_rows(outputs: Outputs, batch: Batch) -> Outputs:
    """Without the rows that only fill up a fixed batch size."""
    size = len(next(iter(batch.feeds.values())))
    if len(batch.ids) == size:
        return outputs
    return {name: array[: len(batch.ids)] if array.ndim and len(array) == size else array for name, array in outputs.items()}


class _Differences:
    """Running sums over all outputs."""

    def __init__(self) -> None:
        self.samples = 0
        self.broken = 0
        self.max_abs = 0.0
        self._signal = 0.0
        self._noise = 0.0
        self._same = 0
        self._scored = 0
        self._cosines = 0.0

    def add(self, want: Outputs, got: Outputs, ids: tuple[str, ...]) -> None:
        if list(want) != list(got):
            raise BenchError(
                f"the reference's outputs are {', '.join(want)}, the candidate's {', '.join(got)}",
                fix="a pass renamed outputs: report it, and leave the pass out with --passes",
            )
        broken = np.zeros(len(ids), bool)
        for name, array in want.items():
            broken |= self._add_output(name, array, got[name], ids)
        self.broken += int(broken.sum())
        self.samples += len(ids)
        first, other = _first(want), _first(got)
        self._cosines += float(_cosines(first, other, len(ids))[~broken].sum())
        if is_scores(first):
            self._same += int(np.sum((np.argmax(first, 1) == np.argmax(other, 1)) & ~broken))
            self._scored += len(first)

    def _add_output(self, name: str, want: np.ndarray, got: np.ndarray, ids: tuple[str, ...]) -> np.ndarray:
        """Add one output; which samples are broken in it (all of them, when rows are not samples)."""
        if want.shape != got.shape:
            raise BenchError(
                f"output '{name}' has shape {list(want.shape)} from the reference and {list(got.shape)} from the candidate",
                fix="a pass changed the output: report it, and leave the pass out with --passes",
            )
        a, b = want.astype(np.float64), got.astype(np.float64)
        if np.isnan(a).any():
            raise BenchError(
                f"the float reference gives NaN in output '{name}' on {', '.join(ids[:3])}",
                fix="check the model's weights and the data's pre-processing: nothing can be compared with NaN",
            )
        usable = np.isfinite(a)
        bad = usable & ~np.isfinite(b)
        compared = usable & ~bad
        distance = np.abs(a[compared] - b[compared])
        self._signal += float(np.sum(np.square(a[compared])))
        self._noise += float(np.sum(np.square(distance)))
        self.max_abs = max(self.max_abs, float(np.max(distance, initial=0.0)))
        if a.ndim and len(a) == len(ids):
            return np.any(bad.reshape(len(ids), -1), axis=1, keepdims=True)[:, 0]
        return np.full(len(ids), bool(bad.any()))

    def agreement(self) -> float | None:
        return self._same / self._scored if self._scored else None

    def cosine(self) -> float:
        return self._cosines / self.samples

    def sqnr_db(self) -> float:
        if self.broken:
            return -math.inf
        if self._noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self._signal / self._noise) if self._signal else -math.inf


def _cosines(want: np.ndarray, got: np.ndarray, count: int) -> np.ndarray:
    """Of each of `count` samples; of all together where rows are not samples. Two zero vectors are alike, one is like nothing."""
    rows = count if want.ndim and len(want) == count else 1
    a, b = (np.nan_to_num(array.reshape(rows, -1).astype(np.float64), posinf=0.0, neginf=0.0) for array in (want, got))
    lengths: list[np.ndarray] = [np.sqrt(np.square(side).sum(axis=1)) for side in (a, b)]
    product: np.ndarray = lengths[0] * lengths[1]
    same: np.ndarray = np.equal(*lengths).astype(np.float64)
    found: np.ndarray = np.divide(np.sum(a * b, axis=1), product, out=same, where=product > 0)
    return np.broadcast_to(found, (count,))
