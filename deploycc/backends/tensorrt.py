"""TensorRT on NVIDIA GPUs: what ships is the ONNX file, typed and with Q/DQ, and how the device's runner builds an engine of it.

An engine is machine code for one GPU and one TensorRT, so none is shipped: the device builds it, and keeps it under a key of everything
that it depends on. Where there is no GPU, answers are those of ONNX Runtime on the CPU, which computes the file as it is written; the
accuracy gate judges these, and latency is not measured. With TensorRT-RTX installed (extra `tensorrt-rtx`), its parser and builder check
the file without a GPU, for compute capabilities 8.6 and 8.9: that every operator behind Q/DQ multiplies integers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from deploycc.backends import _tensorrt_probe as probing
from deploycc.backends import _tensorrt_rules as rules
from deploycc.backends import _tensorrt_settings as settings
from deploycc.backends._settings import latency_only
from deploycc.backends._tensorrt_settings import OLDEST, is_version_8
from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Availability, Built, Constraint, Coverage, Session, enforce
from deploycc.core.kernels import Kernel, Shapes
from deploycc.core.target import Engine, Target
from deploycc.errors import UnsupportedError
from deploycc.runtime import cuda
from deploycc.runtime.sessions import tensorrt as session
from deploycc.runtime.tensorrt_engine import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

SESSION = "tensorrt"
CHECKED = ("SM86", "SM89")
CHECKED_FLOAT8 = ("SM89", "SM120")  # SM86 has none
INT8, FLOAT8 = "Int8xInt8", "FP8xFP8"
NOT_RUN = (
    "not measured: TensorRT did not run here; accuracy is that of ONNX Runtime on the CPU, which computes the file as it is written, "
    "and latency on the GPU is unknown"
)
UNCHECKED = f"not checked by TensorRT's builder: TensorRT-RTX is not installed ({probing.INSTALL}); int8 is what the file asks for"
SWITCHED_OFF = "not checked by TensorRT's builder ([engine] check_seconds = 0); int8 is what the file asks for"
PERMITTED = "TensorRT 8 may compute in float16; the reference on the CPU is float32"
EMULATED = "the reference on the CPU computes in float32 and rounds to bfloat16 after every operator"
Precision = Literal["int8", "bf16", "f16", "float", "conversion"]
PRECISIONS: Mapping[str, Precision] = {"Int8": "int8", "BFloat16": "bf16", "Half": "f16"}


class TensorRt:
    """TensorRT 8.5, 8.6, 10 and 11; the engine is built on the device."""

    name: ClassVar[str] = "tensorrt"
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    shows: ClassVar[str] = "TensorRT-RTX's graph for compute capability 8.9 (TensorRT's own is not known here)"

    def available(self) -> Availability:
        """Always: files are built, and checked as far as the machine allows, which the version says."""
        checker = probing.checker()
        checks = f"TensorRT-RTX {checker} checks them" if checker else f"unchecked without TensorRT-RTX: {probing.INSTALL}"
        return Availability(session.version() or f"files only (TensorRT is not here; {checks})")

    def absent(self, target: Target) -> str | None:
        """Why no engine can be built here: no GPU, or no TensorRT."""
        reason = cuda.lacks(target.hardware.compute_capability or "0.0", cuda.gpu())
        if reason is None and session.version() is None:
            return f"TensorRT is not installed: {session.INSTALL.format(target.runtime.minimum or OLDEST)}"
        return reason

    def constraints(self) -> Sequence[Constraint]:
        """Types and shapes that the target allows, and every rule of the parser and of integers."""
        return (latency_only, *settings.RULES, *(rule for rule in rules.RULES if rule is not rules.opset_is_read))

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write model.onnx with every type in it; check it with TensorRT-RTX where that is installed.

        Raises UnsupportedError when a rule is broken, or the parser or builder of TensorRT-RTX refuses, crashes or does not end.
        """
        from deploycc.forms import onnx as form

        recipe = _recipe(artifact, target)
        model, notes = _written(artifact, target, recipe)
        model.ir_version = min(model.ir_version, target.runtime.ir_version)
        enforce(rules.RULES, artifact.evolve(model), target)
        form.write(model, folder)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        probes = _probes(folder / files[0], recipe, target, _codes(artifact.quant))
        installed = session.version()
        return Built(
            folder=folder,
            files=files,
            runtime={
                "session": SESSION,
                "package": "tensorrt",
                "version": installed or "(not run here)",
                "minimum": target.runtime.minimum or OLDEST,
                "install": session.INSTALL.format(target.runtime.minimum or OLDEST),
                "precision": target.runtime.precision,
                "recipe": recipe.text(),
                "trtexec": recipe.trtexec(files[0]),
            },
            signature=artifact.signature,
            coverage=_coverage(artifact.evolve(model), probes, target.runtime.precision),
            notes=(*notes, *_findings(artifact, probes, target), *([NOT_RUN] if self.absent(target) else [])),
        )

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """The device's own session; without a GPU or TensorRT, the file as it is written, on ONNX Runtime's CPU kernels."""
        path = built.folder / built.files[0]
        if self.absent(target) is None:
            module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
            return module.open(path, built.signature, built.runtime, threads)
        from deploycc.backends._sixteen_bits import emulated
        from deploycc.forms.onnx import OnnxSession, read

        model = read(path)
        return OnnxSession(emulated(model) if target.runtime.precision == "bf16" else model, built.signature, threads)

    def kernels(self, model: Path, runtime: Mapping[str, str], shapes: Shapes | None = None) -> list[Kernel]:
        """Layers of the engine that TensorRT-RTX builds for compute capability 8.9; none without it. MACs: by the file's shapes."""
        from deploycc.forms.onnx import read

        if probing.checker() is None:
            return []
        found = probing.probe(model, Recipe.parse(runtime.get("recipe", "")), CHECKED[-1], seconds=Engine().check_seconds)
        macs = _macs(read(model))
        return [_kernel(layer, macs) for layer in found.layers]


def _recipe(artifact: Artifact, target: Target) -> Recipe:
    """How the device builds the engine."""
    engine, axes = target.engine, target.engine.axes
    profiles: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for spec in artifact.signature.inputs:
        if any(isinstance(dim, str) for dim in spec.shape):
            least, likely, largest = (tuple(axes[dim][at] if isinstance(dim, str) else dim for dim in spec.shape) for at in range(3))
            profiles[spec.name] = (least, likely, largest)
    return Recipe(
        precision=target.runtime.precision,
        typed=not is_version_8(target),
        profiles=profiles,
        workspace_mb=engine.workspace_mb,
        optimization_level=engine.optimization_level,
        hardware_compatibility=engine.hardware_compatibility,
        version_compatible=engine.version_compatible,
    )


def _written(artifact: Artifact, target: Target, recipe: Recipe) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph with the types and weights that this version of TensorRT reads."""
    from deploycc.backends._sixteen_bits import typed, with_float_weights
    from deploycc.forms.onnx import clone

    if not recipe.typed:
        return with_float_weights(artifact.model), (PERMITTED,) if recipe.precision == "f16" else ()
    if recipe.precision == "f32":
        return clone(artifact.model), ()
    model, notes = typed(artifact.model, recipe.precision)
    return model, (f"float operators are computed in {recipe.precision}", *notes, *([EMULATED] if recipe.precision == "bf16" else []))


def _codes(quant: QuantInfo | None) -> str:
    """How TensorRT-RTX's log calls a product of what this quantization makes."""
    return FLOAT8 if quant is not None and quant.weights == "float8" else INT8


def _probes(path: Path, recipe: Recipe, target: Target, codes: str) -> list[probing.Probe]:
    """One build for each checked capability; none where it is not installed or not wanted. Raises UnsupportedError."""
    if probing.checker() is None or not target.engine.check_seconds:
        return []
    capabilities = CHECKED_FLOAT8 if codes == FLOAT8 else CHECKED
    probes = [probing.probe(path, recipe, capability, seconds=target.engine.check_seconds) for capability in capabilities]
    if refused := probing.refusals(probes):
        raise UnsupportedError(
            f"target '{target.name}': TensorRT-RTX, which checks for TensorRT here, builds no engine of the model: {refused[0]}",
            fix="replace the operator that it names; where the builder did not end, raise [engine] check_seconds, or set it to 0: no check",
        )
    return probes


def _findings(artifact: Artifact, probes: Sequence[probing.Probe], target: Target) -> list[str]:
    """What was checked, and what was not."""
    if not probes:
        return [UNCHECKED if target.engine.check_seconds else SWITCHED_OFF]
    built = "; ".join(_told(item) for item in probes)
    return [f"checked by building with TensorRT-RTX {probes[0].version}, which is not TensorRT, without running it: {built}"]


def _told(found: probing.Probe) -> str:
    products = ", ".join(f"{number} {kind}" for kind, number in found.operands.most_common()) or "no products"
    return f"{found.capability}: {products}, {found.requantized} roundings, {found.bytes / 1e6:.1f} MB"


def _macs(model: ir.Model) -> dict[str, int | None]:
    """Of every weighted operator."""
    from deploycc.forms._macs import infer_shapes, is_heavy, node_macs
    from deploycc.forms.onnx import graphs

    inferred = infer_shapes(model)
    return {node.name or "": node_macs(node) for graph in graphs(inferred) for node in graph if is_heavy(node.op_type)}


def _coverage(artifact: Artifact, probes: Sequence[probing.Probe], precision: str) -> Coverage:
    """Share of the MACs behind Q/DQ that every build multiplies in 8 bits; without a build, of those behind Q/DQ."""
    macs, wanted = _macs(artifact.model), {node.name or "" for node in rules.intended(artifact)}
    codes = _codes(artifact.quant)
    shown = {name: next((kind for item in probes if (kind := item.operands_of(name)) != codes), codes) for name in wanted}
    integers = [name for name in macs if shown.get(name) == codes]
    counted = [item for item in macs.values() if item is not None]
    share = None if len(counted) < len(macs) else sum(macs[name] or 0 for name in integers) / sum(counted) if sum(counted) else 0.0
    left = tuple((name, _reason(name, shown, artifact.quant)) for name in macs if name not in integers)
    float_operators = left if artifact.quant else (("every operator", f"computed in {precision}"),)
    return Coverage(share, len(integers), float_operators, max((item.requantized for item in probes), default=0))


def _reason(name: str, shown: Mapping[str, str], quant: QuantInfo | None) -> str:
    if name in shown:
        return f"TensorRT-RTX computes it in {shown[name]}, though it is behind Q/DQ"
    left = dict(quant.left_float) if quant else {}
    return next((reason for label, reason in left.items() if label.split(" (")[0] == name), "it is not behind Q/DQ")


def _kernel(layer: probing.Layer, macs: Mapping[str, int | None]) -> Kernel:
    work = [macs[name] for name in layer.sources if name in macs] if layer.multiplies else []
    total = None if not work or None in work else sum(item or 0 for item in work)
    if not layer.multiplies and layer.roundings:
        return Kernel(layer.name, layer.kind, "conversion", None)
    types = set(layer.operands.split("x")) if layer.multiplies else set(layer.inputs)
    precision: Precision = PRECISIONS.get(next(iter(types), ""), "float") if len(types) == 1 else "float"
    return Kernel(layer.name, layer.kind, precision, total)
