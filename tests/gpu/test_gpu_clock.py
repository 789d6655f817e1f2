"""gpu.py: its clock, the machine's peaks, the facts of the card, on a device whose clock is the test's."""

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_fakes import Stamp, capture

# --- the clock


def test_a_call_is_timed_between_two_events_and_nothing_waits_before_the_second(script):
    clock = SimpleNamespace(now=0.0)
    gpu = script("_gpu_clock").Gpu("cpu", lambda: Stamp(lambda: clock.now), lambda: None, capture, lambda: 5)
    timer = script("_gpu_clock").EventTimer(gpu)
    Stamp.log.clear()

    def call(number):
        Stamp.log.append(f"call {number}")
        clock.now += 0.00125

    assert timer(call, 3) == 1_250_000
    assert Stamp.log == ["record", "call 3", "record", "synchronize"]
    assert timer(lambda number: None, 0) == 1  # a clock that is too coarse gives no zero


def test_a_graph_answers_from_its_own_memory_and_replays_only_its_probes(script, gpu):
    clock = script("_gpu_clock")
    calls = []

    class Inner:
        def run(self, feeds):
            calls.append(feeds["x"])
            return {"y": feeds["x"] * 2}

        def __exit__(self, *exc):
            calls.append("closed")

    probes = clock.tensors([{"x": np.full((1, 2), value, np.float32)} for value in (1, 2)], "cpu")
    with clock.GraphSession(Inner(), gpu, probes) as session:
        assert len(calls) == 3  # each probe, and the memory that answers
        assert session.answer({"x": np.array([[5, 6]], np.float32)})["y"].tolist() == [[10, 12]]
        assert probes[0]["x"].tolist() == [[1, 1]]
        assert session.run(probes[1])["y"].tolist() == [[4, 4]]
        with pytest.raises(KeyError):
            session.run({"x": probes[0]["x"]})
    assert calls[-1] == "closed"


def test_a_sustained_run_waits_now_and_then(script):
    waits = []
    session = SimpleNamespace(run=lambda feeds: None, synchronize=lambda: waits.append(1))
    calls, seconds = script("_gpu_clock").sustained(session, [{}], 0.0)
    assert calls == script("_gpu_clock").QUEUED
    assert seconds > 0
    assert len(waits) == 2


# --- peaks


def test_peaks_are_counted_in_operations(script):
    peaks = script("_gpu_peaks")
    assert peaks.tera_ops(8192, 1.374389534720) == pytest.approx(800.0)  # 2 · 8192³ = 1.0995e12 in 1.37 ms
    peak = peaks.Peak("fp16", 800.0, 8192)
    assert peaks.share(4.09e9 * 32, 1.0, peak) == pytest.approx(0.3272)
    assert peaks.share(4.09e9, 1.0, None) is None
    assert peaks.share(4.09e9, 1.0, peaks.Peak("fp8", problem="none")) is None


@pytest.mark.parametrize("kind", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_every_product_multiplies_what_it_says(script, gpu, kind):
    peaks = script("_gpu_peaks")
    given = peaks.product(kind, 32, "cpu")()
    assert given.shape == (32, 32)
    assert given.dtype == {"int8": torch.int32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    assert given.any()
    found = peaks.peak(kind, gpu, (16, 32))
    assert found.problem == ""
    assert found.tera_ops == max(value for _, value in found.by_size) > 0
    assert [size for size, _ in found.by_size] == [16, 32]


def test_the_best_size_is_kept_and_one_that_fails_is_told(script):
    peaks = script("_gpu_peaks")
    clock = SimpleNamespace(now=0.0, step=0.0)
    gpu = script("_gpu_clock").Gpu("cpu", lambda: Stamp(lambda: clock.now), lambda: None, capture, lambda: 5)

    def make(kind, size, device):
        if size == 4096:
            raise RuntimeError("CUDA out of memory\nand more")

        def call():
            clock.now += {1024: 0.001, 2048: 0.002}[size]

        return call

    found = peaks.peak("fp16", gpu, (1024, 2048, 4096), make)
    assert found.size == 2048
    assert found.tera_ops == pytest.approx(peaks.tera_ops(2048, 2.0))
    assert found.problem == "n = 4096: CUDA out of memory"
    lost = peaks.peak("fp8", gpu, (4096,), make)
    assert (lost.tera_ops, lost.size) == (None, None)
    assert lost.problem == "n = 4096: CUDA out of memory"


def test_tf32_is_on_for_its_own_rows_alone(script):
    peaks = script("_gpu_peaks")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with peaks.precision("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        with peaks.precision("fp32"):
            assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default


def test_a_copy_counts_both_ways(script):
    clock = SimpleNamespace(now=0.0)

    def tick():
        clock.now += 0.0005
        return clock.now

    gpu = script("_gpu_clock").Gpu("cpu", lambda: Stamp(tick), lambda: None, capture, lambda: 5)
    assert script("_gpu_peaks").copy_gb_s(gpu, 1) == pytest.approx(2 * 2**20 / 0.0005 / 1e9)


# --- facts


def smi(answers):
    """nvidia-smi by what is asked for."""

    def ask(command):
        query = next(word.partition("=")[2] for word in command if word.startswith("--query"))
        return answers(query) if callable(answers) else answers.get(query)

    return ask


def test_facts_that_nvidia_smi_does_not_know_are_absent(script):
    facts = script("_gpu_facts")
    known = {"name": "NVIDIA H100", "power.limit": "700.00", "power.draw": "[N/A]", "clocks.sm": "1980", "mig.mode.current": "[N/A]"}
    found = facts.smi(smi(lambda query: ", ".join(known.get(field, "[Not Supported]") for field in query.split(",")) + "\n"))
    assert found == {"name": "NVIDIA H100", "power_limit_w": 700.0, "sm_clock_mhz": 1980.0}
    assert facts.smi(lambda command: None) == {}


def test_an_older_nvidia_smi_is_asked_field_by_field(script):
    def ask(query):
        return None if "clocks_event_reasons.active" in query else ", ".join("7" for _ in query.split(","))

    found = script("_gpu_facts").smi(smi(ask))
    assert "throttled" not in found
    assert found["temperature_c"] == 7.0
    assert len(found) == len(script("_gpu_facts").FIELDS) - 1


def test_other_processes_on_the_gpu_are_counted_and_not_named(script):
    others = script("_gpu_facts").others
    rows = {"compute-apps=pid,used_memory": "11, 500\n12, 300\n13, [N/A]\n"}
    ask = smi(lambda query: rows["compute-apps=" + query])
    assert others(ask, own=11) == {"processes": 2, "memory_mib": 300.0}
    assert others(smi({"pid,used_memory": ""}), own=11) == {"processes": 0}
    assert others(lambda command: None) is None


def test_watts_are_those_of_the_later_half_and_never_zero(script):
    facts = script("_gpu_facts")
    assert facts.steady([100, 200, 600, 610]) == pytest.approx(605.0)
    assert facts.steady([]) is None
    answers = iter([100.0, None, 0.0, 300.0])
    with facts.Power(lambda: next(answers, 500.0)) as power:
        time.sleep(0.6)
    assert power.watts == 500.0
    with facts.Power(lambda: 0.0) as power:
        time.sleep(0.1)
    assert power.watts is None


def test_power_is_asked_for_by_the_name_that_this_nvidia_smi_knows(script):
    reading = script("_gpu_facts").reading
    assert reading(smi({"power.draw": "80.5"}))() == 80.5
    assert reading(smi({"power.draw.instant": "[N/A]", "power.draw": "81"}))() == 81.0
    assert reading(smi({"power.draw.instant": "90", "power.draw": "81"}))() == 90.0
    assert reading(lambda command: None) is None


def test_a_command_that_is_missing_or_fails_says_nothing(script):
    ask = script("_gpu_facts").ask
    assert ask(["no-such-command-here"]) is None
    assert ask([sys.executable, "-c", "raise SystemExit(3)"]) is None
    assert ask([sys.executable, "-c", "print(5)"]) == "5\n"
