"""Other tools' latency of one model, each in its own environment: run by their Python, prints one JSON line. Standard library at the top.

python _trust_peers.py make FOLDER          a Hugging Face ResNet-18 of random weights, and its .onnx file
python _trust_peers.py olive FOLDER         Olive's latency metric, at its defaults but for the threads
python _trust_peers.py optimum FOLDER SECONDS   optimum-benchmark, ONNX Runtime backend
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OLIVE_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
SHAPES = {"batch_size": 1, "num_channels": 3, "height": 224, "width": 224}
OPTIONS = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}


def make(folder: Path) -> dict:
    """The model: what optimum-benchmark can read without a network."""
    from optimum.onnxruntime import ORTModelForImageClassification
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000)
    ResNetForImageClassification(config).eval().save_pretrained(folder / "torch")
    exported = ORTModelForImageClassification.from_pretrained(folder / "torch", export=True)
    exported.save_pretrained(folder / "onnx")
    ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(folder / "onnx")
    return {"model": str(folder / "onnx" / "model.onnx")}


def olive(folder: Path) -> dict:
    """The session of its evaluator, timed by its own loop as often as its latency metric does by default."""
    import numpy as np
    from olive.common.ort_inference import OrtInferenceSession
    from olive.evaluator.metric_config import REPEAT_TEST_NUM, SLEEP_NUM, WARMUP_NUM
    from olive.model import ONNXModelHandler

    settings = {"execution_provider": ["CPUExecutionProvider"], "provider_options": [{}], "session_options": OPTIONS}
    handler = ONNXModelHandler(str(folder / "onnx" / "model.onnx"), inference_settings=settings)
    session = OrtInferenceSession(handler.prepare_session(inference_settings=settings, device="cpu"))
    name = handler.io_config["input_names"][0]
    feeds = {name: np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
    latencies = session.time_run(feeds, num_runs=REPEAT_TEST_NUM, num_warmup=WARMUP_NUM, sleep_time=SLEEP_NUM)
    return {"p50_ms": 1e3 * float(np.median(latencies)), "runs": len(latencies), "version": version("olive-ai")}


def optimum(folder: Path, seconds: float) -> dict:
    """Its inference scenario."""
    from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, InlineConfig, ORTConfig

    backend = ORTConfig(
        model=str(folder / "onnx"), task="image-classification", library="transformers", device="cpu", session_options=OPTIONS,
        processor=str(folder / "onnx"), export=False,
    )  # fmt: skip
    scenario = InferenceConfig(duration=int(seconds), iterations=10, warmup_runs=10, input_shapes=SHAPES, memory=False)
    launcher = InlineConfig(device_isolation=False)
    report = Benchmark.launch(BenchmarkConfig(name="net", launcher=launcher, scenario=scenario, backend=backend))
    latency = report.forward.latency if hasattr(report, "forward") else report.to_dict()["forward"]["latency"]
    known = latency if isinstance(latency, dict) else latency.__dict__
    return {"p50_ms": 1e3 * known["p50"], "runs": known.get("count"), "version": version("optimum-benchmark")}


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    print(json.dumps({"make": make, "olive": olive, "optimum": optimum}[command](Path(where), *map(float, rest))))
