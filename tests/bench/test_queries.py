from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from deploycc.bench.queries import Crew, batch_of, batched
from deploycc.errors import BenchError
from deploycc.runtime.signature import Signature, TensorSpec

FREE = Signature((TensorSpec("x", "float32", ("N", 2)),), ())
FIXED = Signature((TensorSpec("x", "float32", (1, 2)),), ())
FEEDS = [{"x": np.full((1, 2), value, np.float32)} for value in range(3)]


def test_batches_are_made_of_real_samples_in_turn():
    found = batched(FEEDS, FREE, 4, "net")
    assert [item["x"][:, 0].tolist() for item in found] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]
    assert batched(found, FREE, 2, "net")[0]["x"].shape == (2, 2)
    assert batched(FEEDS, FIXED, 1, "net") == FEEDS
    assert batch_of(found[0]) == 4
    assert batch_of({"x": np.zeros((2, 1)), "y": np.zeros((3, 1))}) == 1
    assert batch_of({"x": np.zeros(())}) == 1


def test_a_fixed_batch_is_refused_with_the_way_out():
    with pytest.raises(BenchError, match=r"'net' cannot take batches of 4: its input is x: float32\[1, 2\]\n.*--input x:Nx2"):
        batched(FEEDS, FIXED, 4, "net")


def test_a_query_is_as_many_calls_at_the_same_time_as_there_are_sessions():
    together = threading.Barrier(3, timeout=5)
    seen: list[int] = []

    def call(number: int) -> None:
        seen.append(number)
        together.wait()

    with Crew([call] * 3) as crew:
        crew.query(2)
        crew.query(3)
    assert sorted(seen) == [6, 7, 8, 9, 10, 11]


def test_what_a_call_raises_comes_back_and_the_crew_goes_on():
    def call(number: int) -> None:
        if number == 1:
            raise ValueError("broken")

    with Crew([call, call]) as crew:
        with pytest.raises(ValueError, match="broken"):
            crew.query(0)
        crew.query(1)
    assert threading.active_count() < 20


def test_moments_are_those_of_the_clock():
    with Crew([lambda number: time.sleep(0.02)]) as crew:
        begin = time.perf_counter_ns()
        crew.todo.put(5)
        ((number, moment),) = crew.wait(1)
    assert number == 5
    assert moment - begin >= 20_000_000
