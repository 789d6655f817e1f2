"""Builds a TensorRT engine from an ONNX file: one code path for TensorRT 8.5 and 8.6, 10, 11, and TensorRT-RTX.

From 10 on networks are strongly typed: the file says what is computed in which type. In 8.x the file is float32 with Q/DQ, and the builder
is allowed INT8 and FP16. Flags are shifted by their own values: a literal would be another flag in the next version (STRONGLY_TYPED is 1
in 10 and 0 in 11). Names are those of the recorded lists in the tests. TensorRT itself is handed in, so that nothing is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploycc.errors import BundleError, MismatchError

Shape = tuple[int, ...]
COMPATIBILITY = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
BAD = ("ERROR", "INTERNAL_ERROR")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an engine is built.

    Attributes:
        precision: what float operators are computed in: f32 (TF32 off), f16 or bf16.
        typed: the file says every type (TensorRT 10 and later); else it is float32 for TensorRT 8, and f16 is a permission.
        profiles: input name → least, most likely and largest shape; of inputs with a named axis only.
        workspace_mb: memory that the builder and the engine may use for scratch; None = all there is.
        optimization_level: 0 to 5; how long the builder searches.
        hardware_compatibility: "none", "ampere-plus" or "same-compute-capability": other GPUs that may load the engine.
        version_compatible: later versions of TensorRT may load the engine.
        capabilities: compute capabilities to build for, "SM89"; TensorRT-RTX only, which builds without a GPU.
    """

    precision: str = "f32"
    typed: bool = True
    profiles: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict[str, tuple[Shape, Shape, Shape]])
    workspace_mb: int | None = None
    optimization_level: int = 3
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    capabilities: tuple[str, ...] = ()

    def text(self) -> str:
        """As one line of JSON; inverse of `parse`."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read what `text` wrote. Raises BundleError."""
        try:
            table: dict[str, Any] = json.loads(text)
            profiles = {name: tuple(tuple(map(int, shape)) for shape in shapes) for name, shapes in table["profiles"].items()}
            fields: dict[str, Any] = {**table, "profiles": profiles, "capabilities": tuple(table["capabilities"])}
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleError(
                f"the manifest does not say how the engine is built: {error!r}", fix="copy the bundle again, or compile it again"
            ) from error

    def trtexec(self, model: str) -> str:
        """The same by hand: NVIDIA's command line, which no Python package brings."""
        words = ["trtexec", f"--onnx={model}", "--stronglyTyped" if self.typed else "--int8"]
        words += ["--fp16"] if not self.typed and self.precision == "f16" else []
        words += ["--noTF32"] if self.precision == "f32" else []
        for index, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
            if self.profiles:
                words.append(f"--{flag}=" + ",".join(f"{name}:{'x'.join(map(str, three[index]))}" for name, three in self.profiles.items()))
        words += [f"--memPoolSize=workspace:{self.workspace_mb}"] if self.workspace_mb else []
        words += [f"--builderOptimizationLevel={self.optimization_level}"] if self.typed else []
        level = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}.get(self.hardware_compatibility)
        words += [f"--hardwareCompatibilityLevel={level}"] if level else []
        words += ["--versionCompatible"] if self.version_compatible else []
        return " ".join([*words, "--saveEngine=model.plan"])


@dataclass(frozen=True, slots=True)
class Plan:
    """A serialized engine, what the builder timed on the way, and what it said."""

    engine: bytes
    timings: bytes
    messages: tuple[str, ...]


class BuildError(BundleError):
    """TensorRT does not read the file, or builds no engine of it."""


def logger(trt: Any, *, verbose: bool = False) -> Any:
    """One that keeps what TensorRT says (`lines`): errors, or with `verbose` everything."""

    class Kept(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            name = str(severity).rpartition(".")[2]
            if verbose or name in BAD:
                self.lines.append((name, msg))

    return Kept()


def complaints(log: Any) -> list[str]:
    """The errors among what a logger kept, one line each."""
    return [text.strip().splitlines()[0] for name, text in log.lines if name in BAD and text.strip()]


def build(trt: Any, model: Path, recipe: Recipe, *, timings: bytes | None = None, verbose: bool = False) -> Plan:
    """An engine for this machine's GPU, or for `recipe.capabilities`.

    Raises:
        BuildError: the parser or the builder refuses; with its own words.
        MismatchError: this version of TensorRT cannot do what the recipe asks for.
    """
    log = logger(trt, verbose=verbose)
    builder = trt.Builder(log)
    network = builder.create_network(_creation(trt, recipe))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        said = [f"{_node(parser.get_error(index))}{parser.get_error(index).desc()}" for index in range(parser.num_errors)]
        raise BuildError(
            f"TensorRT {trt.__version__} does not read {model.name}: {'; '.join(said) or 'no reason given'}",
            fix="replace the operator that it names, or compile for a target of ONNX Runtime",
        )
    config = _config(trt, builder, recipe, verbose=verbose)
    if timings is not None:
        config.set_timing_cache(config.create_timing_cache(timings), False)
    _profile(builder, config, recipe)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = "; ".join(complaints(log)) or "no reason given"
        raise BuildError(
            f"TensorRT {trt.__version__} builds no engine of {model.name}: {reason}",
            fix="read the reason; for a lack of memory lower [engine] workspace_mb, else compile for a target of ONNX Runtime",
        )
    told = tuple(text for _, text in log.lines)
    return Plan(bytes(plan), b"" if timings is None else bytes(config.get_timing_cache().serialize()), told)


def _node(error: Any) -> str:
    """Which operator an error of the parser is of, where this version says it."""
    name, operator = getattr(error, "node_name", None), getattr(error, "node_operator", None)
    return f"{name() or '?'} ({operator() or '?'}): " if callable(name) and callable(operator) else ""


def _creation(trt: Any, recipe: Recipe) -> int:
    """Flags of the network; a graph of named axes is what all versions call an explicit batch."""
    flags = trt.NetworkDefinitionCreationFlag
    if recipe.typed:
        if not hasattr(flags, "STRONGLY_TYPED"):
            raise MismatchError(
                f"TensorRT {trt.__version__} knows no strongly typed networks", fix="use TensorRT 10.0 or later, or compile for TensorRT 8"
            )
        return 1 << int(flags.STRONGLY_TYPED)
    if not hasattr(trt.BuilderFlag, "INT8"):
        raise MismatchError(
            f"the bundle is for TensorRT 8, whose builder chooses types; TensorRT {trt.__version__} takes them from the file",
            fix="compile for the target of a later TensorRT",
        )
    return 1 << int(flags.EXPLICIT_BATCH)


def _config(trt: Any, builder: Any, recipe: Recipe, *, verbose: bool) -> Any:
    config = builder.create_builder_config()
    if recipe.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mb << 20)
    if verbose:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if recipe.precision == "f32":
        config.clear_flag(trt.BuilderFlag.TF32)  # 10 bits of mantissa are not float32
    if not recipe.typed:
        config.set_flag(trt.BuilderFlag.INT8)
        if recipe.precision == "f16":
            config.set_flag(trt.BuilderFlag.FP16)
    if hasattr(config, "builder_optimization_level"):  # 8.6 and later
        config.builder_optimization_level = recipe.optimization_level
    if recipe.hardware_compatibility in COMPATIBILITY:
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        config.hardware_compatibility_level = _known(trt, levels, COMPATIBILITY[recipe.hardware_compatibility], "hardware_compatibility")
    if recipe.version_compatible:
        config.set_flag(_known(trt, trt.BuilderFlag, "VERSION_COMPATIBLE", "version_compatible"))
    if recipe.capabilities:
        config.num_compute_capabilities = len(recipe.capabilities)
        for index, name in enumerate(recipe.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    return config


def _known(trt: Any, kind: Any, name: str, setting: str) -> Any:
    """A member that not every version has."""
    found = getattr(kind, name, None)
    if found is None:
        raise MismatchError(
            f"TensorRT {trt.__version__} does not know {name}, which {setting} asks for",
            fix=f"leave [engine] {setting} out of the target, and compile again",
        )
    return found


def _profile(builder: Any, config: Any, recipe: Recipe) -> None:
    if not recipe.profiles:
        return
    profile = builder.create_optimization_profile()
    for name, (least, likely, largest) in recipe.profiles.items():
        profile.set_shape(name, least, likely, largest)
    config.add_optimization_profile(profile)
