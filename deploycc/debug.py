"""Where a bundle's answers part from those of the float model: tensor by tensor, in its real runtime.

The float graph is made again, from the model and the passes that the manifest names, up to the first that rounds. Both graphs then run on
the same samples, and for every tensor that both have

    SQNR      10·log10(Σ f² / Σ (f − q)²), f in float and q in the bundle
    added     Σ (f − q)² / Σ f², less the most of that among what its operator reads: the noise that came in there
    kernel    the same between the runtime's kernels and the exact arithmetic of the very same file (no graph optimization): what is
              lost there is the runtime's doing: the last bit of requantization (25 to 50 dB), or saturating 8-bit products (far less)

Tensors in integers are read behind their QuantizeLinear, so the fused kernels are those that ship; that the outputs stay as they were is
checked.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.artifact import Artifact, Feeds, Form
from deploycc.core.contract import Context, Pass, Progress, silent
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline, Step
from deploycc.core.store import Store, default_root
from deploycc.core.target import Target
from deploycc.errors import DeployError, UnsupportedError, UsageError
from deploycc.forms.module import ARCHITECTURE
from deploycc.planning import capture, find_source, open_data, parse_command_line
from deploycc.runtime import bundle as bundles

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.forms._taps import Tap

SESSION = "onnxruntime"
SAMPLES = 8
DIVERGED_DB = 10.0
SAME_DB = 60.0  # of the outputs with tensors read, against those without


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of both graphs.

    Attributes:
        name: of the tensor.
        operator: name and kind of what gives it; "input" for an input of the graph.
        sqnr_db: against float.
        added: noise that came in there, over the tensor's energy; 0 where what its operator reads is as noisy.
        kernel_db: against the exact arithmetic of the bundle's own file.
        integer: whether it is one of integers.
    """

    name: str
    operator: str
    sqnr_db: float
    added: float
    kernel_db: float
    integer: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass that changed the model: its name, and the outputs' SQNR against the model as captured (None: not measured)."""

    name: str
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Debugged:
    """What was found.

    Attributes:
        bundle: its folder.
        model: what the float graph was made from.
        samples: calls that both were run on.
        stages: the passes, as the compile measured them.
        tensors: in the graph's order.
        outputs_db: of the bundle's outputs against the float graph's.
        diverged_db: below it a tensor counts as diverged.
        notes: what makes the figures less than they seem.
    """

    bundle: str
    model: str
    samples: int
    stages: tuple[Stage, ...]
    tensors: tuple[Tensor, ...]
    outputs_db: float
    diverged_db: float
    notes: tuple[str, ...]

    @property
    def first(self) -> Tensor | None:
        """The first tensor that diverged."""
        return next((tensor for tensor in self.tensors if tensor.sqnr_db < self.diverged_db), None)

    @property
    def worst(self) -> tuple[Tensor, ...]:
        """By the noise that came in there."""
        return tuple(sorted(self.tensors, key=lambda tensor: -tensor.added))


def debug(
    folder: Path, *, model: str | None, data: str | None, samples: int = SAMPLES, below: float = DIVERGED_DB, progress: Progress = silent
) -> Debugged:
    """Compare a bundle with its float graph.

    Args:
        folder: of the bundle.
        model: what it was compiled from; None = what the manifest says.
        data: samples; None = what the manifest says.
        samples: calls.
        below: SQNR in dB under which a tensor has diverged.
        progress: told the samples done.

    Raises:
        BundleError: a damaged bundle.
        UnsupportedError: it is not one of ONNX Runtime's.
        UsageError: the model or the data cannot be found again.
    """
    from deploycc.core.target import misfit
    from deploycc.forms import onnx as form

    loaded = bundles.load(folder)
    if loaded.manifest["runtime"]["session"] != SESSION:
        raise UnsupportedError(
            f"{folder} runs in {loaded.manifest['runtime']['package']}, whose tensors cannot be read",
            fix="compile for a target of ONNX Runtime: the same passes, and `deploycc debug` sees into it",
        )
    target = Target.model_validate({key: value for key, value in loaded.manifest["target"].items() if key != "requires"})
    reference, known = _reference(loaded, target, model, data)
    with tempfile.TemporaryDirectory(prefix="deploycc-") as work:  # the bundle stays as it is
        graph = _float_graph(loaded, Context(target, reference, known, loaded.manifest["seed"], Path(work), progress))
    feeds = known.probe(graph, samples)
    tensors, outputs_db, notes = compare(graph.model, form.read(loaded.model), feeds, progress)
    reason = misfit(target)
    if reason:
        notes = (f"this machine is not the target's ({reason}): its kernels are not those that the bundle will run in", *notes)
    return Debugged(str(folder), reference.source, len(feeds), _stages(loaded), tensors, outputs_db, below, notes)


def _reference(loaded: bundles.LoadedBundle, target: Target, model: str | None, data: str | None) -> tuple[Artifact, Data]:
    """The model in float (as trained, where the bundle has it) and samples."""
    recorded, options = parse_command_line(loaded.manifest["measured"]["command"])
    trained = next((loaded.folder / item["path"] for item in bundles.listed(loaded.manifest) if item["path"].endswith(ARCHITECTURE)), None)
    text = model or (str(trained) if trained is not None else recorded)
    options = replace(options, target=target, data=data or options.data, calibration=None if data else options.calibration)
    if trained is not None and model is None:
        options = replace(options, weights=None, random_weights=False)
    if options.data is None and options.calibration is None:
        raise UsageError(f"{loaded.folder} was compiled without data, so there is nothing to run", fix="give samples with --data")
    try:
        return capture(text, find_source(text), options, open_data(options))
    except DeployError as error:
        raise UsageError(
            f"the float model cannot be made again: {error.what}",
            fix=f"give --model and --data, or run where the bundle was compiled: {loaded.manifest['measured']['command']}",
        ) from error


def _float_graph(loaded: bundles.LoadedBundle, context: Context) -> Artifact:
    """What the first pass that rounds was given."""
    did = [receipt for receipt in loaded.manifest["shipped"]["receipts"] if receipt["changed"]]
    passes = [step.body for receipt in did for step in Pipeline.parse(receipt["spec"]).steps]
    before = passes[: next((index for index, body in enumerate(passes) if rounds(body)), len(passes))]
    kept = [body for body in before if body.effect.tolerance is not None]  # what trains and prunes is in the checkpoint
    pipeline = Pipeline(tuple(Step(body, asked=Form.ONNX in body.consumes) for body in kept))
    return pipeline.run(context.reference, context, store=Store(default_root()))


def rounds(body: Pass) -> bool:
    """Whether a pass makes integers of a float graph; what comes before it is the float graph."""
    return body.effect.tolerance is None and Form.ONNX in body.consumes and Form.MODULE not in body.consumes


def _stages(loaded: bundles.LoadedBundle) -> tuple[Stage, ...]:
    found: list[Stage] = []
    for receipt in (receipt for receipt in loaded.manifest["shipped"]["receipts"] if receipt["changed"]):
        drift: Mapping[str, Any] | None = receipt["to_reference"]
        value = None if drift is None else drift["sqnr_db"]
        found.append(Stage(str(receipt["spec"]).partition("{")[0], None if value is None else float(value)))
    return tuple(found)


def compare(
    float_model: ir.Model, model: ir.Model, feeds: Sequence[Feeds], progress: Progress = silent
) -> tuple[tuple[Tensor, ...], float, tuple[str, ...]]:
    """Tensors, SQNR of the outputs, and notes; `model` was made from `float_model` and kept the names of its tensors."""
    from deploycc.forms._taps import tapped, taps

    known = frozenset(value.name or "" for node in float_model.graph for value in node.outputs)
    known |= frozenset(value.name or "" for value in float_model.graph.inputs)
    places = taps(model, known)
    outputs = [value.name or "" for value in model.graph.outputs]
    names = [place.source for place in places]
    runs = {
        "float": tapped(float_model, [place.name for place in places]),
        "bundle": tapped(model, names, level="all"),
        "exact": tapped(model, names, level="none"),
        "whole": tapped(model, outputs, level="all"),
    }
    sums = {place.name: _Sums() for place in places}
    whole, answers = _Sums(), _Sums()
    for done, call in enumerate(feeds, 1):
        found = {key: run(call) for key, run in runs.items()}
        for index, place in enumerate(places):
            got, exact = (place.value(found[key][index]) for key in ("bundle", "exact"))
            sums[place.name].add(found["float"][index], got, exact)
        by_name = dict(zip((place.name for place in places), found["bundle"], strict=True))
        for name, value in zip(outputs, found["whole"], strict=True):
            whole.add(value, by_name[name], value)
            answers.add(found["float"][names.index(name)], value, value)
        progress("debugging", done, len(feeds))
    notes: tuple[str, ...] = ()
    if whole.sqnr_db < SAME_DB:
        notes = (f"reading tensors changes the outputs ({whole.sqnr_db:.0f} dB): the runtime takes some kernels apart for it",)
    return _tensors(float_model, places, sums), answers.sqnr_db, notes


class _Sums:
    """Energies over calls."""

    def __init__(self) -> None:
        self.signal = self.noise = self.exact = self.kernel = 0.0

    def add(self, wanted: np.ndarray, found: np.ndarray, exact: np.ndarray) -> None:
        want, got, ideal = (array.astype(np.float64) for array in (wanted, found, exact))
        self.signal += float(np.square(want).sum())
        self.noise += float(np.square(want - got).sum())
        self.exact += float(np.square(ideal).sum())
        self.kernel += float(np.square(ideal - got).sum())

    @property
    def sqnr_db(self) -> float:
        return _decibels(self.signal, self.noise)

    @property
    def kernel_db(self) -> float:
        return _decibels(self.exact, self.kernel)


def _decibels(signal: float, noise: float) -> float:
    return math.inf if noise == 0.0 else -math.inf if signal == 0.0 else 10.0 * math.log10(signal / noise)


def _tensors(float_model: ir.Model, places: Sequence[Tap], sums: Mapping[str, _Sums]) -> tuple[Tensor, ...]:
    """With the noise that came in at each."""
    taken = {place.name: place for place in places}
    noise: dict[str, float] = {}
    found: list[Tensor] = []

    def reached(name: str, operator: str, before: float) -> None:
        noise[name] = before
        if name in taken:
            here = sums[name]
            noise[name] = here.noise / here.signal if here.signal else 0.0
            integer = taken[name].scale is not None
            found.append(Tensor(name, operator, here.sqnr_db, max(0.0, noise[name] - before), here.kernel_db, integer))

    for value in float_model.graph.inputs:
        reached(value.name or "", "input", 0.0)
    for node in float_model.graph:
        before = max((noise.get(item.name or "", 0.0) for item in node.inputs if item is not None), default=0.0)
        for value in node.outputs:
            reached(value.name or "", f"{node.name} ({node.op_type})", before)
    return tuple(found)
