"""The networks of gpu.py: captured with a named batch axis, as PyTorch module and float ONNX graph, and quantized for TensorRT.

EfficientNet-Lite0 has its ImageNet weights; the others have random ones, where latency and SQNR mean something and agreement little.
Pictures are the demo's photos where they are on this machine; else smooth noise, which says less about accuracy and the same about latency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _awake import awaken
from _quantizers_cases import FLOAT, Given, in_memory
from _quantizers_made import judge
from _shared import say

from deploycc.core import target as targets
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context, ModelRequest, Sample
from deploycc.core.pipeline import Pipeline
from deploycc.core.store import default_root
from deploycc.core.target import Target
from deploycc.demo import photos
from deploycc.errors import DeployError
from deploycc.forms._macs import count_macs
from deploycc.forms.onnx import OnnxSession
from deploycc.planning import find_source
from deploycc.runtime.machine import available_cores
from deploycc.runtime.transform import read_image

TARGET = "cuda-tensorrt"
GIVEN = (
    *(Given(name, f"torchvision:{name}", real=False) for name in ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")),
    Given("lite0", "deploycc.demo:efficientnet_lite0"),
)
PIXELS = 224
CALIBRATION, JUDGED, PROBES = 32, 32, 4
UNUSED = "nothing on this machine runs it"
COARSE = 14  # noise of that many pixels a side, enlarged

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Net:
    """One network, ready.

    Attributes:
        given: what it was made from.
        target: TensorRT's, its gate open.
        reference: the PyTorch module.
        graph: float ONNX, batch axis named N.
        quantized: the same with Q/DQ; None where it could not be made.
        problem: why not.
        macs: multiply-accumulates of one picture.
        pictures: arrays by input name without batch axis, that judge.
        wanted: what ONNX Runtime on the CPU answers to each with the float graph.
        source: what the pictures are.
    """

    given: Given
    target: Target
    reference: Artifact
    graph: Artifact
    quantized: Artifact | None
    problem: str
    macs: int
    pictures: tuple[Arrays, ...]
    wanted: tuple[Arrays, ...]
    source: str

    def calls(self, batch: int) -> list[dict[str, np.ndarray]]:
        """Every picture once, in batches; the last one is filled from the first."""
        count = -(-len(self.pictures) // batch)
        return [stacked([self.pictures[(call * batch + at) % len(self.pictures)] for at in range(batch)]) for call in range(count)]

    def probes(self, batch: int) -> list[dict[str, np.ndarray]]:
        """Unlike calls that the clock takes turns over."""
        return [
            stacked([self.pictures[(call * batch + at) % len(self.pictures)] for at in range(batch)])
            for call in range(min(PROBES, len(self.pictures)))
        ]

    def judged(self, answer: Callable[[Arrays], Arrays], batch: int, wanted: Sequence[Arrays] | None = None) -> dict[str, Any]:
        """SQNR and agreement of a way's answers with the float graph's on the CPU, or with `wanted`, picture by picture."""
        got = [row for call in self.calls(batch) for row in rows(answer(call))][: len(self.pictures)]
        quality = judge(self.wanted if wanted is None else wanted, got, [None] * len(got), vectors=False)
        return {"sqnr_db": quality.sqnr_db, "agreement": quality.agreement, "broken": quality.broken}


def stacked(pictures: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """One call."""
    return {name: np.ascontiguousarray(np.stack([picture[name] for picture in pictures])) for name in pictures[0]}


def rows(outputs: Arrays) -> list[dict[str, np.ndarray]]:
    """A call's outputs, picture by picture, in float32."""
    count = len(next(iter(outputs.values())))
    return [{name: np.asarray(array[at : at + 1], np.float32) for name, array in outputs.items()} for at in range(count)]


def noise(count: int, pixels: int, seed: int) -> list[np.ndarray]:
    """Smooth coloured noise, as uint8 pictures."""
    rng = np.random.default_rng(seed)
    enlarge = np.ones((-(-pixels // COARSE),) * 2 + (1,))
    coarse = [np.kron(rng.uniform(0, 255, (COARSE, COARSE, 3)), enlarge)[:pixels, :pixels] for _ in range(count)]
    return [np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8) for picture in coarse]


def pictures_here() -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    """(what they are, those that calibrate, those that judge); nothing is downloaded."""
    try:
        found = photos(default_root() / "photos", fetch=False)
    except DeployError as error:
        say(f"no photos here ({error.what}): noise stands in")
        return "smooth noise", noise(CALIBRATION, PIXELS, 0), noise(JUDGED, PIXELS, 1)
    return "photos", _some(found.calibration, CALIBRATION), _some(found.data, JUDGED)


def _some(folder: Path, count: int) -> list[np.ndarray]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [read_image(path) for path in paths[:: max(1, len(paths) // count)][:count]]


def prepare(given: Given, folder: Path, target_name: str = TARGET, *, integers: bool = True) -> Net:
    """Capture, export, answer with the float graph on the CPU, quantize where something here runs `integers`.

    Raises DeployError where there is no float graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = opened(targets.load(target_name))
    source = find_source(given.text)
    fixed = source.load(ModelRequest(text=given.text, random_weights=not given.real))
    shapes: dict[str, tuple[int | str, ...]] = {spec.name: ("N", *spec.shape[1:]) for spec in fixed.signature.inputs}
    reference = source.load(ModelRequest(text=given.text, random_weights=not given.real, inputs=shapes))
    what, *parts = pictures_here()
    calibration, judging = ([_arrays(picture, reference) for picture in part] for part in parts)
    if not given.real:
        awaken(reference.model, list(stacked(calibration).values()))
    data = in_memory(list(_samples(calibration)), list(_samples(judging)))
    context = Context(target, reference, data, 0, folder)
    say(f"{given.name}: writing the float graph")
    graph = Pipeline.parse(FLOAT).trimmed(source.gives).run(reference, context)
    counted = count_macs(graph.model)
    quantized, problem = quantize(graph, context) if integers else (None, UNUSED)
    net = Net(given, target, reference, graph, quantized, problem, sum((counted or {}).values()), tuple(judging), (), what)
    return replace(net, wanted=tuple(answers(net, graph.model)))


def quantize(graph: Artifact, context: Context) -> tuple[Artifact | None, str]:
    """By the last pass of the target's pipeline: (artifact, ""), or (None, why not)."""
    say("quantizing")
    try:
        return Pipeline.parse(context.target.pipeline.rpartition(", ")[2]).run(graph, context), ""
    except DeployError as error:
        return None, error.what


def answers(net: Net, model: Any) -> list[Arrays]:
    """Of any graph of this network on ONNX Runtime's CPU kernels, as it is written, picture by picture."""
    with OnnxSession(model, net.graph.signature, available_cores()) as session:
        return [row for call in net.calls(1) for row in rows(session.run(call))]


def opened(target: Target) -> Target:
    """With a gate that lets everything through, and no check by TensorRT-RTX, which costs minutes."""
    limits = target.limits.model_copy(update={"accuracy_drop": 1.0, "agreement": 0.0, "sqnr_db": -1000.0})
    return target.model_copy(update={"limits": limits, "engine": target.engine.model_copy(update={"check_seconds": 0})})


def _arrays(picture: np.ndarray, reference: Artifact) -> Arrays:
    """As the network takes a picture: by its own transform, else as normalized floats."""
    name, transform = reference.signature.inputs[0].name, reference.transform
    if transform is not None:
        return {name: transform.apply(picture)}
    return {name: np.ascontiguousarray((picture[:PIXELS, :PIXELS, :3].astype(np.float32) / 127.5 - 1).transpose(2, 0, 1))}


def _samples(calls: Iterable[Arrays]) -> Iterable[Sample]:
    return (Sample(call, None, str(number)) for number, call in enumerate(calls))
