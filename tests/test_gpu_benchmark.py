"""gpu.py without a GPU: a device whose clock is the test's stands in for it, and a stand-in for TensorRT for its engines."""

import ctypes
import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch

from deploycc.backends.tensorrt import TensorRt
from deploycc.core.target import Bench
from deploycc.runtime import cuda
from deploycc.runtime.signature import Signature, TensorSpec
from deploycc.runtime.tensorrt_engine import Recipe

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
QUICK = Bench(threads=1, min_seconds=0.005, min_runs=10)
FACTORY = """
import torch
from deploycc.runtime.transform import Transform

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.ReLU(),
                                torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 20))
    model.transform = Transform(resize=16, crop=(16, 16), interpolation="bilinear", scale=1.0, mean=(127.0,) * 3, std=(64.0,) * 3)
    model.example_input = torch.zeros(1, 3, 16, 16)
    return model.eval()
"""


@pytest.fixture(scope="module")
def script():
    """Modules of benchmarks/ by name, as the script imports them."""
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)

    def load(name, folder=BENCHMARKS):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = sys.modules.get(name) or importlib.util.module_from_spec(spec)
        if name not in sys.modules:
            sys.modules[name] = module
            spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if name.startswith(("_quantizers", "_gpu")) or name == "gpu":
            del sys.modules[name]


class Stamp:
    """An event of a GPU whose clock is this process's, or the test's own."""

    log: ClassVar[list[str]] = []

    def __init__(self, clock=time.perf_counter):
        self.clock, self.taken, self.waited = clock, None, False

    def record(self):
        Stamp.log.append("record")
        self.taken, self.waited = self.clock(), False

    def synchronize(self):
        Stamp.log.append("synchronize")
        self.waited = True

    def elapsed_time(self, end_event):
        assert end_event.waited, "an event that nobody waited for has no time yet"
        return 1000 * (end_event.taken - self.taken)


def capture(call):
    """A replay that fills the memory of the captured call's outputs anew."""
    given = call()

    def replay():
        with torch.inference_mode():
            for name, tensor in (call() or {}).items():
                given[name].copy_(tensor)

    return replay, given


@pytest.fixture
def gpu(script):
    return script("_gpu_clock").Gpu("cpu", Stamp, lambda: None, capture, lambda: 5)


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


# --- a network


def prepared(script, folder, target="cuda-tensorrt"):
    """A net of two convolutions, prepared as all are, on noise."""
    models = script("_gpu_models")
    (folder / "tiny.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "pictures_here", lambda: ("noise", models.noise(8, 32, 0), models.noise(6, 32, 1)))
        return models.prepare(models.Given("tiny", f"{folder}/tiny.py:make"), folder, target)


@pytest.fixture(scope="module")
def tiny(script, tmp_path_factory):
    return prepared(script, tmp_path_factory.mktemp("gpu"))


def test_a_network_is_judged_picture_by_picture(script, tiny):
    assert tiny.macs == 14 * 14 * 32 * 27 + 12 * 12 * 32 * 288 + 32 * 20
    assert tiny.problem == ""
    assert [len(call["input"]) for call in tiny.calls(4)] == [4, 4]  # six pictures: the last call is filled up
    assert [len(call["input"]) for call in tiny.probes(4)] == [4] * 4
    float_session = {"answers": iter(tiny.wanted)}

    def exact(call):
        return {"output": np.concatenate([next(float_session["answers"])["output"] for _ in range(len(call["input"]))])}

    assert tiny.judged(exact, 1) == {"sqnr_db": math.inf, "agreement": 1.0, "broken": 0}
    noisy = tiny.judged(lambda call: {"output": np.full((len(call["input"]), 20), np.nan, np.float32)}, 4)
    assert noisy["broken"] == 6
    own = script("_gpu_models").answers(tiny, tiny.quantized.model)
    assert 20 < script("_gpu_models").judge(tiny.wanted, own, [None] * 6, vectors=False).sqnr_db < 60


def test_random_weights_get_activations_like_trained_ones(script):
    nn = torch.nn
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    with torch.no_grad():
        module[0].weight.mul_(1e-6)
        module[0].bias.zero_()
        module[4].weight.zero_()
    before = module[0].weight.clone()
    script("_gpu_models").awaken(module, [{"x": np.random.default_rng(seed).random((3, 8, 8), np.float32)} for seed in range(4)])
    assert module[4].weight.all()
    assert torch.equal(module[0].weight, before)
    assert not module.training
    assert not any(part.training for part in module)
    assert module[1].running_var.max() < 1e-9


# --- PyTorch's rows


@pytest.mark.parametrize(("kind", "least"), [("fp32", 90), ("tf32", 90), ("fp16", 45), ("bf16", 25)])
def test_a_torch_row_answers_in_its_own_precision(script, tiny, gpu, kind, least):
    rows = {way.name: way for way in script("_gpu_torch").ways(tiny, gpu, (9, 0))}
    probes = script("_gpu_clock").tensors(tiny.probes(2), "cpu")
    for name in (f"torch {kind}", f"torch {kind}, CUDA graph"):
        with rows[name].open(probes) as session:
            found = tiny.judged(session.answer, 2)
            assert session.run(probes[0])["output"].dtype == torch.float32
        assert found["sqnr_db"] > least
        assert found["agreement"] == 1.0
        assert kind in ("fp32", "tf32") or found["sqnr_db"] < 100
    assert {way.kind for way in rows.values()} == {"fp32", "tf32", "fp16", "bf16"}
    assert "torch.compile fp16, CUDA graph" in rows


def test_a_type_without_tensor_cores_is_a_row_that_says_so(script, tiny, gpu):
    rows = {way.name: way for way in script("_gpu_torch").ways(tiny, gpu, (7, 5))}
    assert rows["torch bf16"].problem == "bf16 needs compute capability 8.0, this GPU has 7.5"
    assert rows["torch bf16"].open is None
    assert rows["torch fp16"].open is not None


# --- ONNX Runtime's rows


class Ort:
    """A stand-in for onnxruntime-gpu: what starts is told, and outputs are the inputs' sum."""

    __version__ = "1.31.1"
    asked: ClassVar[dict[str, object]] = {}

    def __init__(self, available, started):
        self.available, self.started = available, started
        self.SessionOptions = self.RunOptions = lambda: SimpleNamespace(add_session_config_entry=self.note, add_run_config_entry=self.note)

    def note(self, name, value):
        self.asked[name] = value

    def get_available_providers(self):
        return self.available

    def InferenceSession(self, path, options, providers):
        self.asked["providers"] = providers
        return SimpleNamespace(get_providers=lambda: self.started, io_binding=self.binding, run_with_iobinding=self.run)

    def binding(self):
        held = {}

        def bind(kind):
            return lambda name, device, number, dtype, shape, place: held.update({kind: (dtype, shape, place)})

        return SimpleNamespace(held=held, bind_input=bind("in"), bind_output=bind("out"))

    def run(self, binding, options):
        memory = {}
        for kind, (dtype, shape, place) in binding.held.items():
            size = int(np.prod(shape)) * dtype.itemsize
            memory[kind] = np.frombuffer((ctypes.c_char * size).from_address(place), dtype).reshape(shape)
        memory["out"][:] = memory["in"].reshape(len(memory["in"]), -1).sum(1, keepdims=True)


SIGNATURE = Signature((TensorSpec("x", "float32", ("N", 3)),), (TensorSpec("y", "float32", ("N", 2)),))
FILES = {name: Path(f"{name}.onnx") for name in ("f32", "f16", "int8")}
CUDA_ROW, TENSORRT_ROW = "ORT CUDA fp16", "ORT TensorRT int8"


def of_ort(script, gpu, available, started, files=FILES):
    return {way.name: way for way in script("_gpu_onnxruntime").ways(files, SIGNATURE, {}, gpu, Ort(available, started))}


def test_onnxruntime_is_bound_to_memory_and_never_falls_back(script, gpu):
    cuda_provider = "CUDAExecutionProvider"
    row = of_ort(script, gpu, [cuda_provider], [cuda_provider, "CPUExecutionProvider"])[CUDA_ROW]
    with row.open([]) as session:
        assert Ort.asked["session.disable_cpu_ep_fallback"] == "1"
        assert Ort.asked["disable_synchronize_execution_providers"] == "1"
        assert Ort.asked["providers"] == [(cuda_provider, {"device_id": "0", "user_compute_stream": "5"})]
        assert session.answer({"x": np.array([[1, 2, 3], [4, 5, 6]], np.float32)})["y"].tolist() == [[6, 6], [15, 15]]
        feeds = {"x": torch.ones(1, 3)}
        assert session.run(feeds)["y"] is session.run(feeds)["y"]


def test_a_silent_fall_back_is_an_error(script, gpu):
    row = of_ort(script, gpu, ["CUDAExecutionProvider"], ["CPUExecutionProvider"])[CUDA_ROW]
    with pytest.raises(RuntimeError, match="does not start here, the model would run on CPUExecutionProvider"):
        row.open([])


def test_a_provider_or_a_file_that_is_missing_is_a_row_that_says_so(script, gpu):
    rows = of_ort(script, gpu, ["CPUExecutionProvider"], [])
    assert all(way.open is None and "has no " in way.problem and "onnxruntime-gpu" in way.problem for way in rows.values())
    rows = of_ort(script, gpu, ["CUDAExecutionProvider", "TensorrtExecutionProvider"], [], files={"f16": Path("f16.onnx")})
    assert rows[TENSORRT_ROW].problem == "there is no int8 file of this network"
    assert rows[CUDA_ROW].open is not None


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
