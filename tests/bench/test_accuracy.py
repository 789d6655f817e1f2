from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deploycc.bench.accuracy import evaluate, gate
from deploycc.bench.labels import FLUSH_ROWS
from deploycc.bench.result import Accuracy, Metric
from deploycc.core.artifact import Feeds, Outputs, Signature
from deploycc.core.compare import drift
from deploycc.core.data import Batch
from deploycc.core.target import Limits
from deploycc.errors import BenchError, DataError, UsageError

RNG = np.random.default_rng(0)
CLASSES = 10


class Table:
    """A session that looks its answers up: the input is the row's number."""

    signature = Signature((), ())

    def __init__(self, *tables: np.ndarray, names: tuple[str, ...] = ("y",)) -> None:
        self.tables = dict(zip(names, tables, strict=True))

    def run(self, feeds: Feeds) -> Outputs:
        rows = feeds["row"].astype(int).reshape(-1)
        return {name: table[rows] for name, table in self.tables.items()}

    def synchronize(self) -> None: ...

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *exc: object) -> None: ...


def pairs(labels: list[Any], size: int = 1) -> Iterator[tuple[Batch, Batch]]:
    """The same samples for both sides, with feeds of unlike dtype; the last batch is filled up like core.data does."""
    for start in range(0, len(labels), size):
        group = labels[start : start + size]
        rows = list(range(start, start + len(group)))
        rows += [rows[-1]] * (size - len(rows))
        ids = tuple(f"sample {row}" for row in range(start, start + len(group)))
        feeds = [{"row": np.array(rows, dtype)} for dtype in (np.float32, np.uint16)]
        yield Batch(feeds[0], tuple(group), ids), Batch(feeds[1], tuple(group), ids)


def scores(count: int) -> np.ndarray:
    return RNG.standard_normal((count, CLASSES)).astype(np.float32)


def noisy(table: np.ndarray, amount: float = 0.5) -> np.ndarray:
    return (table + amount * np.random.default_rng(1).standard_normal(table.shape)).astype(table.dtype)


def top(table: np.ndarray, labels: list[tuple[int, ...]], k: int) -> float:
    """Share of samples with an accepted class among the best k: the definition, by sorting."""
    best = np.argsort(-table, axis=1)[:, :k]
    return float(np.mean([bool(set(row) & set(label)) for row, label in zip(best.tolist(), labels, strict=True)]))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(("metric", "k"), [("auto", 1), ("top1", 1), ("top5", 5)])
def test_class_metrics_equal_their_definition_also_with_several_accepted_classes(metric: str, k: int, size: int):
    want = scores(67)
    got = noisy(want)
    labels = [tuple(RNG.choice(CLASSES, RNG.integers(1, 4), replace=False).tolist()) for _ in range(67)]
    found = evaluate(Table(want), Table(got), pairs(labels, size), metric=metric)
    assert found.metric == ("top5" if k == 5 else "top1")
    assert found.reference == pytest.approx(top(want, labels, k))
    assert found.candidate == pytest.approx(top(got, labels, k))
    right = [np.array([row.argmax() in label for row, label in zip(table, labels, strict=True)]) for table in (want, got)]
    assert found.right_to_wrong == int(np.sum(right[0] & ~right[1]))
    assert found.wrong_to_right == int(np.sum(~right[0] & right[1]))
    assert found.right_to_wrong > 0
    assert found.agreement == pytest.approx(np.mean(want.argmax(1) == got.argmax(1)))
    assert (found.samples, found.labelled) == (67, 67)


def test_f1_is_macro_over_the_classes_seen():
    from sklearn.metrics import f1_score

    want = scores(80)
    got = noisy(want)
    truth = RNG.integers(0, CLASSES, 80).tolist()
    found = evaluate(Table(want), Table(got), pairs([(label,) for label in truth]), metric="f1")
    assert found.reference == pytest.approx(f1_score(truth, want.argmax(1), average="macro"), abs=1e-6)
    assert found.candidate == pytest.approx(f1_score(truth, got.argmax(1), average="macro"), abs=1e-6)


def test_more_samples_than_are_kept_at_once_all_count():
    count = FLUSH_ROWS + 37
    want = scores(count)
    labels = [(int(row.argmax()),) if index % 3 else (int(row.argmin()),) for index, row in enumerate(want)]
    found = evaluate(Table(want), Table(want), pairs(labels, 7))
    assert found.reference == found.candidate == pytest.approx(top(want, labels, 1))


def test_array_labels_give_mse():
    want = RNG.standard_normal((30, 2, 3)).astype(np.float32)
    got, truth = noisy(want, 0.1), noisy(want, 0.3)
    found = evaluate(Table(want), Table(got), pairs(list(truth), 4))
    assert found.metric == "mse"
    assert found.reference == pytest.approx(np.mean((want - truth) ** 2), rel=1e-5)
    assert found.candidate == pytest.approx(np.mean((got - truth) ** 2), rel=1e-5)
    assert found.agreement is None


def test_without_labels_it_is_agreement_for_scores_and_sqnr_for_the_rest():
    want = scores(40)
    got = noisy(want)
    found = evaluate(Table(want), Table(got), pairs([None] * 40))
    assert (found.metric, found.reference) == ("agreement", 1.0)
    assert found.candidate == pytest.approx(np.mean(want.argmax(1) == got.argmax(1)))
    images = RNG.standard_normal((10, 3, 4, 4)).astype(np.float32)
    found = evaluate(Table(images), Table(noisy(images)), pairs([None] * 10, 4))
    assert (found.metric, found.reference, found.agreement) == ("sqnr", None, None)


@pytest.mark.parametrize("size", [1, 3])
def test_streamed_sqnr_and_distance_equal_those_of_all_outputs_at_once(size: int):
    want, other = scores(20), RNG.standard_normal((20, 4)).astype(np.float32)
    got, got_other = noisy(want), noisy(other)
    found = evaluate(Table(want, other, names=("a", "b")), Table(got, got_other, names=("a", "b")), pairs([None] * 20, size))
    whole = drift([{"a": want, "b": other}], [{"a": got, "b": got_other}])
    assert found.sqnr_db == pytest.approx(whole.sqnr_db)
    assert found.max_abs == pytest.approx(whole.max_abs)
    assert found.samples == 20


def test_equal_models_are_equal():
    want = scores(10)
    found = evaluate(Table(want), Table(want), pairs([None] * 10), metric="sqnr")
    assert (found.metric, found.candidate, found.max_abs) == ("sqnr", math.inf, 0.0)
    assert gate(found, Limits()).passed


def test_some_unlabelled_samples_are_left_out_of_the_metric_only():
    want = scores(6)
    found = evaluate(Table(want), Table(want), pairs([None, (int(want[1].argmax()),), None, (int(want[3].argmin()),), None, None]))
    assert (found.metric, found.labelled, found.samples, found.candidate) == ("top1", 2, 6, 0.5)


def test_cosine_by_hand_sample_by_sample():
    want = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]], np.float32)
    got = np.array([[6.0, 8.0], [0.0, 5.0], [1.0, 1.0]], np.float32)  # the same direction, a right angle, the same direction
    for size in (1, 2):  # the last batch is filled up, and what fills it does not count
        found = evaluate(Table(want), Table(got), pairs([None] * 3, size), metric="cosine")
        assert (found.metric, found.reference) == ("cosine", 1.0)
        assert found.candidate == pytest.approx(2 / 3)
    verdict = gate(found, Limits(cosine=0.9))
    assert not verdict.passed
    assert verdict.rule == "cosine ≥ 0.9"
    assert "0.66667 on average over 3 samples" in verdict.reason
    assert gate(found, Limits(cosine=0.6)).passed


def test_a_zero_vector_is_like_another_and_like_nothing_else():
    want, got = np.zeros((2, 3), np.float32), np.array([[0.0, 0, 0], [1, 0, 0]], np.float32)
    assert evaluate(Table(want), Table(got), pairs([None] * 2), metric="cosine").candidate == pytest.approx(0.5)


def test_nan_from_the_candidate_is_counted_and_refused_by_the_gate():
    want = scores(10)
    got = want.copy()
    got[3, 0], got[7, 2] = np.nan, np.inf
    found = evaluate(Table(want), Table(got), pairs([(0,)] * 10, 2))
    assert found.broken == 2
    verdict = gate(found, Limits(accuracy_drop=1.0, agreement=0.0, sqnr_db=-1000.0))
    assert not verdict.passed
    assert verdict.reason == "the artifact gives NaN or Inf on 2 of 10 samples"


def test_nan_from_the_reference_is_an_error_and_its_infinity_is_not():
    want = scores(4)
    want[1, 0] = np.nan
    with pytest.raises(BenchError, match=r"the float reference gives NaN in output 'y' on sample 1"):
        evaluate(Table(want), Table(want), pairs([None] * 4))
    want[1, 0] = -np.inf
    assert evaluate(Table(want), Table(want), pairs([None] * 4)).broken == 0


@pytest.mark.parametrize(
    ("labels", "metric", "error", "message"),
    [
        ([], "auto", BenchError, "no samples to judge"),
        ([None], "top1", BenchError, "the metric top1 needs labels, and no sample has one"),
        ([np.zeros(10)], "top1", BenchError, "the metric top1 needs class labels, but sample 0 has an array"),
        ([(1,)], "mse", BenchError, "the metric mse needs array labels, but sample 0 has a class"),
        ([(10,)], "auto", DataError, "sample 0 has the label 10, but the model's classes are 0 to 9"),
        ([(-1, 3)], "auto", DataError, "sample 0 has the label -1, 3, but"),
        ([()], "auto", DataError, "sample 0 has the label nothing, but"),
        ([np.zeros(3)], "auto", DataError, r"sample 0 has a label of shape \[3\], but the output is \[10\] per sample"),
        ([(1,), np.zeros(10)], "auto", DataError, "sample 1 has another kind of label"),
        ([None], "recall", UsageError, "no metric 'recall'\n  fix: use one of auto, top1, top5, f1, mse, agreement, cosine, sqnr"),
    ],
)
def test_labels_that_cannot_be_used_are_named(labels: list[Any], metric: str, error: type[Exception], message: str):
    want = scores(4)
    with pytest.raises(error, match=message):
        evaluate(Table(want), Table(want), pairs(labels), metric=metric)


@pytest.mark.parametrize(
    ("metric", "label", "message"), [("top5", (0,), "top5 needs a row of class scores"), ("agreement", None, "agreement needs rows of")]
)
def test_class_metrics_of_an_output_without_classes_are_refused(metric: str, label: Any, message: str):
    images = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)
    with pytest.raises(BenchError, match=message):
        evaluate(Table(images), Table(images), pairs([label] * 2), metric=metric)


def test_class_labels_for_an_output_without_classes_leave_sqnr():
    images = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)
    found = evaluate(Table(images), Table(images), pairs([(0,), (1,)]))
    assert (found.metric, found.labelled) == ("sqnr", 2)


def test_outputs_that_do_not_match_are_named():
    want = scores(4)
    with pytest.raises(BenchError, match=r"the reference's outputs are y, the candidate's z"):
        evaluate(Table(want), Table(want, names=("z",)), pairs([None] * 4))
    with pytest.raises(BenchError, match=r"output 'y' has shape \[1, 10\] from the reference and \[1, 9\]"):
        evaluate(Table(want), Table(want[:, :9]), pairs([None] * 4))


def test_unlike_samples_are_refused():
    want = scores(4)
    left, right = next(pairs([None])), next(pairs([None] * 2, 2))
    with pytest.raises(BenchError, match="the reference is given sample 0, the candidate sample 0, sample 1"):
        evaluate(Table(want), Table(want), [(left[0], right[1])])


def test_labels_that_match_no_row_are_refused():
    class Flat(Table):
        def run(self, feeds: Feeds) -> Outputs:
            return {"y": np.zeros(7, np.float32)}

    with pytest.raises(BenchError, match=r"has shape \[7\] for 2 samples: labels cannot be matched"):
        evaluate(Flat(names=()), Flat(names=()), pairs([(0,), (1,)], 2))


def accuracy(metric: Metric, reference: float | None, candidate: float) -> Accuracy:
    return Accuracy(
        metric=metric,
        reference=reference,
        candidate=candidate,
        agreement=None,
        right_to_wrong=None,
        wrong_to_right=None,
        sqnr_db=20.0,
        max_abs=0.1,
        samples=200,
        labelled=200,
    )


@pytest.mark.parametrize(
    ("metric", "reference", "candidate", "max_drop", "passed"),
    [
        ("top1", 0.80, 0.80, None, True),
        ("top1", 0.80, 0.79, None, True),
        ("top1", 0.80, 0.785, None, False),
        ("top1", 0.80, 0.785, 0.02, True),
        ("top1", 0.80, 0.795, 0.0, False),
        ("top1", 0.80, 0.90, 0.0, True),
        ("f1", 0.80, 0.70, None, False),
        ("mse", 2.0, 2.02, None, True),
        ("mse", 2.0, 2.03, None, False),
        ("mse", 2.0, 1.0, 0.0, True),
        ("mse", 0.0, 0.0, None, True),
        ("mse", 0.0, 1e-9, None, False),
        ("agreement", 1.0, 0.95, None, True),
        ("agreement", 1.0, 0.945, None, False),
        ("sqnr", None, 15.0, None, True),
        ("sqnr", None, 14.9, None, False),
        ("sqnr", None, -math.inf, None, False),
    ],
)
def test_the_gates_rules(metric: Metric, reference: float | None, candidate: float, max_drop: float | None, passed: bool):
    verdict = gate(accuracy(metric, reference, candidate), Limits(), max_drop)
    assert verdict.passed is passed
    assert verdict.rule
    assert "200 samples" in verdict.reason


def test_the_reason_says_what_one_sample_is_worth():
    verdict = gate(accuracy("top1", 0.8, 0.795), Limits())
    assert verdict.reason == "80.00% → 79.50% (-0.50%) on 200 samples, one is worth 0.50%"
    assert verdict.rule == "top1 drops by at most 1.00%"
