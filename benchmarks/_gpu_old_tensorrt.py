"""Rows of TensorRT 8, which no Python that runs deploycc can import: written here in its dialect, built and timed by a Python of its own.

The files are those of the target jetson-xavier-jp5 (opset 17, float weights in front of Q/DQ, INT8 and FP16 as flags of the builder). A
process of its own takes no part in the turns of the others, so these rows have intervals but no speed-up over them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_models import Net
from _gpu_peaks import Peak, share
from _gpu_rows import Way, brief, failed

from deploycc.backends.tensorrt import TensorRt
from deploycc.runtime.doubts import instability
from deploycc.runtime.statistics import Samples, summarize
from deploycc.runtime.tensorrt_engine import Recipe

BY = "TensorRT 8"
TARGET = "jetson-xavier-jp5"
ROWS: Mapping[str, tuple[str, bool, str]] = {"f32": ("f32", False, "fp32"), "f16": ("f16", False, "fp16"), "int8": ("f16", True, "int8")}
RUNS, PER_ROUND = 300, 10
LAST_WORDS = 300
NOT_GIVEN = "not measured: --tensorrt8-python was not given (a Python 3.10 with tensorrt 8.5 or 8.6, and LD_LIBRARY_PATH to its libraries)"
ABSENT = [Way(f"TensorRT 8 {precision}", BY, kind, None, NOT_GIVEN) for precision, (_, _, kind) in ROWS.items()]


def jobs(net: Net, batch: int, folder: Path, *, own_kernels: bool) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(what the other Python is asked for, why a precision is not)."""
    found: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    calls = folder / f"calls-{batch}.bin"
    spec, output = net.graph.signature.inputs[0], net.graph.signature.outputs[0]
    calls.write_bytes(b"".join(np.ascontiguousarray(call[spec.name], np.float32).tobytes() for call in net.calls(batch)))
    for precision, (floats, quantized, _) in ROWS.items():
        place = folder / f"trt8-{precision}-{batch}"
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        artifact = net.quantized if quantized else net.graph
        try:
            if artifact is None:
                raise RuntimeError(f"it could not be quantized: {net.problem}")
            target = net.target.model_copy(update={"runtime": net.target.runtime.model_copy(update={"precision": floats})})
            built = TensorRt().build(artifact, target, place)
        except Exception as error:  # noqa: BLE001  # becomes the row's reason
            problems[precision] = brief(error)
            continue
        shape = (batch, *(dim for dim in spec.shape[1:] if isinstance(dim, int)))
        recipe = replace(Recipe.parse(str(built.runtime["recipe"])), profiles={spec.name: (shape, shape, shape)})
        found[precision] = {
            "model": str(place / built.files[0]), "recipe": recipe.text(), "input": spec.name, "output": output.name, "shape": shape,
            "calls": str(calls), "outputs": str(place / "outputs.bin"), "runs": RUNS, "own_kernels": own_kernels,
        }  # fmt: skip
    return found, problems


def rows(net: Net, batch: int, folder: Path, python: Path, peaks: Mapping[str, Peak], seconds: float) -> list[dict[str, Any]]:
    """A row and one of its CUDA graph for each precision."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, problems = jobs(net, batch, folder, own_kernels=True)
    request, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    request.write_text(json.dumps({"jobs": asked, "answer": str(answer)}), encoding="utf-8")
    said = call(python, request, seconds)
    got = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {"jobs": {}, "version": None}
    found: list[dict[str, Any]] = []
    for precision, (_, _, kind) in ROWS.items():
        way = Way(f"TensorRT 8 {precision}", BY, kind)
        told = got["jobs"].get(precision, {"problem": problems.get(precision) or said or "the other Python gave no answer"})
        if "problem" in told:
            found.append(failed(way, told["problem"]))
            continue
        details = {
            "build_s": told["build_s"],
            "engine_mb": told["bytes"] / 1e6,
            "tensorrt": got["version"],
            "turns": "a process of its own",
        }
        quality = net.judged(_Replayed(net, Path(asked[precision]["outputs"]), batch), batch)
        for name, key in ((way.name, "samples_ns"), (f"{way.name}, CUDA graph", "graph_ns")):
            row = failed(Way(name, BY, kind, details=details), told.get("graph_problem", "") if key == "graph_ns" else "")
            if told.get(key):
                row |= figures(told[key], net.macs, batch, peaks.get(kind))
                row |= quality if key == "samples_ns" else {}
            found.append(row)
    return found


class _Replayed:
    """Outputs from a file, call after call."""

    def __init__(self, net: Net, path: Path, batch: int) -> None:
        spec = net.graph.signature.outputs[0]
        self._name = spec.name
        shape = [dim for dim in spec.shape[1:] if isinstance(dim, int)]
        self._calls = iter(np.fromfile(path, np.float32).reshape(-1, batch, *shape))

    def __call__(self, feeds: Any) -> dict[str, np.ndarray]:
        return {self._name: next(self._calls)}


def figures(nanoseconds: list[int], macs: int, batch: int, peak: Peak | None) -> dict[str, Any]:
    """Times and rates from raw samples, which stay in the row: they are in no BenchResult."""
    whole = nanoseconds[: len(nanoseconds) // PER_ROUND * PER_ROUND]
    samples = Samples(np.asarray(whole, np.int64), PER_ROUND, 0)
    summary = summarize(samples)
    found = {"p50_ms": summary.p50, "low_ms": summary.low, "high_ms": summary.high, "p90_ms": summary.p90}
    found |= {"images_s": 1000 * batch / summary.p50, "tera_ops": 2 * macs * batch / summary.p50 / 1e9, "samples_ns": whole}
    return found | {"share_of_peak": share(macs * batch, summary.p50, peak), "warnings": list(instability(samples, summary))}


def call(python: Path, request: Path, seconds: float) -> str:
    """Run the other Python; its last line where it fails or crashes, else ""."""
    script = Path(__file__).with_name("_gpu_tensorrt8.py")
    paths = [str(script.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [str(python), str(script), str(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds), check=False, env=environment)
    except subprocess.TimeoutExpired:
        return f"the other Python did not end within {seconds:.0f} s"
    except OSError as error:
        return f"{python.name} does not start: {error.strerror}"
    if not done.returncode:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    return f"the other Python ended with status {done.returncode}: {said[-1][:LAST_WORDS] if said else 'it said nothing'}"
