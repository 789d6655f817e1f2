"""A tiny real model and a bundle of it, for tests of whatever reads or writes one; and the modules of benchmarks/."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploycc.bench.result import Accuracy, Verdict
from deploycc.core.artifact import Artifact, Drift, Form, ModelStats, QuantInfo, Receipt
from deploycc.core.contract import Built, Coverage
from deploycc.core.target import Target
from deploycc.package.manifest import Contents, Decision, LimitCheck, record_attempt
from deploycc.runtime.sessions import onnxruntime as ort_session
from deploycc.runtime.signature import Signature, TensorSpec
from deploycc.runtime.transform import Transform

SIDE, CLASSES = 8, 5
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="session")
def tiny_signature() -> Signature:
    """Of `tiny_onnx`."""
    return Signature((TensorSpec("image", "float32", (1, 3, SIDE, SIDE)),), (TensorSpec("logits", "float32", (1, CLASSES)),))


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv, ReLU, mean, Gemm as an .onnx file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "b": np.zeros(4, np.float32),
        "fc": rng.standard_normal((4, CLASSES)).astype(np.float32),
        "bias": rng.standard_normal(CLASSES).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w", "b"], ["conv"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["conv"], ["relu"]),
            helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
            helper.make_node("Flatten", ["pool"], ["flat"]),
            helper.make_node("Gemm", ["flat", "fc", "bias"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture(scope="session")
def make_contents(tiny_onnx: Path, tiny_signature: Signature) -> Callable[..., Contents]:
    """Contents of a bundle of the tiny model; keyword arguments replace some of them."""
    transform = Transform(resize=(SIDE, SIDE), classes=("ant", "bee", "cat", "dog", "eel"))
    artifact = Artifact(
        Form.ONNX,
        None,
        tiny_signature,
        "tiny.onnx",
        transform=transform,
        quant=QuantInfo("static", "int8", "uint8", True, True, "minmax", (("Gemm fc", "asked to stay in float"),)),
        history=(
            Receipt("fold-constants{}", True, "onnx", "a" * 64, ModelStats(552, 133, 7000), Drift(np.inf, 0.0, 0.0, 1.0, 3), seconds=0.1),
            Receipt(
                "quantize-static{calibration=minmax}",
                True,
                "onnx",
                "b" * 64,
                ModelStats(200, 133, 7000),
                Drift(31.5, 0.02, 0.01, 1.0, 3),
                Drift(31.5, 0.02, 0.01, 1.0, 3),
                notes=("1 operator stays in float",),
                seconds=1.5,
                latency_ms=(0.5, 0.4, 0.6),
            ),
        ),
        notices=("random weights: accuracy not valid",),
    )
    target = Target.model_validate(
        {
            "name": "tiny-target",
            "title": "A target for tests",
            "backend": "onnxruntime",
            "arch": "any",
            "pipeline": "",
            "quant": {"reduce_range": True},
            "bench": {"threads": 1, "min_seconds": 0.05, "min_runs": 10},
        }
    )
    version = ort_session.version() or ""
    built = Built(
        tiny_onnx.parent,
        (tiny_onnx.name,),
        {"session": "onnxruntime", "package": "onnxruntime", "version": version, "minimum": "1.30"},
        tiny_signature,
        Coverage(0.9, 1, (("Gemm fc", "asked to stay in float"),)),
        ("one note of the backend",),
    )
    accuracy = Accuracy(
        metric="agreement",
        reference=1.0,
        candidate=0.98,
        agreement=0.98,
        right_to_wrong=None,
        wrong_to_right=None,
        sqnr_db=31.5,
        max_abs=0.02,
        samples=50,
        labelled=0,
    )
    verdict = Verdict(passed=True, rule="agreement ≥ 95.0%", reason="98.0% of 50 samples agree")
    rng = np.random.default_rng(1)
    feeds = [{"image": rng.standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)} for _ in range(3)]
    with ort_session.open(tiny_onnx, tiny_signature, built.runtime, 1) as session:
        outputs = [session.run(item) for item in feeds]
    contents = Contents(
        target=target,
        artifact=artifact,
        built=built,
        shipped=record_attempt("compiled", "fold-constants{}, quantize-static{calibration=minmax}", artifact, built, accuracy, verdict),
        others=(record_attempt("float", "fold-constants{}", replace(artifact, quant=None), built, accuracy, verdict),),
        decision=Decision(shipped="compiled", reason="it is faster than the float artifact and passed the gate"),
        detail="0.50 ms against 0.90 ms",
        limits=(
            LimitCheck(name="accuracy_drop", limit=0.01, value=0.0, met=True),
            LimitCheck(name="latency_p95_ms", limit=4.0, value=0.6, met=True),
            LimitCheck(name="peak_mb", limit=100.0, value=None, met=None),
        ),
        feeds=feeds,
        outputs=outputs,
        seed=0,
        command="deploycc compile tiny.onnx --target tiny-target",
        created="2026-11-23T20:00:00+00:00",
        seconds=2.5,
    )

    def make(**changes: Any) -> Contents:
        return replace(contents, **changes)

    return make


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[..., Any]]:
    """Modules of benchmarks/ by name, as the scripts import them."""
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)

    def load(name: str, folder: Path = BENCHMARKS) -> Any:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules.get(name) or importlib.util.module_from_spec(spec)
        if name not in sys.modules:
            sys.modules[name] = module
            spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]
