"""gpu.py: the rows of TensorRT, by a stand-in for it, and of TensorRT 8 in another Python."""

import ctypes
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from gpu_fakes import TESTS, Ort, prepared

from deploycc.backends.tensorrt import TensorRt
from deploycc.runtime import cuda
from deploycc.runtime.tensorrt_engine import Recipe

# --- TensorRT's rows


@pytest.fixture(scope="module")
def written(script, tiny, tmp_path_factory):
    return script("_gpu_tensorrt").files(tiny, tmp_path_factory.mktemp("files"), (9, 0))


@pytest.fixture
def machine(script, monkeypatch):
    """A GPU and TensorRT 11 of the stand-ins; the engine answers with minus its input, of which as much as an output holds."""
    fake = script("fake_tensorrt", TESTS / "runtime")
    trt, driver = fake.Fake("11.4.0.106", inputs={"input": ("float32", (8, 3))}, outputs={"output": ("float32", ())}), fake.Driver()
    monkeypatch.setitem(sys.modules, "tensorrt", trt.module)
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "9.0", "580.1"))
    monkeypatch.setattr(cuda, "library", lambda: driver)
    monkeypatch.setattr(script("_gpu_tensorrt").session, "version", lambda: "11.4.0.106")
    return trt


def test_a_file_for_every_precision_with_its_own_answers(script, tiny, written):
    assert {name: file.problem for name, file in written.items()} == dict.fromkeys(("f32", "f16", "bf16", "int8", "fp8"), "")
    judge = script("_gpu_models").judge
    found = {name: judge(tiny.wanted, file.wanted, [None] * 6, vectors=False).sqnr_db for name, file in written.items()}
    assert found["f32"] > found["f16"] > found["int8"] > 20
    assert found["f16"] > found["bf16"] > 25
    assert 8 < found["fp8"] < found["int8"]


def test_float8_is_where_it_has_kernels(written):
    model = ir.load(written["fp8"].built.folder / written["fp8"].built.files[0])
    kinds = {value.dtype for node in model.graph if node.op_type == "QuantizeLinear" for value in node.outputs}
    assert kinds == {ir.DataType.FLOAT8E4M3FN}
    assert not any(value.dtype == ir.DataType.INT8 for value in model.graph.initializers.values())
    first, second = (node for node in model.graph if node.op_type == "Conv")
    assert first.inputs[1].producer() is None  # three channels: in float again
    assert second.inputs[1].producer().op_type == "DequantizeLinear"


def test_a_network_that_is_too_narrow_for_float8_says_so(script, tiny, tmp_path):
    float8 = script("_gpu_float8")
    ir.save(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="empty"), ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(float8.Unfit, match="no operator of this network"):
        float8.float8(tmp_path / "m.onnx")
    ir.save(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 17}, name="empty"), ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(float8.Unfit, match="float8 needs opset 19, the file has 17"):
        float8.float8(tmp_path / "m.onnx")


def test_what_a_card_lacks_is_no_file(script, tiny, tmp_path):
    found = script("_gpu_tensorrt").files(tiny, tmp_path, (8, 6), only=("fp8",))
    assert found["fp8"].problem == "fp8 needs compute capability 8.9, this GPU has 8.6"
    assert (
        script("_gpu_tensorrt")
        .files(tiny, tmp_path, (7, 5), only=("bf16",))["bf16"]
        .problem.startswith("bf16 needs compute capability 8.0")
    )
    lost = script("_gpu_tensorrt").replace(tiny, quantized=None, problem="no operator")
    assert script("_gpu_tensorrt").files(lost, tmp_path, (9, 0), only=("int8",))["int8"].problem == "it could not be quantized: no operator"


def test_without_tensorrt_every_row_says_how_to_get_it(script, tiny, written, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "9.0", "580.1"))
    monkeypatch.setattr(script("_gpu_tensorrt").session, "version", lambda: None)
    ways = script("_gpu_tensorrt").ways(tiny, written, 2, tmp_path, gpu)
    assert len(ways) == 10
    assert all(way.open is None and "TensorRT is not installed" in way.problem for way in ways)


def test_files_that_nothing_would_run_are_not_written(script, tiny, gpu, tmp_path, machine, monkeypatch):
    engines = script("_gpu_tensorrt")
    unused = engines.files(tiny, tmp_path, (9, 0), used=False)
    assert list(tmp_path.iterdir()) == []
    assert {way.problem for way in engines.ways(tiny, unused, 1, tmp_path, gpu)} == {"nothing on this machine runs it"}
    assert script("gpu").uses_files()
    monkeypatch.setattr(engines.session, "version", lambda: None)
    assert not script("gpu").uses_files()
    assert script("_gpu_onnxruntime").runs_here(Ort(["CPUExecutionProvider", "CUDAExecutionProvider"], []))


def test_an_engine_is_built_for_its_batch_once_and_loaded_for_its_graph(script, tiny, written, gpu, tmp_path, machine, monkeypatch):
    monkeypatch.setenv("DEPLOYCC_CACHE", "somewhere else")
    rows = {way.name: way for way in script("_gpu_tensorrt").ways(tiny, written, 4, tmp_path, gpu)}
    assert rows["TensorRT int8"].problem == ""
    machine.outputs = {"output": ("float32", (4, 20))}
    size = 4 * 3 * 16 * 16
    machine.outputs["output"] = ("float32", (size,))  # the stand-in's engine gives as much as it takes
    for again in range(2):
        with rows["TensorRT int8"].open([]) as session:
            assert session.details["build_s"] > 0
            assert session.details["engine_mb"] == pytest.approx(len(b"an engine") / 1e6)
            machine.streams.clear()
            session.run({})
            assert machine.streams == [5]  # on PyTorch's stream, without the session's copies
        assert machine.asked.count("build") == again + 1  # a row of its own is a first build each time
    shapes = next(item for item in machine.asked if isinstance(item, tuple) and item[0] == "set_shape")
    assert shapes == ("set_shape", "input", *[(4, 3, 16, 16)] * 3)
    with rows["TensorRT int8, CUDA graph"].open([]) as session:
        assert set(session.details) == {"load_s", "engine_mb", "tensorrt"}
        assert machine.asked.count("build") == 2
        session.run({})
    assert os.environ["DEPLOYCC_CACHE"] == "somewhere else"


def test_the_reference_on_the_cpu_is_no_engine(script, tiny, written, gpu, tmp_path, machine, monkeypatch):
    way = script("_gpu_tensorrt").ways(tiny, written, 2, tmp_path, gpu)[0]
    monkeypatch.setattr(TensorRt, "absent", lambda self, target: "no GPU")
    with pytest.raises(RuntimeError, match="instead of an engine"):
        way.open([])


# --- TensorRT 8 in another Python


def events(driver, step_ms=0.5):
    """Events for the stand-in of the driver: each is `step_ms` after the one before; graphs run what was captured."""
    kind = type(driver)

    class Timed(kind):
        def on_cuEventElapsedTime(self, elapsed, begin, end):
            elapsed._obj.value = step_ms

        def on_cuMemcpyHtoD_v2(self, target, source, size):
            ctypes.memmove(target.value, source, size.value)

        def on_cuMemcpyDtoH_v2(self, target, source, size):
            ctypes.memmove(target, source.value, size.value)

    return Timed()


@pytest.fixture
def version_8(script, tmp_path):
    fake = script("fake_tensorrt", TESTS / "runtime")
    trt = fake.Fake("8.5.3.1", inputs={"x": ("float32", (2, 3))}, outputs={"y": ("float32", ())})
    trt.module.TacticSource = SimpleNamespace(CUBLAS=0, CUDNN=2, EDGE_MASK_CONVOLUTIONS=3, JIT_CONVOLUTIONS=4)
    configured = trt._config
    trt._config = lambda: add(configured(), set_tactic_sources=trt._note("set_tactic_sources"))
    calls = np.arange(12, dtype=np.float32)
    (tmp_path / "calls.bin").write_bytes(calls.tobytes())
    (tmp_path / "model.onnx").write_bytes(b"")
    job = {"model": str(tmp_path / "model.onnx"), "recipe": Recipe("f16", typed=False).text(), "input": "x", "output": "y", "shape": [2, 3],
           "calls": str(tmp_path / "calls.bin"), "outputs": str(tmp_path / "out.bin"), "runs": 7, "own_kernels": True}  # fmt: skip
    return SimpleNamespace(trt=trt, library=events(fake.Driver()), job=job, calls=calls, out=tmp_path / "out.bin")


def add(guarded, **values):
    for name, value in values.items():
        setattr(guarded, name, value)
    return guarded


def test_version_8_is_built_answers_and_is_timed_by_events(script, version_8):
    child = script("_gpu_tensorrt8")
    found = child.measure(version_8.trt.module, child.Driver(version_8.library), version_8.job)
    assert found["samples_ns"] == [500_000] * 7
    assert found["graph_ns"] == [500_000] * 7
    assert found["bytes"] == len(b"an engine")
    np.testing.assert_array_equal(np.fromfile(version_8.out, np.float32), -version_8.calls)
    assert ("set_tactic_sources", (1 << 3) + (1 << 4)) in version_8.trt.asked
    flags = [version_8.trt.flag(name) for name in ("INT8", "FP16")]
    assert [item[1] for item in version_8.trt.asked if item[0] == "set_flag"] == flags
    names = version_8.library.calls
    assert names.index("cuStreamBeginCapture_v2") < names.index("cuStreamEndCapture") < names.index("cuGraphInstantiateWithFlags")
    assert names.count("cuGraphLaunch") == child.WARM + 7


def test_version_8_keeps_its_times_where_a_graph_cannot_be_captured(script, version_8):
    child = script("_gpu_tensorrt8")
    version_8.library.fails = "cuStreamBeginCapture_v2"
    version_8.job["own_kernels"] = False
    found = child.measure(version_8.trt.module, child.Driver(version_8.library), version_8.job)
    assert found["graph_problem"] == "cuStreamBeginCapture_v2 failed with CUDA error 2"
    assert len(found["samples_ns"]) == 7
    assert not any(item[0] == "set_tactic_sources" for item in version_8.trt.asked)


def test_version_8_says_what_does_not_run(script, version_8):
    child = script("_gpu_tensorrt8")
    version_8.trt.loads = False
    with pytest.raises(RuntimeError, match="does not load the engine"):
        child.measure(version_8.trt.module, child.Driver(version_8.library), version_8.job)
    version_8.trt.loads, version_8.trt.fails = True, False
    context = version_8.trt._context
    version_8.trt._context = lambda: add(context(), execute_async_v3=lambda stream: False)
    with pytest.raises(RuntimeError, match="did not run the engine"):
        child.measure(version_8.trt.module, child.Driver(version_8.library), version_8.job)
    version_8.library.fails = "cuInit"
    with pytest.raises(RuntimeError, match="cuInit failed with CUDA error 2"):
        child.Driver(version_8.library)


OTHER = """
import json, sys
import numpy as np
request = json.load(open(sys.argv[2]))
jobs = {}
for name, job in request["jobs"].items():
    if name == "f16":
        jobs[name] = {"problem": "RuntimeError: no kernels"}
        continue
    np.full((6, 20), 1, np.float32).tofile(job["outputs"])
    jobs[name] = {"build_s": 2.0, "bytes": 3_000_000, "samples_ns": [1_000_000] * 40, "graph_ns": [500_000] * 40}
json.dump({"version": "8.5.3.1", "jobs": jobs}, open(request["answer"], "w"))
"""


@pytest.fixture(scope="module")
def older(script, tmp_path_factory):
    """The network without integers, in version 8's dialect."""
    net = prepared(script, tmp_path_factory.mktemp("older"), "jetson-xavier-jp5")
    return script("_gpu_tensorrt").replace(net, quantized=None, problem="no operator")


def test_rows_of_the_other_python(script, older, tmp_path):
    old, peaks = script("_gpu_old_tensorrt"), script("_gpu_peaks")
    python = tmp_path / "python"
    (tmp_path / "other.py").write_text(OTHER)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/other.py" "$@"\n')
    python.chmod(0o755)
    peak = {"fp32": peaks.Peak("fp32", 1.0, 2048)}
    rows = {row["name"]: row for row in old.rows(older, 2, tmp_path / "work", python, peak, 60)}
    plain, graph = rows["TensorRT 8 f32"], rows["TensorRT 8 f32, CUDA graph"]
    assert (plain["p50_ms"], graph["p50_ms"]) == (1.0, 0.5)
    assert plain["images_s"] == 2000
    assert plain["details"] == {"build_s": 2.0, "engine_mb": 3.0, "tensorrt": "8.5.3.1", "turns": "a process of its own"}
    assert plain["share_of_peak"] == pytest.approx(2 * older.macs * 2 / 1e-3 / 1e12)
    assert plain["sqnr_db"] < 10
    assert len(plain["samples_ns"]) == 40
    assert rows["TensorRT 8 f16"]["problem"] == "RuntimeError: no kernels"
    assert "could not be quantized: no operator" in rows["TensorRT 8 int8"]["problem"]
    recipe = Recipe.parse(json.loads((tmp_path / "work" / "request.json").read_text())["jobs"]["f32"]["recipe"])
    assert not recipe.typed
    assert recipe.profiles == {"input": ((2, 3, 16, 16),) * 3}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise SystemExit('much\\nout of luck')", "ended with status 1: out of luck"),
        ("import os; os.kill(os.getpid(), 11)", "ended with status -11: it said nothing"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("", "gave no answer"),
    ],
)
def test_another_python_that_fails_is_a_row_with_its_words(script, older, tmp_path, body, words):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{body}"\n')
    python.chmod(0o755)
    rows = script("_gpu_old_tensorrt").rows(older, 2, tmp_path / "work", python, {}, 1.0 if "sleep" in body else 60.0)
    assert words in next(row for row in rows if row["name"] == "TensorRT 8 f32")["problem"]
    assert script("_gpu_old_tensorrt").call(tmp_path / "none", tmp_path / "r", 1.0) == "none does not start: No such file or directory"
