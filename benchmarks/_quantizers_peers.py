"""The peers of quantizers.py: ONNX Runtime's quantizers and torch FX here, NNCF in a Python of its own (`_quantizers_nncf.py`).

What a peer made is kept in the caller's folder with a key over the float graph, the calibration arrays, the settings and the versions;
the seconds it took are kept with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _quantizers_cases import Case
from _quantizers_made import PEER, Made
from _shared import say, slug

from deploycc.core.artifact import Form
from deploycc.core.contract import Session
from deploycc.runtime import sessions
from deploycc.runtime.signature import Feeds, Outputs, Signature

THREADS = 1
BASELINE = "ORT u8s8 per-channel, min-max"
LAST_WORDS = 300
SCRIPT = Path(__file__).with_name("_quantizers_nncf.py")
NNCF_SECONDS = 1800
RUNTIMES = {"nncf-openvino": "OpenVINO", "torch-fx": "PyTorch"}
SUFFIXES = {"nncf-openvino": "xml", "torch-fx": "pt"}
STRIDE = 8  # calls whose tensors ONNX Runtime's histogram calibrators hold at a time


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer and its settings.

    Attributes:
        name: of the row.
        tool: "ort-static", "ort-dynamic", "torch-fx", "nncf-onnx" or "nncf-openvino".
        settings: of that tool.
    """

    name: str
    tool: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


def run_peer(case: Case, peer: Peer, folder: Path, python: Path | None, threads: int = THREADS) -> Made:
    """Quantize by `peer`, or say why that cannot be done. `threads`: of the sessions that this process opens."""
    how = ", ".join(f"{key}={value}" for key, value in peer.settings.items())
    runtime = RUNTIMES.get(peer.tool, "ONNX Runtime")
    if problem := _impossible(case, peer):
        return Made(peer.name, PEER, how, runtime=runtime, problem=f"skipped: {problem}")
    if peer.tool.startswith("nncf") and python is None:
        return Made(peer.name, PEER, how, runtime=runtime, problem="skipped: --peers-python was not given")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(peer.name)}.{SUFFIXES.get(peer.tool, 'onnx')}"
    key, notes = _key(case, peer, python), path.with_suffix(".json")
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    if known.get("key") != key or not (path.is_file() or known.get("problem")):
        say(f"{case.given.name}: {peer.name}")
        known = {"key": key, **_tried(case, peer, path, python)}
        notes.write_text(json.dumps(known), encoding="utf-8")
    if known["problem"]:
        return Made(peer.name, PEER, how, seconds=known["seconds"], runtime=runtime, problem=known["problem"])
    if peer.tool == "nncf-openvino":
        assert python is not None
        return _openvino(case, peer, path, folder / f"{slug(BASELINE)}.onnx", python, known["seconds"])
    if peer.tool == "torch-fx":
        engine = str(peer.settings["engine"])
        size = path.stat().st_size
        return Made(peer.name, PEER, how, lambda: _open_script(path, engine, case, threads), size, known["seconds"], f"PyTorch, {engine}")
    module = sessions.find("onnxruntime")
    return Made(
        peer.name, PEER, how, lambda: module.open(path, case.graph.signature, {}, threads), path.stat().st_size, known["seconds"]
    )  # fmt: skip


def _impossible(case: Case, peer: Peer) -> str:
    """Why a peer cannot be tried on this model here; empty text where it can."""
    if peer.tool != "torch-fx":
        return ""
    import torch

    if case.reference.form is not Form.MODULE:
        return "the model is no torch module"
    engine = peer.settings["engine"]
    return "" if engine in torch.backends.quantized.supported_engines else f"this PyTorch has no engine {engine}"


def _tried(case: Case, peer: Peer, path: Path, python: Path | None) -> dict[str, Any]:
    """{"seconds", "problem"} of one attempt."""
    tools = {"ort-static": _ort_static, "ort-dynamic": _ort_dynamic, "torch-fx": _torch_fx}
    begin = time.perf_counter()
    try:
        if peer.tool in tools:
            with contextlib.redirect_stdout(io.StringIO()):  # ONNX Runtime's calibrators talk
                tools[peer.tool](case, peer.settings, path)
            seconds = time.perf_counter() - begin
        else:
            seconds = _nncf(case, peer, path, str(python))
        if path.suffix == ".onnx":
            sessions.find("onnxruntime").open(path, case.graph.signature, {}, THREADS)  # a peer's file may not load
    except Exception as error:  # noqa: BLE001 (whatever a peer raises is its row's reason)
        path.unlink(missing_ok=True)
        return {"seconds": time.perf_counter() - begin, "problem": f"failed: {type(error).__name__}: {brief(str(error))}"}
    return {"seconds": seconds, "problem": ""}


def brief(text: str) -> str:
    """One line without this machine's paths."""
    words = [word.rpartition("/")[2] if word.count("/") > 1 else word for word in text.split()]
    return " ".join(words)[-LAST_WORDS:]


def _key(case: Case, peer: Peer, python: Path | None) -> str:
    digest = hashlib.sha256(case.onnx.read_bytes())
    for feeds in case.calibration:
        for name, array in feeds.items():
            digest.update(name.encode() + array.tobytes())
    if peer.tool.startswith("nncf"):
        versions = versions_of(str(python))
        digest.update(SCRIPT.read_bytes())
    else:
        versions = version("torch" if peer.tool == "torch-fx" else "onnxruntime")
    digest.update(json.dumps([peer.tool, dict(peer.settings), versions], sort_keys=True).encode())
    return digest.hexdigest()


def versions_of(python: str) -> str:
    """What is installed there, in words."""
    code = "from importlib.metadata import version as v; print(', '.join(f'{n} {v(n)}' for n in ('nncf', 'openvino', 'onnxruntime')))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# ---- ONNX Runtime


def reader_over(calls: Sequence[Feeds]) -> Any:
    """The calibration reader that quantize_static takes, over feeds that are all there."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.set_range(0, len(calls))

        def __len__(self) -> int:
            return len(calls)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(range(start_index, end_index))

        def get_next(self) -> Any:
            index = next(self.left, None)
            return None if index is None else dict(calls[index])

    return Reader()


def reader_through(calls: Iterator[Feeds]) -> Any:
    """The same over feeds that come one by one."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(calls, None)

    return Reader()


def ort_static(model: Path, out: Path, reader: Any, settings: Mapping[str, Any], stride: int = 0) -> None:
    """quant_pre_process, then quantize_static with Q/DQ; histograms hold all tensors of `stride` calls at a time, 0 = of all calls."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    prepared = _pre_processed(model, out)
    method = str(settings.get("calibrate_method", "MinMax"))
    extra: dict[str, Any] = {"CalibStridedMinMax": stride} if stride and method != "MinMax" else {}
    types = {key: QuantType[str(settings[key])] for key in ("activation_type", "weight_type") if key in settings}
    plain = {key: settings[key] for key in ("per_channel", "reduce_range") if key in settings}
    quantize_static(
        str(prepared), str(out), reader, quant_format=QuantFormat.QDQ, calibrate_method=CalibrationMethod[method],
        extra_options=extra, **types, **plain,
    )  # fmt: skip
    prepared.unlink()


def _pre_processed(model: Path, out: Path) -> Path:
    """As its documentation wants it before quantizing; without the symbolic shapes where that step has no rule for the graph."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(model), str(prepared))
    except Exception:  # noqa: BLE001 - it raises what its rule for an operator happens to raise
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    return prepared


def _ort_static(case: Case, settings: Mapping[str, Any], out: Path) -> None:
    ort_static(case.onnx, out, reader_over(case.calibration), settings, math.gcd(len(case.calibration), STRIDE))


def _ort_dynamic(case: Case, settings: Mapping[str, Any], out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _pre_processed(case.onnx, out)
    quantize_dynamic(str(prepared), str(out), weight_type=QuantType.QInt8, **settings)
    prepared.unlink()


# ---- NNCF and OpenVINO, in their own Python


def _job(python: str, job: Mapping[str, Any], folder: Path) -> None:
    """Run the script of the other Python on a job; raises RuntimeError with its last words."""
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run([python, str(SCRIPT), str(path)], capture_output=True, text=True, timeout=NNCF_SECONDS, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")


def save_calls(path: Path, calls: Sequence[Feeds]) -> Path:
    """Feeds as one .npz: "index/name"."""
    np.savez(path, **{f"{index}/{name}": array for index, feeds in enumerate(calls) for name, array in feeds.items()})
    return path


def _nncf(case: Case, peer: Peer, out: Path, python: str) -> float:
    """Seconds in nncf.quantize alone, without starting Python."""
    calls, seconds = save_calls(out.parent / "calibration.npz", case.calibration), out.parent / "seconds.json"
    job = {"do": peer.tool, "model": str(case.onnx), "calls": str(calls), "settings": dict(peer.settings), "out": str(out)}
    try:
        _job(python, {**job, "seconds": str(seconds)}, out.parent)
        return float(json.loads(seconds.read_text(encoding="utf-8")))
    finally:
        calls.unlink()
        seconds.unlink(missing_ok=True)


def _openvino(case: Case, peer: Peer, path: Path, baseline: Path, python: Path, seconds: float) -> Made:
    """Answers and times of an OpenVINO model: interleaved with the baseline's file in the other Python's own ONNX Runtime."""
    folder = path.parent
    calls, answers, times = save_calls(folder / "judging.npz", case.judging), folder / "answers.npz", folder / "times.json"
    job = {
        "do": "openvino-run", "model": str(path), "baseline": str(baseline), "calls": str(calls), "answers": str(answers),
        "times": str(times), "threads": THREADS, "outputs": [spec.name for spec in case.graph.signature.outputs],
        "probes": [index for index, feeds in enumerate(case.judging) if any(feeds is probe for probe in case.probes)],
    }  # fmt: skip
    how = ", ".join(f"{key}={value}" for key, value in peer.settings.items())
    try:
        _job(str(python), job, folder)
        with np.load(answers) as file:
            found = [
                {spec.name: file[f"{index}/{spec.name}"] for spec in case.graph.signature.outputs} for index in range(len(case.judging))
            ]
        timed = json.loads(times.read_text(encoding="utf-8"))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Made(peer.name, PEER, how, seconds=seconds, runtime=RUNTIMES[peer.tool], problem=f"failed: {brief(str(error))}")
    finally:
        for file in (calls, answers, times):
            file.unlink(missing_ok=True)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Made(
        peer.name, PEER, how, None, size, seconds, "OpenVINO", note="timed against the baseline in its own Python",
        answers=found, timed=(timed["p50_ms"], timed["ratio"]),
    )  # fmt: skip


# ---- torch FX


class TorchSession:
    """A torch module as a session; `threads` are the process's from then on."""

    def __init__(self, module: Any, signature: Signature, threads: int = THREADS) -> None:
        import torch

        torch.set_num_threads(threads)
        self.module, self.signature = module, signature
        self._names = [spec.name for spec in signature.inputs]

    def run(self, feeds: Feeds) -> Outputs:
        """One call."""
        import torch

        with torch.inference_mode():
            answer = self.module(*(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self._names))
        arrays = answer if isinstance(answer, (tuple, list)) else [answer]
        return {spec.name: array.numpy() for spec, array in zip(self.signature.outputs, arrays, strict=True)}

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _torch_fx(case: Case, settings: Mapping[str, Any], out: Path) -> None:
    """prepare_fx, calibrate, convert_fx, then traced and frozen, as a TorchScript deployment is."""
    import torch

    names = [spec.name for spec in case.reference.signature.inputs]
    calls = [tuple(torch.from_numpy(feeds[name]) for name in names) for feeds in case.calibration]
    with _engine(str(settings["engine"])):
        torch.jit.save(_converted(case.reference.model, calls, str(settings["engine"])), str(out))


@contextlib.contextmanager
def _engine(name: str, threads: int = THREADS) -> Iterator[None]:
    """PyTorch's quantized engine, which packs weights when a module is converted or loaded, on as many threads as everyone has."""
    import torch

    before = torch.backends.quantized.engine
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _open_script(path: Path, engine: str, case: Case, threads: int) -> Session:
    import torch

    with _engine(engine, threads):
        return TorchSession(torch.jit.load(str(path)), case.graph.signature, threads)


def _converted(model: Any, calls: Sequence[tuple[Any, ...]], qconfig: str) -> Any:
    import copy
    import warnings

    import torch
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each says that torch.ao and torch.jit will go
        prepared = prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping(qconfig), calls[0])
        for call in calls:
            prepared(*call)
        return torch.jit.freeze(torch.jit.trace(convert_fx(prepared), calls[0], check_trace=False).eval())
