from __future__ import annotations

import gc
import time
from types import SimpleNamespace

import numpy as np
import pytest

from deploycc.runtime import measure
from deploycc.runtime.measure import MIN_ROUNDS, Stop, Warm, interleave, time_interleaved, warm_up


def busy(microseconds: float):
    def call(index: int) -> None:
        end = time.perf_counter_ns() + int(microseconds * 1000)
        while time.perf_counter_ns() < end:
            pass

    return call


def test_every_candidate_gets_its_runs_and_seconds_in_the_same_rounds():
    found = time_interleaved({"fast": busy(200), "slow": busy(1000)}, Stop(0.05, 12), warmup_seconds=0.01)
    assert found["fast"].rounds == found["slow"].rounds >= MIN_ROUNDS
    for item in found.values():
        assert len(item.ns) >= 12
        assert item.ns.sum() >= 0.05e9
        assert item.warmups >= 2 * 3
    assert found["fast"].per_round > found["slow"].per_round >= 3
    assert np.median(found["slow"].ns) > 3 * np.median(found["fast"].ns)


def test_runs_decide_when_calls_are_slow():
    found = time_interleaved({"a": busy(500)}, Stop(0.001, 40), warmup_seconds=0.01)
    assert len(found["a"].ns) >= 40


def test_the_order_is_random_seeded_and_every_candidate_runs_in_every_round():
    def order(seed: int) -> list[str]:
        seen: list[str] = []

        def call(name: str):
            def run(index: int) -> None:
                if not seen or seen[-1] != name:
                    seen.append(name)
                busy(100)(index)

            return run

        time_interleaved({name: call(name) for name in "abc"}, Stop(1e-4, 60), warmup_seconds=0.0005, seed=seed)
        return seen[3:]

    first = order(0)
    assert first[:12] == order(0)[:12]
    assert first[:12] != list("abc" * 4)


def test_feeds_take_turns():
    seen: set[int] = set()
    time_interleaved({"a": lambda index: seen.add(index % 3)}, Stop(0.001, 10), warmup_seconds=0.001)
    assert seen == {0, 1, 2}


def test_an_error_in_a_call_gives_the_collector_back():
    def fail(index: int) -> None:
        if not gc.isenabled():
            raise RuntimeError("in the timed part")
        busy(100)(index)

    with pytest.raises(RuntimeError, match="timed part"):
        time_interleaved({"a": fail}, Stop(0.01, 5), warmup_seconds=0.001)
    assert gc.isenabled()


def test_progress_ends_at_a_hundred():
    told: list[int] = []
    time_interleaved({"a": busy(100)}, Stop(0.01, 5), warmup_seconds=0.001, progress=lambda what, done, total: told.append(done))
    assert told == sorted(told)
    assert told[-1] == 100


def test_the_loop_costs_under_three_microseconds_a_call():
    begin = time.perf_counter_ns()
    measure.timed_block(lambda index: None, 0, 50_000)
    assert (time.perf_counter_ns() - begin) / 50_000 < 3000
    assert np.median(measure.timed_block(lambda index: None, 0, 1000)) < 1500


def told(microseconds):
    """A timer that the machine cannot disturb: it reads these times, one a call."""
    times = iter(microseconds)
    return lambda call, index: round(1e3 * next(times))


def test_warm_up_ends_when_two_windows_are_alike():
    found = warm_up(busy(0), 0.0, 3, told([900] * 3 + [500] * 3 + [310, 300, 290] + [300] * 30))
    assert found == Warm(calls=12, fastest=290_000, stable=True)


def test_warm_up_is_bounded_and_says_that_it_did_not_settle():
    found = warm_up(busy(0), 0.0, 1, told(100 * (1 + 2 * measure.SETTLED) ** index for index in range(100)))
    assert found == Warm(calls=measure.WARMUP_WINDOWS, fastest=100_000, stable=False)


def noisy(spread: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    return lambda first, count: np.maximum(1, 1e6 * (1 + spread * rng.standard_normal(count))).astype(np.int64)


WARM = {"a": Warm(3, 1, True), "b": Warm(3, 1, True)}


def test_it_goes_on_until_every_interval_is_as_narrow_as_asked():
    stop = Stop(min_seconds=0.01, min_runs=10)
    blocks = {"a": noisy(0.05), "b": noisy(0.05, 1)}
    short = interleave(blocks, {"a": 4, "b": 4}, WARM, stop)
    narrow = interleave(blocks, {"a": 4, "b": 4}, WARM, Stop(0.01, 10, max_width=0.01))
    assert measure.widest(list(short.values())) > 0.01 >= measure.widest(list(narrow.values()))
    assert narrow["a"].rounds > 5 * short["a"].rounds


def test_a_width_that_is_never_reached_is_bounded_by_seconds_and_by_runs():
    blocks = {"a": noisy(0.5)}
    begin = time.monotonic()
    interleave(
        {"a": lambda first, count: (time.sleep(0.001), blocks["a"](first, count))[1]},
        {"a": 4},
        WARM,
        Stop(0.01, 10, max_width=1e-9, max_seconds=0.2),
    )
    assert 0.15 < time.monotonic() - begin < 2
    whole = interleave(blocks, {"a": 400}, WARM, Stop(0.01, 10, max_width=1e-9))
    assert measure.MAX_RUNS <= len(whole["a"].ns) < measure.MAX_RUNS + 400


def test_candidates_are_opened_anew_for_about_as_many_rounds_each():
    opened: list[int] = []

    def again():
        opened.append(1)
        return {"a": busy(100), "b": busy(300)}

    found = time_interleaved({"a": busy(100), "b": busy(300)}, Stop(0.05, 10, sessions=4), again=again)
    assert len(opened) == 3
    assert found["a"].openings == found["b"].openings
    parts = [len(part) for part in found["a"].by_session(np.zeros(found["a"].rounds))]
    assert len(parts) == 4
    assert max(parts) <= 2 * min(parts) + 1
    assert found["a"].warmups > 2 * measure.WARMUP_RUNS + 3 * 2 * measure.AGAIN_RUNS


def test_without_a_way_to_open_them_anew_there_is_one_session():
    assert time_interleaved({"a": busy(100)}, Stop(0.01, 10, sessions=4))["a"].openings == (0,)


@pytest.mark.parametrize("stop", [Stop(1e-6, 5, sessions=7), Stop(1e-6, 10**6, sessions=7)])
def test_every_session_has_a_round_also_where_few_calls_suffice_or_the_samples_are_full(stop: Stop):
    blocks = {"a": noisy(0.01)}
    found = interleave(blocks, {"a": 3000 if stop.min_runs > 5 else 3}, WARM, stop, again=lambda: (blocks, WARM))["a"]
    assert len(found.openings) == 7
    assert all(len(part) for part in found.by_session(np.zeros(found.rounds)))


def test_a_width_that_is_not_there_takes_further_sessions_of_the_same_length():
    def again():
        seed = next(seeds)
        level = 1 + 0.05 * np.random.default_rng(seed).standard_normal()
        return {"a": lambda first, count: (noisy(0.001, seed)(first, count) * level).astype(np.int64)}, WARM

    seeds = iter(range(1000))
    first = again()[0]
    few = interleave(first, {"a": 4}, WARM, Stop(0.2, 10, sessions=5), again=again)["a"]
    narrow = interleave(first, {"a": 4}, WARM, Stop(0.2, 10, max_width=0.02, sessions=5), again=again)["a"]
    assert len(few.openings) == 5
    assert measure.widest([few]) > 0.02 >= measure.widest([narrow])
    assert len(set(np.diff(narrow.openings[4:]).tolist())) == 1
    assert len(narrow.openings) > 10


def test_seconds_that_run_out_are_shared_by_the_sessions(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def after(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow(first: int, count: int) -> np.ndarray:
        after(0.01)
        return np.full(count, 1000)

    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now))
    stop = Stop(10.0, 10**6, max_seconds=0.3, sessions=5)
    found = interleave({"a": slow}, {"a": 3}, WARM, stop, again=lambda: (after(0.2), ({"a": slow}, WARM))[1])["a"]
    assert [len(part) for part in found.by_session(np.zeros(found.rounds))] == [6, 6, 6, 6, 6]  # opening is not timing


def test_joules_are_those_of_a_candidates_own_blocks():
    used = 0.0

    def block(joules: float):
        def run(first: int, count: int) -> np.ndarray:
            nonlocal used
            used += joules * (count + 1)
            return np.full(count, 1_000_000)

        return run

    found = interleave({"a": block(1.0), "b": block(3.0)}, {"a": 4, "b": 4}, WARM, Stop(0.01, 10), meter=lambda: used)
    assert {name: item.joules / item.metered for name, item in found.items()} == pytest.approx({"a": 1.0, "b": 3.0})
    assert interleave({"a": block(1.0)}, {"a": 4}, WARM, Stop(0.01, 10))["a"].joules is None
