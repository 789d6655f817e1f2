"""`inspect --profile` and the share of the peak in `bench`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploycc import profiling, render_bench, render_profile
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.roofline import Peak, Peaks
from deploycc.core.target import Bench
from deploycc.core.timing import OperatorTime
from deploycc.errors import BenchError
from deploycc.package.bundle import write
from deploycc.runtime import bundle as bundles
from deploycc.runtime import sessions
from deploycc.runtime.signature import Signature, TensorSpec

GIVEN = {"inputs": {}, "weights": None, "random_weights": False}
TINY_MACS = 8 * 8 * 4 * 27 + 4 * 5
PEAKS = Peaks(
    threads=1,
    peaks={"f32": Peak(macs=1e9, library="torch.mm", shape=(8, 8, 8), others={})},
    bandwidth=((1 << 20, 1e9), (1 << 28, 1e8)),
    busy=True,
)


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch):
    """A slow machine: 1 GMAC/s."""
    asked: list[int] = []

    def peaks(threads: int) -> Peaks:
        asked.append(threads)
        return PEAKS.model_copy(update={"threads": threads})

    monkeypatch.setattr(profiling, "machine_peaks", peaks)
    return asked


def test_a_file_is_profiled_operator_by_operator(tiny_onnx: Path, known_peaks):
    found = profiling.profile(str(tiny_onnx), **GIVEN, threads=2, runs=3)
    assert known_peaks == [2]
    assert found.measured_by == "ONNX Runtime's profiler"
    assert sum(item.macs or 0 for item, _ in found.operators) == TINY_MACS
    assert found.whole is not None
    assert found.whole.macs == {"float": TINY_MACS}
    assert found.whole.share == pytest.approx(TINY_MACS / 1e9 / (found.call_ms / 1e3))
    conv = next(reached for item, reached in found.operators if item.operator in ("Conv", "FusedConv"))
    assert conv.share is not None
    assert conv.bytes is not None
    assert 0 < found.fastest_ms <= found.call_ms
    assert json.loads(json.dumps(profiling.plain(found)))["fastest_ms"] == found.fastest_ms


def test_the_text_tells_peaks_whole_and_operators(tiny_onnx: Path):
    found = profiling.profile(str(tiny_onnx), **GIVEN, runs=3)
    text = render_profile.profile(found, every=False)
    assert "peaks of this machine, 1 thread: f32 1 GMAC/s; 1 GB/s over 1.05 MB" in text
    assert "measured while other processes ran" in text
    assert "6.93 k in float MACs" in text
    assert "OF PEAK" in text
    assert "outside of operators" in text
    assert "--kernels" not in text  # there are few
    many = replace(found, operators=found.operators * 20)
    assert f"next: --kernels lists the other {len(many.operators) - render_profile.SHOWN} too" in render_profile.profile(many, every=False)
    assert "next:" not in render_profile.profile(many, every=True)


def test_a_runtime_that_tells_nothing_says_so(tiny_onnx: Path):
    found = replace(
        profiling.profile(str(tiny_onnx), **GIVEN, runs=1), operators=(), measured_by=profiling.UNTOLD.format("the runtime"), whole=None
    )
    assert found.outside_ms == found.call_ms
    text = render_profile.profile(found, every=False)
    assert text.endswith("not measured: the runtime does not tell the time of each operator")
    assert "its MACs are not known" in text


def test_operators_outside_of_which_time_goes():
    item = OperatorTime("a", "Conv", "float", 1.0, 1, 10, 10)
    roof = profiling.roof(PEAKS, {"float": 10}, 10, 1.0)
    found = profiling.Profile("x", 1, "clock", 3.0, 2.5, ((item, roof),), None, PEAKS)
    assert found.outside_ms == 2.0
    assert replace(found, call_ms=0.5).outside_ms == 0.0
    assert profiling.plain(found)["operators"][0]["share_of_time"] == 1.0


@pytest.fixture
def bundle(make_contents, tmp_path: Path) -> Path:
    """Of the tiny model."""
    write(tmp_path / "b", make_contents())
    return tmp_path / "b"


def test_a_bundle_is_profiled_in_its_runtime(bundle: Path):
    found = profiling.profile(str(bundle), **GIVEN, runs=2)
    assert found.whole is not None
    assert found.whole.total_macs == TINY_MACS


def changed(bundle: Path, **facts: object) -> bundles.LoadedBundle:
    loaded = bundles.load(bundle)
    return replace(loaded, manifest={**loaded.manifest, **facts})


def test_macs_that_the_runtime_does_not_show_are_the_manifest_s(bundle: Path):
    loaded = bundles.load(bundle)
    runtime = {**loaded.manifest["runtime"], "precision": "bf16"}
    found = profiling._macs_of(changed(bundle, runtime=runtime), None)
    assert found({"image": (1, 3, 8, 8)}) == {"int8": 6300, "bf16": 700}
    free = Signature((TensorSpec("image", "float32", ("n", 3, 8, 8)),), loaded.signature.outputs)
    several = profiling._macs_of(replace(changed(bundle, runtime=runtime), signature=free), None)
    assert several({"image": (4, 3, 8, 8)}) == {"int8": 25200, "bf16": 2800}
    shipped = {**loaded.manifest["shipped"], "receipts": []}
    assert profiling._macs_of(changed(bundle, shipped=shipped), None)({"image": (1, 3, 8, 8)}) is None


def test_a_gpu_s_share_of_a_cpu_s_peak_is_not_told(bundle: Path, monkeypatch):
    loaded = changed(bundle, runtime={**bundles.load(bundle).manifest["runtime"], "provider": "cuda"})
    assert profiling._macs_of(loaded, None)({"image": (1, 3, 8, 8)}) is None
    monkeypatch.setattr(profiling.bundles, "load", lambda folder: loaded)
    with pytest.raises(BenchError, match="is not for a CPU"):
        profiling.profile(str(bundle), **GIVEN)


@pytest.mark.parametrize(
    ("shapes", "sizes", "times"),
    [
        ([(1, 3)], [(1, 3)], 1),
        ([("n", 3)], [(5, 3)], 5),
        ([("n", "t")], [(5, 3)], None),
        ([("n", 3), (1, 2)], [(5, 3), (1, 2)], None),
        ([("n", 3), ("n", 2)], [(5, 3), (5, 2)], 5),
    ],
)
def test_a_batch_multiplies_the_work_and_other_free_axes_make_it_unknown(shapes, sizes, times):
    specs = tuple(TensorSpec(f"x{index}", "float32", shape) for index, shape in enumerate(shapes))
    assert profiling.repeats(Signature(specs, ()), {f"x{index}": size for index, size in enumerate(sizes)}) == times


def test_bench_shows_the_share_of_every_candidate(tiny_onnx: Path, tiny_signature: Signature, known_peaks):
    feeds = [{"image": np.zeros((1, 3, 8, 8), np.float32)}]
    candidate = Candidate(str(tiny_onnx), lambda: sessions.find("onnxruntime").open(tiny_onnx, tiny_signature, {}, 1), feeds)
    result = measure([candidate], settings=Bench(min_seconds=0.05, min_runs=5), baseline=str(tiny_onnx))
    assert "of peak" not in [column.header for column in render_bench.bench_table(result).columns]
    found = profiling.with_roofs(result, **GIVEN)
    roof = found.measurements[0].roof
    assert roof is not None
    assert roof.macs == {"float": TINY_MACS}
    assert roof.compute_share == pytest.approx(TINY_MACS / 1e9 / (found.measurements[0].p50_ms / 1e3))
    table = render_bench.bench_table(found)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["of peak"] == [f"{100 * roof.compute_share:.0f} %"]
    streams = result.model_copy(update={"measurements": (result.measurements[0].model_copy(update={"streams": 2}),)})
    twice = profiling.with_roofs(streams, **GIVEN).measurements[0].roof
    assert twice is not None
    assert twice.total_macs == 2 * TINY_MACS
    assert known_peaks[-1] == 2


def test_a_torch_model_is_profiled_eagerly(tmp_path: Path):
    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()\n"
    )
    found = profiling.profile(f"{tmp_path / 'net.py'}:make", inputs={"input": (1, 3, 8, 8)}, weights=None, random_weights=False, runs=2)
    assert found.measured_by == "PyTorch's profiler"
    assert found.whole is not None
    assert found.whole.macs == {"float": 36 * 4 * 27}
