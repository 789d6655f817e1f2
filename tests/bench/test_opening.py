from __future__ import annotations

import numpy as np
import pytest

from deploycc import render_bench
from deploycc.bench.harness import measure
from deploycc.bench.opening import Candidate, Opening
from deploycc.bench.scenario import Scenario
from deploycc.core.artifact import Feeds, Outputs, Signature, TensorSpec
from deploycc.core.target import Bench

FEEDS = [{"x": np.zeros((1, 2), np.float32)}]


class Ledger:
    """Sessions that write down who is opened and closed."""

    signature = Signature((TensorSpec("x", "float32", ("N", 2)),), ())

    def __init__(self, name: str, book: list[str]) -> None:
        self.name, self.book = name, book
        book.append(f"+{name}")

    def run(self, feeds: Feeds) -> Outputs:
        if f"-{self.name}" == self.book[-1]:
            raise AssertionError("it is closed")
        return {}

    def synchronize(self) -> None:
        """Nothing is pending."""

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.book.append(f"-{self.name}")


def candidates(book: list[str], names: str = "abc") -> list[Candidate]:
    return [Candidate(name, lambda name=name: Ledger(name, book), FEEDS) for name in names]


def test_all_are_closed_before_they_are_opened_anew_in_another_order():
    book: list[str] = []
    with Opening(candidates(book), Scenario(), queued=False, seed=1) as opening:
        for _ in range(4):
            opening.again()
            assert [entry.name for entry in opening.entries] == ["a", "b", "c"]
    orders = ["".join(item[1] for item in book[start : start + 3]) for start in range(0, len(book), 6)]
    assert orders[0] == "abc"
    assert len(set(orders)) > 2
    assert [{item[0] for item in book[start : start + 3]} for start in range(0, len(book), 3)] == [{"+"}, {"-"}] * 5


def test_a_candidate_that_cannot_be_opened_closes_the_others():
    book: list[str] = []

    def fail() -> Ledger:
        raise RuntimeError("no memory")

    with (
        pytest.raises(RuntimeError, match="no memory"),
        Opening([*candidates(book, "a"), Candidate("b", fail, FEEDS)], Scenario(), queued=False, seed=0),
    ):
        pass
    assert book == ["+a", "-a"]


def test_every_session_of_several_streams_and_batches_is_opened_anew():
    book: list[str] = []
    scenario = Scenario(kind="offline", streams=2, batches=(1, 4))
    found = measure(candidates(book, "a"), settings=Bench(min_seconds=0.02, min_runs=10, sessions=3), scenario=scenario)
    assert (book.count("+a"), book.count("-a")) == (6, 6)
    assert [item.name for item in found.measurements] == ["a @ 1", "a @ 4"]
    assert [len(item.openings) for item in found.measurements] == [3, 3]


def test_first_answers_and_memory_are_those_of_the_first_opening():
    book: list[str] = []
    with Opening(candidates(book, "a"), Scenario(), queued=False, seed=0) as opening:
        cold = opening.colds["a"]
        opening.again()
        assert opening.colds["a"] is cold


def test_where_queries_arrive_at_random_each_is_opened_once_and_the_result_says_so():
    book: list[str] = []
    settings = Bench(min_seconds=0.05, min_runs=10)
    found = measure(candidates(book, "a"), settings=settings, scenario=Scenario(kind="server", qps=200.0))
    assert settings.sessions > 1
    assert (found.settings.sessions, found.get("a").openings, book) == (1, (0,), ["+a", "-a"])


@pytest.mark.parametrize(("sessions", "said"), [(1, False), (3, True)])
def test_the_table_says_how_often_each_was_opened(sessions: int, said: bool):
    settings = Bench(min_seconds=0.02, min_runs=10, sessions=sessions)
    title = str(render_bench.bench_table(measure(candidates([], "a"), settings=settings)).title)
    assert (", each opened 3 times" in title) is said
