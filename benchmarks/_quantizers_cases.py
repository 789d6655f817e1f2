"""The networks of quantizers.py: each captured once, written once as a float ONNX file, with the same arrays for every quantizer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _shared import say

from deploycc.core import target as targets
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context, Dataset, Sample, Split
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.demo import Photos
from deploycc.planning import Options, capture, find_source, open_data

TARGET = "x86-onnxruntime"
FLOAT = "fold-batchnorm, export-onnx, update-opset, fold-constants"  # what makes the float graph that everyone quantizes
PROBES = 8  # inputs that the clock takes turns over
IMAGES = "images"
ARRAYS = "arrays"


@dataclass(frozen=True, slots=True)
class Given:
    """A model to quantize, as the command line or the list below names it.

    Attributes:
        name: in the tables.
        text: what `deploycc compile` would call it.
        kind: IMAGES or ARRAYS: which rows it gets, and whether its first output is a row of class scores.
        real: whether its weights were trained; else only SQNR and latency mean something.
        calibration: a .npz file by input name; None = photos.
        judging: likewise.
        weights: a file of weights that the text's model loads.
    """

    name: str
    text: str
    kind: str = IMAGES
    real: bool = True
    calibration: Path | None = None
    judging: Path | None = None
    weights: Path | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A model ready to be quantized.

    Attributes:
        given: what it was made from.
        target: with its gate open.
        reference: as captured.
        graph: the float ONNX artifact that every quantizer starts from.
        onnx: the same as a file.
        data: calibration and validation samples, in memory.
        calibration: feeds of `graph`, one call each.
        judging: likewise, of the samples that judge.
        labels: accepted classes (or one number) of each judging sample, or None.
    """

    given: Given
    target: Target
    reference: Artifact
    graph: Artifact
    onnx: Path
    data: Data
    calibration: tuple[Mapping[str, np.ndarray], ...]
    judging: tuple[Mapping[str, np.ndarray], ...]
    labels: tuple[tuple[int, ...] | None, ...]

    @property
    def probes(self) -> Sequence[Mapping[str, np.ndarray]]:
        """Inputs for the clock."""
        return self.judging[:: max(1, len(self.judging) // PROBES)][:PROBES]


class InMemory(Split):
    """A split of samples that are read already."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def label(self, index: int) -> tuple[int, ...] | np.ndarray | None:
        """Of one sample."""
        return self.samples[index].label

    def digest(self, index: int) -> str:
        """Its name: nothing is cached by it."""
        return self.samples[index].id


def in_memory(calibration: Sequence[Sample], judging: Sequence[Sample]) -> Data:
    """Both parts as the compiler's data, all samples in use."""
    splits = {"calibration": InMemory(calibration), "val": InMemory(judging)}
    return Data(Dataset("arrays", splits), calibration_samples=max(1, len(calibration)))


def rows_of(path: Path, most: int | None, seed: int = 0) -> list[Sample]:
    """Samples of a .npz file of stacked arrays by input name; `label` is the label. At most `most`, drawn with `seed`, in order."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    labels = arrays.pop("label", None)
    count = len(next(iter(arrays.values())))
    chosen = range(count) if most is None or count <= most else sorted(random.Random(seed).sample(range(count), most))
    return [
        Sample({name: array[i] for name, array in arrays.items()}, None if labels is None else (int(labels[i]),), f"{path.name} {i}")
        for i in chosen
    ]


def open_target(target: str) -> Target:
    """The target with a gate that lets everything through."""
    found = targets.load(target)
    return found.model_copy(update={"limits": found.limits.model_copy(update={"accuracy_drop": 1.0, "agreement": 0.0, "sqnr_db": -1000.0})})


def options_of(given: Given, photos: Photos, target: Target, output: Path) -> Options:
    """As `deploycc compile` is called for this model."""
    data = (given.judging, given.calibration) if given.calibration else (photos.data, photos.calibration)
    return Options(
        target=target,
        data=str(data[0]),
        calibration=str(data[1]),
        weights=given.weights,
        random_weights=not given.real and not given.weights,
        output=output,
        resume=False,
    )


def prepare(given: Given, photos: Photos, folder: Path, judged: int, target_name: str = TARGET) -> Case:
    """Capture, read every sample once, write the float graph."""
    folder.mkdir(parents=True, exist_ok=True)
    target = open_target(target_name)
    options = options_of(given, photos, target, folder / "bundle")
    source = find_source(given.text)
    if given.calibration is None or given.judging is None:
        reference, data = capture(given.text, source, options, open_data(options))
        parts = [list(data.part(role)) for role in ("calibration", "validation")]
        parts = [[_transformed(sample, reference) for sample in part] for part in parts]
    else:
        parts = [rows_of(given.calibration, None), rows_of(given.judging, judged)]
        reference, _ = capture(given.text, source, options, in_memory(*parts))
    data = in_memory(*parts)
    context = Context(target, reference, data, 0, folder)
    say(f"{given.name}: {len(parts[0])} samples calibrate, {len(parts[1])} judge; writing the float graph")
    graph = Pipeline.parse(FLOAT).trimmed(source.gives).run(reference, context)
    path = folder / "float.onnx"
    _save(graph, path)
    return Case(
        given, target, reference, graph, path, data,
        tuple(data.calibration(graph)), tuple(batch.feeds for batch in data.validation(graph)),
        tuple(sample.label if given.real else None for sample in parts[1]),
    )  # fmt: skip


def _transformed(sample: Sample, reference: Artifact) -> Sample:
    """A picture as the array that the model takes."""
    assert reference.transform is not None  # models of photos declare one
    return replace(sample, value={reference.signature.inputs[0].name: reference.transform.apply(sample.value)})


def _save(artifact: Artifact, path: Path) -> None:
    import onnx_ir as ir

    from deploycc.forms.onnx import clone

    ir.save(clone(artifact.model), path)
