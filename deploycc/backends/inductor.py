"""PyTorch's AOTInductor on x86 CPUs: a program compiled ahead of time to machine code, as a package (model.pt2) that needs torch alone.

What is compiled depends on a CPU: the machine code, and the order in which oneDNN packs weights, which another CPU would have to undo
at every call (17 times slower, seen here). Both are made for what the target's [hardware] requires, whatever the CPU here has beyond
it; the manifest's `flags` are what the code needs, and the session refuses a CPU without one of them, and another release of PyTorch,
whose oneDNN need not read these weights. That order depends on the number of threads as well: packed for two and run with one,
EfficientNet-Lite0 in bfloat16 spends 20 times its own time on putting 8 of 50 weights in another order, call by call. So they are packed
for the target's `[bench] threads`, the manifest says so, and the session warns of another number. Float operators are computed in the
target's `[runtime] precision`. g++ is needed to build, not to run.

No int8: torchao's quantizer for it (X86InductorQuantizer, torchao 0.18 with torch 2.13) quantizes 1 of the 50 layers of EfficientNet-Lite0
(10.3 ms a call, as in float), does not take ResNet-18 at all ("partition has more than one output node"), and what its passes lower to does
not go through AOTInductor (no kernel for aten.as_strided). PyTorch's int8 is FBGEMM's.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploycc.backends import _inductor_package as pt2
from deploycc.backends._distance import relative
from deploycc.backends._settings import latency_only, precision_in_hardware, processor_only
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Availability, Built, Constraint, Coverage, Session, Violation, enforce
from deploycc.core.target import Target, machine
from deploycc.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SESSION, FILE = "inductor", "model.pt2"
# The levels of the x86-64 ABI: what their code may use, by the names in /proc/cpuinfo.
V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VNNI, BF16 = V4 | {"avx512_vnni"}, V4 | {"avx512_vnni", "avx512_bf16"}
AMX = BF16 | {"avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
# Best first: (what oneDNN calls it, the level for the C++ compiler, flags).
PLATFORMS = (
    ("AVX512_CORE_AMX", "x86-64-v4", AMX),
    ("AVX512_CORE_BF16", "x86-64-v4", BF16),
    ("AVX512_CORE_VNNI", "x86-64-v4", VNNI),
    ("AVX512_CORE", "x86-64-v4", V4),
    ("AVX2", "x86-64-v3", V3),
)
TOLERANCES = {"f32": 1e-3, "bf16": 0.1}  # of the largest output, against the module in float32 or under autocast
OTHER_SIZES = (1, 3)
OWN = ("aten", "prims", "prim", "higher_order")


class Inductor:
    """PyTorch, AOTInductor: compiled ahead of time for x86 CPUs."""

    name: ClassVar[str] = "inductor"
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.PROGRAM})

    def __init__(self) -> None:
        self._last: tuple[str, bytes] | None = None  # a compile takes tens of seconds, and a model is built for its receipt and to ship

    def available(self) -> Availability:
        """Whether PyTorch and a C++ compiler are installed."""
        try:
            installed = version("torch")
        except PackageNotFoundError:
            return Availability(None, "the package torch is not installed", "pip install torch")
        if compiler() is None:
            return Availability(None, "the C++ compiler g++ is not installed (needed to build, not to run)", "apt-get install g++")
        return Availability(installed)

    def constraints(self) -> Sequence[Constraint]:
        """Hardware, precision, operators."""
        hardware = (processor_only, known_platform, built_on_its_hardware)
        return (*hardware, latency_only, f32_or_bf16, precision_in_hardware, float_models, torch_operators)

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write model.pt2. Raises UnsupportedError where the compiler fails, or the package does not do what the model does."""
        enforce(self.constraints(), artifact, target)  # also where nobody has looked: latencies are measured pass by pass
        precision, threads, (isa, level, flags) = target.runtime.precision, str(target.bench.threads), platforms(target)[0]
        program = pt2.at_boundary(artifact.model, artifact.signature, precision)
        key = f"{artifact.digest()} {precision} {isa} {threads}"
        if self._last is None or self._last[0] != key:
            request = {"flags": sorted(flags), "level": level, "compiler": compiler()}
            library = pt2.compile_program(program, request, {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": threads})
            self._last = (key, pt2.package(library, artifact.signature))
        (folder / FILE).write_bytes(self._last[1])
        installed = version("torch")
        runtime = {
            "session": SESSION,
            "package": "torch",
            "version": installed,
            "minimum": target.runtime.minimum or ".".join(installed.split(".")[:2]),
            "precision": precision,
            "flags": " ".join(sorted(flags | set(target.hardware.requires))),
            "packed_for": isa,
            "threads": threads,
            "compiler": compiler_version(),
        }
        coverage = Coverage(0.0, 0, (("every operator", f"computed in {precision}"),))
        built = Built(folder, (FILE,), runtime, artifact.signature, coverage, _notes(program, precision))
        self._verify(built, artifact, target)
        return built

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """The device's own session."""
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        return module.open(built.folder / built.files[0], built.signature, built.runtime, threads)

    def _verify(self, built: Built, artifact: Artifact, target: Target) -> None:
        """The package against the program, at other sizes of its free axes too. Raises UnsupportedError."""
        import torch

        from deploycc.forms.module import example_feeds, example_sizes

        module, specs = artifact.model.module(), artifact.signature.inputs
        base, precision = example_sizes(module, specs), target.runtime.precision
        sizes = [base, *({**base, axis: size} for axis in base for size in OTHER_SIZES)]
        with self.open(built, target, threads=target.bench.threads) as session:
            for chosen in sizes:
                feeds = example_feeds(artifact.signature, chosen, seed=1)
                try:
                    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                        found = module(*(torch.from_numpy(feeds[spec.name].copy()) for spec in specs))
                except Exception:  # noqa: BLE001  a size that the model itself does not take says nothing about the package
                    continue
                for (name, got), want in zip(session.run(feeds).items(), pt2.leaves(found), strict=True):
                    distance = relative(want.to(getattr(torch, str(got.dtype))).numpy(), got)
                    if not distance <= TOLERANCES[precision]:
                        raise UnsupportedError(
                            f"output '{name}' of the compiled model differs from the model's by {distance:.2g} of the largest value"
                            + "".join(f", {axis} = {size}" for axis, size in chosen.items()),
                            fix="give named axes a fixed size with --input NAME:SHAPE, or use a target of another runtime",
                        )


def platforms(target: Target) -> list[tuple[str, str, frozenset[str]]]:
    """(what oneDNN packs for, level of the machine code, the flags both need) that the target's requirements guarantee, best first.

    A flag of AVX-512 stands for its foundation: no CPU with VNNI or bfloat16 lacks F, BW, CD, DQ or VL.
    """
    requires = set(target.hardware.requires)
    wide = any(flag.startswith("avx512") for flag in requires)
    guaranteed = requires | (V4 if wide else V3 if "avx2" in requires else frozenset())
    return [item for item in PLATFORMS if item[2] <= guaranteed]


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    return shutil.which("g++")


def compiler_version() -> str:
    """Such as "g++ 12.2.0"."""
    done = subprocess.run([compiler() or "g++", "-dumpfullversion"], capture_output=True, text=True, check=False)
    return f"g++ {done.stdout.strip()}"


def known_platform(artifact: Artifact, target: Target) -> list[Violation]:
    """Machine code is made for an x86-64 CPU with AVX2 or AVX-512, and the target must say which.

    Set arch = "x86_64" in the target, and put avx2, avx512f or a later flag in [hardware] requires.
    """
    if target.arch != "x86_64":
        return [Violation(f"target {target.name}", f"arch = {target.arch}")]
    return [] if platforms(target) else [Violation(f"target {target.name}", f"requires {', '.join(target.hardware.requires) or 'nothing'}")]


def built_on_its_hardware(artifact: Artifact, target: Target) -> list[Violation]:
    """Weights are packed by running oneDNN, so a package is built on a CPU that has what the target requires.

    Compile on such a machine, or for a target that fits this one (`deploycc targets`).
    """
    arch, here = machine()
    flags = set().union(*(item[2] for item in platforms(target)[:1])) | set(target.hardware.requires)
    missing = sorted(flags - here)
    return [Violation("this CPU", f"lacks {', '.join(missing)}")] if missing or arch != "x86_64" else []


def f32_or_bf16(artifact: Artifact, target: Target) -> list[Violation]:
    """AOTInductor computes float operators in float32 or, by autocast, in bfloat16.

    Set runtime.precision = "f32" or "bf16" in the target, or use one whose backend is openvino.
    """
    precision = target.runtime.precision
    return [] if precision in TOLERANCES else [Violation(f"target {target.name}", f"runtime.precision = {precision}")]


def float_models(artifact: Artifact, target: Target) -> list[Violation]:
    """This backend compiles float models: integer kernels of inductor are not used.

    Leave the quantizing pass out of the pipeline, or use a target of ONNX Runtime, OpenVINO or FBGEMM for int8.
    """
    return [] if artifact.quant is None else [Violation("the model", f"quantized by {artifact.quant.method}")]


def torch_operators(artifact: Artifact, target: Target) -> list[Violation]:
    """The device has torch alone, so every operator must be PyTorch's own, and none on quantized tensors.

    Replace the operator it names by PyTorch's own; an int8 model goes to a target of ONNX Runtime, OpenVINO or FBGEMM as float, and is
    quantized there.
    """
    found = {str(node.target) for node in artifact.model.graph.nodes if isinstance(getattr(node.target, "namespace", None), str)}
    return [Violation("operator", name) for name in sorted(found) if name.split(".")[0] not in OWN]


def _notes(program: ExportedProgram, precision: str) -> tuple[str, ...]:
    """Which convolutions and products are not computed in the precision that was asked for."""
    if precision == "f32":
        return ()
    types = [kind for _, kind in pt2.heavy_types(program)]
    return (f"{types.count('bfloat16')} of {len(types)} convolutions and matrix products are computed in bfloat16",)
