"""gpu.py as a whole: rows that fail cost no other, time ends, one document comes out; without a GPU nothing does."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_fakes import FACTORY, QUICK

from deploycc.runtime import cuda

# --- without a GPU


@pytest.mark.parametrize(
    ("found", "words"), [(None, "there is no NVIDIA GPU.*--gpus all"), (cuda.Gpu("A GPU", "9.0", "580"), "PyTorch .* does not see it")]
)
def test_without_a_gpu_it_says_what_to_do_and_writes_nothing(script, monkeypatch, tmp_path, capsys, found, words):
    gpu = script("gpu")
    monkeypatch.setattr(cuda, "gpu", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(words, said.err)
    assert list(tmp_path.iterdir()) == []


# --- rows and the whole


class Fixed:
    """A session that answers like float, or fails where it is told to."""

    def __init__(self, tiny, fails=""):
        self.tiny, self.fails, self.closed = tiny, fails, False
        self.host = None

    def run(self, feeds):
        if self.fails == "run":
            raise RuntimeError("CUDA error: out of memory\nmore")

    def answer(self, feeds):
        if self.fails == "answer":
            raise ValueError("/root/secret/model.onnx cannot be read")
        return {"output": np.ones((len(feeds["input"]), 20), np.float32)}

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True


def setting(script, gpu, minutes=5.0, **more):
    rows = script("_gpu_rows")
    peak = script("_gpu_peaks").Peak("fp16", 1.0, 2048)
    return rows.Setting(gpu, {"fp16": peak}, rows.Clock(minutes), QUICK, **more)


class Watts:
    watts = 300.0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def test_a_row_that_fails_costs_no_other(script, tiny, gpu):
    rows = script("_gpu_rows")
    good, host, bad = Fixed(tiny), Fixed(tiny), Fixed(tiny, "answer")
    host.host = SimpleNamespace(run=lambda feeds: None, synchronize=lambda: None)
    ways = [
        rows.Way("gone", "A", "fp16", None, "not installed"),
        rows.Way("bad", "A", "fp16", lambda probes: bad),
        rows.Way("good", "A", "fp16", lambda probes: good, wanted=tiny.wanted),
        rows.Way("host", "A", "fp8", lambda probes: host),
    ]
    found, bench = rows.compare(tiny, ways, 2, setting(script, gpu, energy_seconds=0.01, power=Watts))
    by_name = {row["name"]: row for row in found}
    assert [row["name"] for row in found] == ["gone", "bad", "good", "host"]
    assert by_name["gone"]["problem"] == "not installed"
    assert by_name["bad"]["problem"] == "ValueError: model.onnx cannot be read"  # no path of this machine
    assert by_name["good"]["problem"] == ""
    assert [item.name for item in bench.measurements] == ["good", "host"]
    assert bench.clock == "CUDA events"
    assert by_name["good"]["share_of_peak"] == pytest.approx(2 * tiny.macs * 2 / by_name["good"]["p50_ms"] / 1e9)
    assert by_name["good"]["low_ms"] <= by_name["good"]["p50_ms"] <= by_name["good"]["high_ms"]
    assert by_name["good"]["sqnr_own_file_db"] == by_name["good"]["sqnr_db"]
    assert by_name["good"]["joules_per_image"] == pytest.approx(300 / by_name["good"]["sustained_images_s"])
    assert by_name["host"]["share_of_peak"] is None
    assert by_name["host"]["host_p50_ms"] > 0
    assert "host_p50_ms" not in by_name["good"]
    assert all(session.closed for session in (good, host, bad))


def test_power_that_is_not_known_is_absent(script, tiny, gpu):
    rows = script("_gpu_rows")

    class Unknown(Watts):
        watts = None

    found, _ = rows.compare(
        tiny, [rows.Way("a", "A", "fp16", lambda probes: Fixed(tiny))], 1, setting(script, gpu, energy_seconds=0.01, power=Unknown)
    )
    assert "watts" not in found[0]
    assert "joules_per_image" not in found[0]
    assert found[0]["sustained_images_s"] > 0


def test_a_failure_in_the_turns_is_told_of_all_that_took_part(script, tiny, gpu):
    rows = script("_gpu_rows")
    ways = [rows.Way(name, "A", "fp16", lambda probes, fails=fails: Fixed(tiny, fails)) for name, fails in (("a", ""), ("b", "run"))]
    found, bench = rows.compare(tiny, ways, 1, setting(script, gpu))
    assert bench is None
    assert [row["problem"] for row in found] == ["the interleaved run failed: RuntimeError: CUDA error: out of memory"] * 2
    assert [row["p50_ms"] for row in found] == [None, None]


def test_when_the_time_is_up_nothing_more_is_opened(script, tiny, gpu):
    rows = script("_gpu_rows")
    found, bench = rows.compare(tiny, [rows.Way("a", "A", "fp16", lambda probes: Fixed(tiny))], 1, setting(script, gpu, minutes=0))
    assert (found[0]["problem"], bench) == (rows.OUT_OF_TIME, None)
    now = SimpleNamespace(value=10.0)
    clock = rows.Clock(1, lambda: now.value)
    assert clock.left == 60
    now.value = 100
    assert clock.left == 0


@pytest.fixture
def small(script, monkeypatch, tmp_path):
    """Everything small and quick, and nothing of a GPU's but the stand-ins."""
    models, rows, gpu_torch = script("_gpu_models"), script("_gpu_rows"), script("_gpu_torch")
    (tmp_path / "tiny.py").write_text(FACTORY)
    monkeypatch.setattr(models, "pictures_here", lambda: ("noise", models.noise(8, 32, 0), models.noise(6, 32, 1)))
    monkeypatch.setattr(gpu_torch, "COMPILED", ())
    monkeypatch.setattr(rows.Setting, "__init__", _with(rows.Setting.__init__, settings=QUICK))
    return models.Given("tiny", f"{tmp_path}/tiny.py:make")


def _with(init, **values):
    def changed(self, *arguments, **keywords):
        init(self, *arguments, **{**values, **keywords})

    return changed


def test_a_whole_run_writes_one_document_and_a_page(script, small, gpu, tmp_path, monkeypatch):
    gpu_script = script("gpu")
    job = gpu_script.Job(tmp_path / "work", tmp_path / "out", (1, 3), None, (9, 0))
    lost = script("_gpu_models").Given("lost", f"{tmp_path}/none.py:make")
    document = gpu_script.run(job, [small, lost], gpu, script("_gpu_rows").Clock(9), sizes=(16, 32), energy=0.0)
    stored = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert stored["schema"] == 1
    assert stored["clock"] == "CUDA events"
    assert [peak["kind"] for peak in stored["peaks"]] == list(script("_gpu_peaks").KINDS)
    assert stored["copy_gb_s"] > 0
    assert "torch" in stored["facts"]["versions"]
    assert "skipped" in stored["models"]["lost"]
    assert stored["models"]["tiny"]["seconds"] > 0
    batches = stored["models"]["tiny"]["batches"]
    assert set(batches) == {"1", "3"}
    rows = {row["name"]: row for row in batches["3"]["rows"]}
    assert len(rows) == len(batches["3"]["rows"]) == 8 + 10 + 4 + 3
    assert rows["torch fp32"]["sqnr_db"] > 90
    assert rows["torch fp32"]["share_of_peak"] > 0
    for name in ("TensorRT int8", "TensorRT 8 int8", "ORT CUDA fp16"):
        assert rows[name]["p50_ms"] is None
        assert rows[name]["problem"]
    bench = json.loads((tmp_path / "out" / "gpu.tiny.3.bench.json").read_text())
    assert bench["clock"] == "CUDA events"
    assert len(bench["measurements"]) == 8
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "| torch fp16, CUDA graph |" in page
    assert "- TensorRT int8: it is for an NVIDIA GPU" in page
    assert "- ORT CUDA fp16: ONNX Runtime" in page
    assert "Skipped: " in page
    assert str(tmp_path) not in (tmp_path / "out" / "gpu.json").read_text()
    assert document["models"]["tiny"]["macs"] == stored["models"]["tiny"]["macs"]
    assert gpu_script.run(job, [small], gpu, script("_gpu_rows").Clock(0), sizes=(16,))["models"]["tiny"]["skipped"].startswith(
        "not measured"
    )


def test_the_page_says_what_is_not_known(script):
    page = script("_gpu_page")
    row = {"name": "a", "problem": "", "details": {}, "p50_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1, "images_s": 1000.0, "sqnr_db": "inf",
           "sqnr_own_file_db": math.inf, "joules_per_image": 0.25}  # fmt: skip
    assert page._cells(row) == ["a", "1.000 [0.900, 1.100]", "1000", "–", "exact", "exact", "–", "–", "–", "–", "250.00"]
    facts = {"name": "NVIDIA H100", "sm": "9.0", "power_limit_w": 700.0, "versions": {"torch": "2.13"}, "others": {"processes": 0}}
    assert page._facts(facts)[0] == "**NVIDIA H100**: sm 9.0, power limit w 700."
    assert page._facts(facts)[2] == "Other processes on the GPU: 0, unknown MiB."
    assert page._facts({})[2] == "Other processes on the GPU: not known."


@pytest.mark.parametrize("wrong", [["--batches", "0"], ["--minutes", "0"]])
def test_numbers_that_mean_nothing_are_refused(script, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        script("gpu").main([str(tmp_path), *wrong])
    assert "--batches and --minutes take numbers over 0" in capsys.readouterr().err


def test_with_a_gpu_it_prints_one_document(script, monkeypatch, tmp_path, capsys):
    gpu = script("gpu")
    monkeypatch.setattr(script("_gpu_facts"), "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "own_stream", lambda: script("_gpu_rows").ExitStack())
    asked = []

    def run(job, givens, device, clock):
        asked.append((job, [given.name for given in givens], device.device, round(clock.left)))
        return {"value": math.inf}

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main([str(tmp_path), "--only", "lite0", "vit_b_16", "--minutes", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {"value": "inf"}
    job, names, device, seconds = asked[0]
    assert (names, device, seconds) == (["vit_b_16", "lite0"], "cuda", 180)
    assert job.out.name == "nvidia-h100-80gb-hbm3"
    assert tuple(job.batches) == (1, 32)
