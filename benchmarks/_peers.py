"""The networks, and every way to run each of them: eager, by hand with ONNX Runtime, and as deploycc's bundles."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _shared import say

from deploycc import driver
from deploycc.core import target as targets
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Session
from deploycc.core.data import Data
from deploycc.core.registry import FORMS
from deploycc.core.target import Target
from deploycc.demo import Photos
from deploycc.forms.module import example_feeds
from deploycc.planning import Options
from deploycc.runtime import bundle as bundles
from deploycc.runtime import sessions

THREADS = 1
EAGER, ORT_FLOAT, ORT_STATIC, ORT_STATIC_OURS = "PyTorch eager", "ORT float", "ORT quantize_static", "ORT quantize_static, our graph"
OURS, FBGEMM = "x86-onnxruntime", "x86-fbgemm"
REAL = "lite0"
REAL_MODEL = "deploycc.demo:efficientnet_lite0"
MODELS = {name: f"torchvision:{name}" for name in ("resnet18", "resnet50", "mobilenet_v2")} | {REAL: REAL_MODEL}
FEW_PHOTOS = 32  # calibrate the networks with random weights
COMPILE_BENCH = {"min_seconds": 0.3, "min_runs": 10}  # of each compile: the long run comes afterwards


@dataclass(frozen=True, slots=True)
class Contender:
    """One candidate: how to open it, the size of its files in MB (10^6 bytes), and what it says of itself."""

    peer: str
    open: Callable[[], Session]
    megabytes: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Lineup:
    """Everything to be measured for one network."""

    name: str
    reference: Artifact
    data: Data
    contenders: tuple[Contender, ...]
    int8_ships: Mapping[str, bool]  # by target


def export(reference: Artifact, path: Path) -> Path:
    """torch.onnx.export as its documentation shows it."""
    import torch

    example = tuple(map(torch.from_numpy, example_feeds(reference.signature, seed=0).values()))
    inputs, outputs = ([spec.name for spec in specs] for specs in (reference.signature.inputs, reference.signature.outputs))
    torch.onnx.export(
        reference.model,
        example,
        str(path),
        input_names=inputs,
        output_names=outputs,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path


def quantize_by_hand(model: Path, out: Path, feeds: Iterator[dict[str, np.ndarray]]) -> Path:
    """ONNX Runtime's static quantization at its best for x86 with VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(feeds, None)

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared))
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=False,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return out


def onnx_contender(peer: str, path: Path, reference: Artifact) -> Contender:
    """An ONNX file in the session that a bundle would run in: same options, same threads."""
    module = sessions.find("onnxruntime")
    return Contender(peer, lambda: module.open(path, reference.signature, {}, THREADS), path.stat().st_size / 1e6)


def bundle_contender(peer: str, folder: Path) -> tuple[Contender, bool]:
    """A bundle as the device opens it, and whether what it ships is int8."""
    loaded = bundles.load(folder)
    shipped, reason = (str(loaded.manifest["decision"][key]) for key in ("shipped", "reason"))
    note = "" if shipped == driver.COMPILED else f"ships {shipped}: {reason}"
    size = loaded.model.stat().st_size / 1e6
    return Contender(peer, lambda: bundles.open_session(loaded, THREADS), size, note), shipped == driver.COMPILED


def target_for(name: str, *, open_gate: bool) -> Target:
    """The target with a short bench; with `open_gate`, its gate lets everything through."""
    target = targets.load(name)
    limits = {"accuracy_drop": 1.0, "agreement": 0.0, "sqnr_db": -1000.0} if open_gate else {}
    return target.model_copy(
        update={"bench": target.bench.model_copy(update=COMPILE_BENCH), "limits": target.limits.model_copy(update=limits)}
    )


def few_photos(photos: Photos, folder: Path) -> Path:
    """Some of the calibration photos, for networks whose answers mean nothing."""
    folder.mkdir()
    for path in sorted(photos.calibration.iterdir())[:FEW_PHOTOS]:
        shutil.copyfile(path, folder / path.name)
    return folder


def line_up(name: str, options: Options, work: Path, ready: Mapping[str, Path]) -> Lineup:
    """Compile, export and quantize one network in every way. `ready`: bundles that are there already, by target."""

    def compiled(target: str, passes: str | None = None) -> driver.Compiled:
        out = work / (target if passes is None else f"{target}-float")
        chosen = target_for(target, open_gate=name != REAL)
        return driver.compile(MODELS[name], replace(options, target=chosen, passes=passes, output=out))

    say(f"{name}: compiling for {FBGEMM}")
    fbgemm = compiled(FBGEMM)
    folders = {**ready, FBGEMM: fbgemm.bundle.folder}
    if OURS not in folders:
        say(f"{name}: compiling for {OURS}")
        folders[OURS] = compiled(OURS).bundle.folder
    reference, data = fbgemm.reference, fbgemm.plan.data
    say(f"{name}: torch.onnx.export and quantize_static")
    float_onnx = export(reference, work / "float.onnx")
    our_float = compiled(OURS, passes="-quantize-static").bundle.folder / "model.onnx"
    by_hand = quantize_by_hand(float_onnx, work / "static.onnx", iter(data.calibration(reference)))
    on_ours = quantize_by_hand(our_float, work / "static-ours.onnx", iter(data.calibration(reference)))
    form = FORMS.get(reference.form.value)
    ours, ships = zip(*(bundle_contender(target, folders[target]) for target in (OURS, FBGEMM)), strict=True)
    contenders = (
        Contender(EAGER, lambda: form.open(reference, threads=THREADS)),
        onnx_contender(ORT_FLOAT, float_onnx, reference),
        onnx_contender(ORT_STATIC, by_hand, reference),
        onnx_contender(ORT_STATIC_OURS, on_ours, reference),
        *ours,
    )
    return Lineup(name, reference, data, contenders, dict(zip((OURS, FBGEMM), ships, strict=True)))
