"""gpu.py: a network made ready, and the rows of PyTorch and ONNX Runtime."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_fakes import Ort

from deploycc.runtime.signature import Signature, TensorSpec

# --- a network


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
    script("_awake").awaken(module, [np.random.default_rng(0).random((4, 3, 8, 8), np.float32)])
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
