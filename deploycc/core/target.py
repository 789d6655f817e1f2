"""What is built for: hardware, runtime, quantization, limits. Data only, in `targets/*.toml`, with `inherit`.

Unknown keys, wrong types and combinations that cannot be right on that hardware are refused on load.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from deploycc.core.artifact import Form
from deploycc.core.registry import BACKENDS, PASSES, suggest
from deploycc.core.spec import parse_specs
from deploycc.errors import DeployError, TargetError, UnknownName
from deploycc.runtime.host import version_numbers
from deploycc.runtime.measure import SESSIONS

# x86 extensions whose u8×s8 dot product accumulates in int32. Without one, VPMADDUBSW adds pairs in int16 and saturates:
# 2 · 255 · 127 = 64770 > 32767. Seven-bit weights are safe: 2 · 255 · 63 = 32130.
WIDE_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
ARCHES = ("x86_64", "aarch64", "any")
FLOAT8 = "float8"
FLOAT8_CAPABILITY = (8, 9)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Sizes = Annotated[tuple[StrictInt, StrictInt, StrictInt], Field(strict=False)]  # TOML has lists


class Hardware(_Table):
    """Facts about the device; `requires` is what the loader refuses to run without."""

    cores: int | None = Field(default=None, ge=1, description="cores of the device")
    cpu: tuple[str, ...] = Field(default=(), strict=False, description="its cores as compilers and QEMU call them, fastest first")
    isa: str | None = Field(default=None, description="instruction set that all its cores have")
    l1d_kb: int | None = Field(default=None, ge=1, description="first-level data cache of one core")
    l2_kb: int | None = Field(default=None, ge=1, description="second-level cache, of one core or of all (docs)")
    l3_kb: int | None = Field(default=None, ge=1, description="third-level cache of all cores")
    requires: tuple[str, ...] = Field(default=(), strict=False, description="CPU flags the loader refuses to run without")
    lacks: tuple[str, ...] = Field(default=(), strict=False, description="CPU flags a build must not assume")
    memory_mb: int | None = Field(default=None, ge=1, description="memory of the device in MB")
    compute_capability: str | None = Field(
        default=None, pattern=r"^\d+\.\d$", description="least compute capability of its NVIDIA GPU; none = it needs no GPU"
    )


class Runtime(_Table):
    """What the device's runtime can load."""

    minimum: str | None = Field(default=None, description="oldest version of the runtime's package that may load the artifact")
    below: str | None = Field(default=None, description="first version of the runtime's package that may not load the artifact")
    reason: str = Field(default="", description="why no newer one")
    opset: int = Field(default=20, ge=13, le=24, description="ONNX opset of the artifact")
    ir_version: int = Field(default=10, ge=7, le=12, description="newest ONNX IR version the runtime reads")
    precision: Literal["f32", "bf16", "f16"] = Field(default="f32", description="what float operators are computed in")
    hint: Literal["latency", "throughput"] = Field(
        default="latency", description="throughput: the samples of a call are divided among streams of one thread each (OpenVINO)"
    )
    provider: Literal["cpu", "cuda"] = Field(default="cpu", description="which execution provider of ONNX Runtime computes")

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.below is None:
            return self
        if not self.reason:
            raise ValueError(f"below = {self.below} says nothing without its reason; write reason")
        if self.minimum is not None and version_numbers(self.minimum) >= version_numbers(self.below):
            raise ValueError(f"no version is at least {self.minimum} and below {self.below}")
        return self


class Engine(_Table):
    """How an engine is built from the artifact, on the device (TensorRT)."""

    axes: dict[str, Sizes] = Field(default={}, description="named axis → least, most likely and largest size: what the engine is built for")
    workspace_mb: int | None = Field(default=None, ge=1, description="scratch memory of builder and engine in MB")
    optimization_level: int = Field(default=3, ge=0, le=5, description="how long the builder searches")
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = Field(
        default="none", description="which other GPUs may load the engine"
    )
    version_compatible: bool = Field(default=False, description="later versions of the runtime may load the engine")
    check_seconds: int = Field(default=300, ge=0, description="limit of each build that checks the artifact here; 0 = no check")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (least, likely, largest) in self.axes.items():
            if not 1 <= least <= likely <= largest:
                raise ValueError(f"axes: {name} is {least}, {likely}, {largest}; write least ≤ most likely ≤ largest, from 1")
        return self


class Quant(_Table):
    """What the runtime's kernels are good at on this hardware."""

    activations: Literal["uint8", "int8", "int16", "float8", "none"] = "uint8"
    activation_symmetric: bool = False
    weights: Literal["int8", "uint8", "float8"] = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    channel_multiple: int = Field(default=1, ge=1, description="what channel pruning rounds to")
    calibration: Literal["minmax", "moving-average", "percentile", "mse", "entropy", "octav", "output-mse"] = "minmax"
    placement: Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-float8"] = Field(
        default="onnxruntime", description="whose rules say what is quantized"
    )
    sparsity: Literal["none", "2:4", "unstructured"] = Field(default="none", description="zeros in weights that a kernel skips")


class Limits(_Table):
    """What the artifact must meet; None = no limit. Checked where they can be measured, reported as not measured elsewhere."""

    accuracy_drop: float = Field(default=0.01, ge=0, le=1, description="largest drop of the metric against the float reference")
    agreement: float = Field(default=0.95, ge=0, le=1, description="without labels: least share of equal arg-max")
    cosine: float = Field(default=0.99, ge=-1, le=1, description="with --metric cosine: least mean cosine similarity, sample by sample")
    sqnr_db: float = Field(default=15.0, description="without labels and classes: least SQNR against the float reference")
    latency_p95_ms: float | None = Field(default=None, gt=0)
    model_mb: float | None = Field(default=None, gt=0)
    peak_mb: float | None = Field(default=None, gt=0)
    outside_delegate: int | None = Field(default=None, ge=0, description="most operators that may run outside the runtime's delegate")


class Bench(_Table):
    """How latency is measured."""

    threads: int = Field(default=1, ge=1)
    min_seconds: float = Field(default=2.0, gt=0)
    min_runs: int = Field(default=30, ge=5)
    max_width: float | None = Field(
        default=None, gt=0, description="go on until every 95 % interval is so narrow: half of it over its value"
    )
    max_seconds: float | None = Field(default=None, gt=0, description="of timing altogether: then it stops with what it has")
    sessions: int = Field(default=SESSIONS, ge=1, description="times every candidate is opened: two sessions of one model differ")


class Target(_Table):
    """One target. Frozen; `digest_facts` is the part that decides a pass's result."""

    name: str
    title: str
    backend: str
    arch: Literal["x86_64", "aarch64", "any"]
    pipeline: str
    docs: str = Field(default="", description="facts of the device and its runtime, in words")
    notices: tuple[str, ...] = Field(
        default=(), strict=False, description="what must be said wherever a number of one of its bundles is shown"
    )
    auto: int = Field(default=0, ge=0, description="preference of `--target auto` among the targets that fit the machine; 0 = never")
    hardware: Hardware = Hardware()
    runtime: Runtime = Runtime()
    engine: Engine = Engine()
    quant: Quant = Quant()
    limits: Limits = Limits()
    bench: Bench = Bench()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.backend not in BACKENDS.names():
            raise ValueError(
                f"backend: there is no backend '{self.backend}' ({suggest(self.backend, BACKENDS.names(), listing='`deploycc backends`')})"
            )
        for spec in parse_specs(self.pipeline):
            if spec.name not in PASSES.names():
                raise ValueError(
                    f"pipeline: there is no pass '{spec.name}' ({suggest(spec.name, PASSES.names(), listing='`deploycc passes`')})"
                )
        hardware, quant = self.hardware, self.quant
        if both := sorted(set(hardware.requires) & set(hardware.lacks)):
            raise ValueError(f"hardware: {', '.join(both)} is both required and lacking")
        narrow = self.arch != "aarch64" and not WIDE_DOT_PRODUCTS & set(hardware.requires)
        if narrow and quant.activations == "uint8" and quant.weights == "int8" and not quant.reduce_range:
            raise ValueError(
                "quant: uint8 activations with full-range int8 weights saturate on x86 CPUs without VNNI; set reduce_range = true, or "
                f"require one of {', '.join(sorted(WIDE_DOT_PRODUCTS))} in [hardware] requires"
            )
        if quant.activations == "int16" and not quant.activation_symmetric:
            raise ValueError("quant: int16 activations must be symmetric; set activation_symmetric = true")
        if quant.placement == "tensorrt" and not (quant.activations == quant.weights == "int8" and quant.activation_symmetric):
            raise ValueError(
                "quant: placement = tensorrt takes symmetric int8 only; set activations = weights = 'int8' and activation_symmetric = true"
            )
        if (quant.placement == "tensorrt-float8") != (quant.activations == FLOAT8) or (quant.activations == FLOAT8) != (
            quant.weights == FLOAT8
        ):
            raise ValueError("quant: float8 is for both: set activations = weights = 'float8' and placement = 'tensorrt-float8'")
        if quant.weights == FLOAT8 and tuple(map(int, (hardware.compute_capability or "0.0").split("."))) < FLOAT8_CAPABILITY:
            raise ValueError(
                f"quant: float8 needs compute capability {'.'.join(map(str, FLOAT8_CAPABILITY))} (Ada, Hopper and later), and "
                f"[hardware] compute_capability is {hardware.compute_capability or 'not said'}; raise it, or use int8"
            )
        if hardware.cores is not None and self.bench.threads > hardware.cores:
            raise ValueError(f"bench: {self.bench.threads} threads on a device with {hardware.cores} cores")
        return self

    def digest_facts(self, parts: Collection[str]) -> dict[str, Any]:
        """What may change the result of a pass that `parts` decide (never titles, limits or bench settings)."""
        return self.model_dump(mode="json", include=set(parts))


def folders() -> tuple[Path, ...]:
    """Where targets are: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    return tuple(folder for folder in (package / "_targets", package.parent / "targets") if folder.is_dir())


def names() -> tuple[str, ...]:
    """Every target's name, sorted; reads no file."""
    return tuple(sorted({path.stem for folder in folders() for path in folder.glob("*.toml")}))


def several(text: str) -> tuple[str, ...] | None:
    """The targets that `text` names: of a list "a,b", or of the family "x86", those called x86-…; None where it names one.

    Raises UnknownName for a list that names what does not exist, or one target twice.
    """
    known = names()
    if "," in text:
        listed = tuple(name.strip() for name in text.split(","))
        if wrong := [name for name in listed if name not in known]:
            raise UnknownName(f"there is no target '{wrong[0]}'", fix=suggest(wrong[0], known, listing="`deploycc targets`"))
        if len(set(listed)) < len(listed):
            raise UnknownName(f"--target {text} names one of them twice", fix="name each target once")
        return listed
    family = tuple(name for name in known if name.startswith(f"{text}-"))
    return None if text in known or not family else family


def load(name: str) -> Target:
    """The target called `name`, or in the file `name` if it ends in .toml. Raises TargetError and UnknownName."""
    path = _path(name)
    table = _merged(path, ())
    try:
        return Target.model_validate({**table, "name": path.stem})
    except ValidationError as error:
        lines = "; ".join(_complaint(dict(item)) for item in error.errors())
        raise TargetError(f"{path.name}: {lines}", fix=f"edit {path.name}; `deploycc targets NAME` shows a complete one") from None
    except DeployError as error:
        raise TargetError(f"{path.name}: pipeline: {error.what}", fix=error.fix) from None


def _complaint(item: dict[str, Any]) -> str:
    where = ".".join(map(str, item["loc"]))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        table: Any = Target
        for part in item["loc"][:-1]:
            table = table.model_fields[str(part)].annotation
        known = sorted(table.model_fields)
        return f"unknown key '{where}' ({suggest(str(item['loc'][-1]), known, listing='this table')})"
    return f"{where}: {message} (got {item['input']!r})" if where else message


def _path(name: str) -> Path:
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise TargetError(
                f"there is no target file '{name}'", fix="give the name of a target (`deploycc targets`) or the path of a .toml file"
            )
        return Path(name)
    for folder in folders():
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise UnknownName(f"there is no target '{name}'", fix=suggest(name, (*names(), "auto"), listing="`deploycc targets`"))


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's table over its parents', tables merged key by key."""
    if path in seen:
        circle = " → ".join(item.stem for item in (*seen, path))
        raise TargetError(f"{seen[0].name}: inherit goes in a circle: {circle}", fix="remove one `inherit` of the circle")
    table = _read(path)
    parent = table.pop("inherit", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise TargetError(f"{path.name}: inherit is {parent!r}", fix='write inherit = "NAME"')
    beside = path.parent / f"{parent}.toml"
    try:
        base = _merged(beside if beside.is_file() else _path(parent), (*seen, path))
    except UnknownName as error:
        raise TargetError(f"{path.name}: inherit: {error.what}", fix=error.fix) from None
    base.pop("auto", None)  # a child is a different device: being chosen automatically is not inherited
    for key, value in table.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{path.name} is not valid TOML: {error}", fix="correct the line it names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot read {path.name}: {error}", fix="check the file's permissions and that it is UTF-8 text") from None


@cache
def machine() -> tuple[str, frozenset[str]]:
    """(architecture, CPU flags) of this machine."""
    from deploycc.runtime.machine import cpu_arch, cpu_flags

    return cpu_arch(), cpu_flags()


@runtime_checkable
class Substitutes(Protocol):
    """A backend that builds also where its runtime is not; there `open` gives a reference in place of the runtime, and nothing is timed."""

    def absent(self, target: Target) -> str | None:
        """Why the runtime is not here, or None where `open` gives it."""
        ...


def misfit(target: Target) -> str | None:
    """Why `target` cannot run on this machine, or None when it can."""
    arch, flags = machine()
    if target.arch not in ("any", arch):
        return f"it is for {target.arch}, this machine is {arch}"
    if missing := [flag for flag in target.hardware.requires if flag not in flags]:
        return f"this CPU lacks {', '.join(missing)}"
    if least := target.hardware.compute_capability:
        from deploycc.runtime import cuda

        if reason := cuda.lacks(least, cuda.gpu()):
            return reason
    backend = BACKENDS.get(target.backend)
    return backend.absent(target) if isinstance(backend, Substitutes) else None


def neighbours(target: Target, form: Form) -> tuple[str, ...]:
    """Names of the targets for the architecture of `target` whose backend takes models of `form`, sorted."""
    fitting = (other for other in map(load, names()) if other.arch == target.arch)
    return tuple(other.name for other in fitting if form in BACKENDS.get(other.backend).accepts)


def automatic() -> Target:
    """The preferred target among those that fit this machine. Raises TargetError when none does."""
    fitting = [target for target in map(load, names()) if target.auto and misfit(target) is None]
    if not fitting:
        raise TargetError(f"no target fits this machine ({machine()[0]})", fix="name one with --target; `deploycc targets` lists them")
    return max(fitting, key=lambda target: target.auto)
