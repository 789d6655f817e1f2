"""One static quantization: statistics once, and as many graphs as are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.core.artifact import Artifact, QuantInfo
from deploycc.core.contract import Context
from deploycc.errors import DataError, NothingToDo, PassError, UnsupportedError

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.passes._consumers import Outputs
    from deploycc.passes._placement import Placement
    from deploycc.passes._qdq import Codes
    from deploycc.passes._ranges import Histogram, Mean
    from deploycc.passes._static_options import StaticOptions

PREDICTED = 4  # calls by which saturation is predicted
ALIKE = 1.03  # times what the fastest mixture takes: of these the one with the most in float is taken, noise that is gone is worth more
NO_SLOWER = 1.01  # times what all integers take: no mixture over it, and one up to it is nearer to float
TOLD = 200  # characters of a note that name what comes next


class Job:
    """One run of the pass: statistics once, and as many graphs as are asked for.

    `model` is the float graph that is quantized, a clone; it is not changed.
    """

    def __init__(self, options: StaticOptions, artifact: Artifact, context: Context, model: ir.Model) -> None:
        self.options, self.artifact, self.context, self.model = options, artifact, context, model
        self.quant = context.target.quant
        self.method = options.calibration or self.quant.calibration
        self._statistics: tuple[dict[str, Histogram], dict[str, np.ndarray]] | None = None
        self._outputs: Outputs | None = None
        self._holds = False  # pairs of weights, in the last graph
        self._ranges: dict[str, tuple[float, float]] = {}
        self._codes: dict[Any, Codes] = {}
        self._float: dict[str, str] = {}  # operators of fallback= → why they are in float

    def write(self, more: Mapping[str, str]) -> Artifact:
        """The quantized graph, with the operators of skip= and `more` (name → reason) left in float."""
        from deploycc.forms.onnx import clone
        from deploycc.passes import _qdq
        from deploycc.passes._dialects import dialect_of
        from deploycc.passes._gates import gate_outputs, split_hard_swish
        from deploycc.passes._placement import place

        quant, options, dialect = self.quant, self.options, dialect_of(self.quant)
        model = clone(self.model)
        skip = {**more, **self._float, **dict.fromkeys(options.skip, "left out by skip=")}
        placement = place(model, skip=skip, dialect=dialect)
        if not placement.nodes:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in placement.left_float[:3]) or "it has no Conv, Gemm or MatMul"
            raise NothingToDo(f"{options.name} finds nothing to quantize ({reasons})", fix="use quantize-dynamic, or leave it out")
        if self._statistics is None:
            self._statistics = self._calibrate(placement)
        histograms, means = self._statistics
        ranges = {name: self._range(name, histograms[name]) for name in dict.fromkeys(placement.leaders.values())}
        if dialect.splits_gates:
            placement = split_hard_swish(model.graph, placement)
        scales = {name: _qdq.activation_scale(*found, quant) for name, found in ranges.items()}
        gates = gate_outputs(model.graph, placement) if dialect.splits_gates else {}
        scales |= {name: _qdq.gate_scale(alpha, quant) for name, alpha in gates.items()}
        how = _qdq.How(
            options.clip_weights,
            options.keep_sums,
            options.correct_bias != "none",
            options.holds_pairs and dialect.holds_pairs,
            dialect.pairs_within_taps,
        )
        writer = _qdq.Writer(model.graph, placement, scales, means, quant, how, self._codes)
        writer.write()
        _clean(model)
        info = QuantInfo(
            method="static",
            weights=quant.weights,
            activations=quant.activations,
            per_channel=quant.per_channel,
            reduce_range=quant.reduce_range,
            calibration=self.method,
            left_float=placement.left_float,
        )
        notes = [f"{len(placement.nodes)} operators in integers, {len(ranges)} activation ranges from {self.method} calibration"]
        self._holds = bool(writer.held)
        if writer.held:
            notes.append(f"weights of {len(writer.held)} operators in 8 bits, in pairs whose sums no CPU saturates; the others in 7 bits")
        notes += [f"left in float: {node}: {reason}" for node, reason in placement.left_float]
        return self.artifact.evolve(model, quant=info, notes=tuple(notes))

    def calibration(self) -> dict[str, Any]:
        """What was seen of every tensor that has a range, and the range (`_calibration_facts`); empty before a graph is written."""
        from deploycc.passes._calibration_facts import calibration_facts

        return calibration_facts(self.method, self._statistics[0], self._ranges) if self._statistics else {}

    def held_or_full(self, held: Artifact) -> Artifact:
        """`held`, or with weights of full range where these are predicted to be nearer to float though their pairs saturate.

        Held ones it is where the prediction does not know the order of the pairs (`pairs_within_taps`).
        """
        from deploycc.forms._taps import tapped
        from deploycc.passes._dialects import dialect_of
        from deploycc.passes._saturation import worth_it

        if not self._holds or dialect_of(self.quant).pairs_within_taps:
            return held
        names = [value.name or "" for value in self.model.graph.outputs]
        feeds = list(itertools.islice(self.context.data.calibration(self.artifact), PREDICTED))
        run = tapped(self.model, names)
        wanted = [dict(zip(names, run(call), strict=True)) for call in feeds]
        self.quant = self.quant.model_copy(update={"reduce_range": False})
        full = self.write({})
        try:
            choice, facts, note = worth_it(full.model, held.model, wanted, feeds)
        except UnsupportedError as error:
            choice, facts, note = "reduced", {}, f"what saturation would cost weights of full range is not predicted: {error.what}"
        if choice == "reduced":
            self.quant = self.context.target.quant
        chosen = full if choice == "full" else held
        return replace(chosen, notes=(*chosen.notes, note), details={**chosen.details, "saturation": facts})

    def worst_in_float(self, whole: Artifact) -> Artifact:
        """`whole` with fallback= operators in float, those that win the most accuracy for their time; one at least stays in integers.

        Raises:
            PassError: it has no other, or none alone wins anything.
        """
        from deploycc.passes._sensitivity import WORTH, integer_operators, ranked

        asked, context = self.options.fallback, self.context
        if len(integer_operators(whole.model)) < 2:
            raise PassError(f"fallback={asked} leaves no operator of {self.artifact.source} in integers", fix="ship the float artifact")
        layers = ranked(whole, self.artifact, self.model, lambda name: self.write({name: "tried"}), context)
        chosen = [layer for layer in layers if layer.won >= WORTH][: min(asked, len(layers) - 1)]
        if not chosen:
            raise PassError(
                f"fallback={asked}: no operator of {self.artifact.source} alone wins {WORTH:.0%} of the noise when it is left in float",
                fix="leave fallback out; learn-rounding or quantize-qat spread over all of them what they win",
            )
        self._float = {layer.name: f"fallback: {layer}" for layer in chosen}
        mixed = self.write({})
        note = f"fallback: {len(chosen)} of {len(layers)} operators in float, of the most noise won for their time; next would be "
        others = ", ".join(f"{layer.name} ({layer})" for layer in layers if layer not in chosen)[:TOLD] or "none"
        facts = {layer.name: [layer.won, layer.cost] for layer in layers}
        return replace(mixed, notes=(*mixed.notes, note + others), details={**mixed.details, "sensitivity": facts})

    def without_islands(self, whole: Artifact) -> Artifact:
        """`whole` with the parts in float that the clock says are faster so, or as it is."""
        from deploycc.passes._islands import mixes, segments

        context, artifact = self.context, self.artifact
        assert context.profiler is not None  # `requires` has looked
        entry = sum(int(np.prod([size if isinstance(size, int) else 1 for size in spec.shape])) for spec in artifact.signature.inputs)
        parts = segments(self.model.graph)
        found = mixes(parts, context.profiler({"float": artifact, "int8": whole}), entry)
        names = ("float", "in integers", "as assigned")
        told = ", ".join(f"{value:.3f} ms {name}" for value, name in zip(found[0].predicted, names, strict=True))
        facts = {"predicted_ms": dict(zip(names, found[0].predicted, strict=True))}

        def noted(result: Artifact, text: str, **more: Any) -> Artifact:
            notes = (*result.notes, f"islands, {len(parts)} segments: {told}; {text}")
            return replace(result, notes=notes, details={**result.details, "islands": {**facts, **more}})

        mixed: dict[str, tuple[Artifact, tuple[str, ...]]] = {}
        for index, each in enumerate(found):
            with suppress(NothingToDo):  # every part of it is in float
                if each.float_nodes:
                    written = self.write(dict.fromkeys(each.float_nodes, "measured: faster in float"))
                    mixed[f"mixed {index + 1}"] = written, each.float_nodes
        if not mixed:
            return noted(whole, "every part is faster in float" if found[0].float_nodes else "no part is faster in float", float_nodes=[])
        times = context.latency({"whole": whole, **{name: written for name, (written, _) in mixed.items()}})
        fastest = min(mixed, key=lambda name: times[name])
        most = min(ALIKE * times[fastest], NO_SLOWER * times["whole"])
        best = max((name for name in mixed if times[name] <= most), key=lambda name: len(mixed[name][1]), default=fastest)
        chosen, in_float = mixed[best]
        share = times[best] / times["whole"]
        of = f", of {len(mixed)} mixtures" if len(mixed) > 1 else ""
        told = f"{told}; with {len(in_float)} operators in float{of} {share:.2f} of the time was measured"
        if share <= NO_SLOWER:
            return noted(chosen, "kept so", float_nodes=list(in_float), measured_ms=times)
        return noted(whole, "all kept in integers", float_nodes=list(in_float), measured_ms=times)

    def _range(self, name: str, histogram: Histogram) -> tuple[float, float]:
        """Of one tensor, chosen once: the graph may be written twice."""
        from deploycc.passes._ranges import choose

        levels = 256 if self.quant.activations in ("uint8", "int8") else 65536
        if name not in self._ranges:
            if self._outputs is not None:
                self.context.progress("ranges", len(self._ranges), None)
                self._ranges[name] = self._outputs.range(name, histogram, levels)
            else:
                self._ranges[name] = choose(self.method, histogram, levels=levels, percent=self.options.percentile)
        return self._ranges[name]

    def _calibrate(self, placement: Placement) -> tuple[dict[str, Histogram], dict[str, np.ndarray]]:
        """Run the float graph over the calibration samples: a histogram per range, the channel means of what heavy operators read."""
        from deploycc.passes._consumers import watch
        from deploycc.passes._placement import weighted_inputs
        from deploycc.passes._ranges import Histogram, Mean

        context, artifact = self.context, self.artifact
        # Where operators may go back to float, a tensor that another leads may come to lead itself.
        more_float = self.options.islands == "measured" or self.options.fallback
        ranged = dict.fromkeys(placement.leaders if more_float else placement.leaders.values())
        histograms = {name: Histogram(keep_counts=self.method not in ("minmax", "moving-average")) for name in ranged}
        weighted = weighted_inputs(self.model.graph, placement) if self.options.correct_bias != "none" else {}
        means = {name: Mean(axis) for name, axis in weighted.items()}
        if self.method == "output-mse":
            self._outputs = watch(self.model.graph, placement, calls(artifact, context), context.seed)
        names = list(dict.fromkeys([*histograms, *means, *(self._outputs.sources if self._outputs else ())]))
        for tensors in observe(self.model, names, artifact, context, "calibration"):
            for name, values in tensors.items():
                _take(values, histograms.get(name), means.get(name))
            if self._outputs is not None:
                self._outputs.take(tensors)
        return histograms, {name: mean.value for name, mean in means.items()}


def _take(values: np.ndarray, histogram: Histogram | None, mean: Mean | None) -> None:
    """Add one call's tensor to its statistics."""
    if values.size == 0:
        return
    if histogram is not None:
        histogram.add(values)
    if mean is not None:
        mean.add(values)


def calls(artifact: Artifact, context: Context) -> int:
    """How many calls the calibration samples make."""
    from deploycc.core.data import batch_size

    return -(-len(context.data.part("calibration")) // batch_size(artifact.signature))


def observe(model: ir.Model, names: Sequence[str], artifact: Artifact, context: Context, what: str) -> Iterator[dict[str, np.ndarray]]:
    """The tensors called `names`, call after call over the calibration samples; `what` names the step. Raises DataError for NaN or Inf."""
    from deploycc.forms._taps import tapped

    run, total = tapped(model, list(names)), calls(artifact, context)
    for done, feeds in enumerate(context.data.calibration(artifact), 1):
        artifact.signature.check(feeds)
        tensors = dict(zip(names, run(feeds), strict=True))
        for name, values in tensors.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"calibration sample {done} of {total} makes tensor '{name}' NaN or Inf",
                    fix="check the sample and the model in float; remove the sample if it is damaged",
                )
        yield tensors
        context.progress(what, done, total)


def _clean(model: ir.Model) -> None:
    """Drop float weights that nothing reads any more."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
